"""Find the commands of the documentation: pages, script docstrings, shell files and recipes."""

import ast
import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

GUIDES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
PAGES = [
    *(*GUIDES, "CONTRIBUTING.md", "launch/slurm/README.md", "data/quickstart/README.md"),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").rglob("*.md")),
]
SCRIPTS = sorted(
    str(p.relative_to(ROOT))
    for folder in ("train", "eval", "benchmarks", "data/quickstart")
    for p in (ROOT / folder).glob("*.py")
)
HEADERS = sorted(
    str(p.relative_to(ROOT))
    for pattern in (
        *("launch/*.sh", "launch/slurm/*", "recipes/*/*", "benchmarks/*.sh", "tests/run.sh"),
        "requirements.txt",
    )
    for p in ROOT.glob(pattern)
    if p.suffix in (".sh", ".sbatch", ".yaml", ".txt")
)
# How a line begins that is a command and not a sentence.
BEGINNING = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python3?|bash|source|pip|accelerate|torchrun|sbatch|srun|export|git"
    r"|vllm|ollama|llama-server|tensorboard|pytest|launch/\S+\.sh|recipes/\S+\.sh"
    r"|tests/run\.sh)(?: \S|$)"
    r"|(?:train|eval|data|benchmarks)/\S+\.(?:py|sh)(?: --|$)"
)
# What nobody writes but in a command.
SURE = re.compile(r"(?:python3? \S+\.py\b|\.sh (?:--\S+ )*(?:train|eval)/\w+\.py\b)[^`\n]*")


@dataclass(frozen=True)
class Command:
    """One command as a page shows it, with the file in which it stands."""

    place: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def name(self) -> str:
        return f"{self.place}: {self.text[:100]}"


def joined(text: str) -> str:
    """Continued lines as one line, also behind a comment sign."""
    return re.sub(r"\s*\\\n#?\s*", " ", text)


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def in_page(text: str) -> list[str]:
    """Lines of bash blocks, indented code, and code in sentences that has arguments."""
    text = joined(text)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks = [line for block in fenced(text, "bash") for line in block.splitlines()]
    indented = re.findall(r"^    (\S.*)$", rest, flags=re.M)
    lines = [*indented, *in_sentences(rest)]
    return [line for line in blocks if line] + [x for x in lines if BEGINNING.match(x)]


def in_sentences(text: str) -> list[str]:
    """Code between backticks that calls something; a program's name alone does not."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in spans if re.search(r" \S*[/.-]", span)]


def in_docstring(text: str) -> list[str]:
    """Lines of a script's docstring that are commands, and code in its sentences."""
    documentation = joined(ast.get_docstring(ast.parse(text)) or "")
    lines = [" ".join(line.split()) for line in documentation.splitlines()]
    lines = [*lines, *in_sentences(documentation)]
    return [line for line in lines if BEGINNING.match(line) and " " in line]


def in_header(text: str) -> list[str]:
    """Indented lines of comments that are commands."""
    lines = re.findall(r"^#  +(\S.*)$", joined(text), flags=re.M)
    return [line for line in lines if BEGINNING.match(line)]


@functools.cache
def sources() -> dict[str, tuple[str, list[str]]]:
    """{file: (its prose, its commands)}."""
    found = {}
    for files, parts in ((PAGES, in_page), (SCRIPTS, in_docstring), (HEADERS, in_header)):
        for file in files:
            text = (ROOT / file).read_text()
            if parts is in_docstring:
                prose = ast.get_docstring(ast.parse(text)) or ""
            elif parts is in_header:
                prose = "\n".join(re.findall(r"^#.*$|(?<= )#.*$", joined(text), flags=re.M))
            else:
                prose = text
            found[file] = (joined(prose), parts(text))
    return found


def commands() -> list[Command]:
    """All commands of the documentation, each place once."""
    found = [Command(file, text) for file, (_, texts) in sources().items() for text in texts]
    return list(dict.fromkeys(found))


def snippets() -> list[str]:
    """The Python blocks of the guides."""
    return [block for page in GUIDES for block in fenced((ROOT / page).read_text(), "python")]


def local_paths(text: str) -> set[str]:
    """Files of the repository that a text names."""
    folders = (
        "train|eval|launch|recipes|ds_configs|accelerate_configs|tests|kd|docs|benchmarks|data"
    )
    return set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./+-]*\.\w+", text))


def links(page: str) -> list[Path]:
    """The files to which a page links."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", (ROOT / page).read_text())
    return [(ROOT / page).parent / target for target in targets if "://" not in target]
