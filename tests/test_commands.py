"""Every command of the documentation works as written, in a shell set up as the README says.

The shell has no environment on its PATH but what the README's own `source` line puts there. By
default commands are dry-run: launch files print what they would start, and each script's own parser
reads its flags and recipe. With --all, the commands that need neither a GPU nor the hub are run.
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from command_lines import parse_only
from documentation import GUIDES, SURE, Command, commands, fenced, in_page, sources
from processes import ROOT
from torch.distributed.run import get_args_parser

COMMANDS = commands()
TEXTS = sorted({command.text for command in COMMANDS})
SETUP = fenced((ROOT / "README.md").read_text().split("## Install")[1], "bash")[0].split("\n")
ACTIVATE = next(line for line in SETUP if line.startswith("source "))
PROFILES = [f"launch/{name}.sh" for name in ("cpu", "2xt4", "2xa100", "h100")]
# Programs of others, which are not installed here, and ours whose options are checked as text.
ELSEWHERE = ("vllm", "llama-server", "ollama", "git")
PLACEHOLDER = re.compile(r"\.\.\.|[<>]|^[A-Z][A-Z_]+$|/[A-Z_]+\.sh")
# Lines of launch/slurm/site.sh and of a shell on a cluster, about the user's own machine.
OF_A_SITE = ("export ", "source ~/")
SETTING_UP = ("bash launch/setup.sh", ACTIVATE, "pip install -r requirements.txt")


def kind_of(words: list[str]) -> str:
    """How a command is checked. Raises AssertionError for a command of no known kind."""
    line, first = " ".join(words), words[0]
    if line in SETTING_UP:
        return "set-up"
    if first in ELSEWHERE or line.startswith(OF_A_SITE):
        return "elsewhere"
    if first in PROFILES:
        return "profile"
    if first == "python":
        return "pipeline" if words[1] == "launch/slurm/pipeline.py" else "script"
    if first in (
        "sbatch",
        "srun",
        "accelerate",
        "torchrun",
        "tests/run.sh",
        "launch/quickstart.sh",
    ):
        return first
    if first in ("launch/tensorboard.sh", "benchmarks/gpu.sh"):
        return "shell"
    assert re.fullmatch(r"recipes/\S+\.sh", first), f"unclassified command: {line}"
    return "shell"


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """(variables that a command sets in front, its words)."""
    words = shlex.split(command, comments=True)
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words


def users_environment(**changes: str) -> dict[str, str]:
    """The environment of a new shell: no virtual environment is active."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL", "CONDA", "PYTHON"))}
    own = {str(ROOT / ".venv/bin"), str(Path(sys.executable).parent)}
    path = [part for part in os.environ["PATH"].split(os.pathsep) if part not in own]
    return kept | {"PATH": os.pathsep.join(path)} | changes


def users_shell(command: str, cwd: Path = ROOT, timeout: float = 600, **environment: str) -> str:
    """The output of a command that must succeed, after the README's line of activation."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("no .venv: this environment was not set up as the README says")
    activate = ACTIVATE if cwd == ROOT else ":"
    done = subprocess.run(
        ["bash", "-c", f"{activate}\n{command}"],
        cwd=cwd,
        env=users_environment(**environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    # gloo may abort a distributed process after its work is done; its last words then count.
    assert done.returncode == 0 or "saved to" in done.stdout, done.stdout[-6000:]
    return done.stdout


def check_start(words: list[str]) -> None:
    """Check a started command: the launcher's parser accepts it, and the script's own parser."""
    if words[1].endswith("launch/start.py"):  # it starts the launcher behind it
        words = words[2:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[at]).is_file(), f"no script {words[at]}"
    if words[0] == "accelerate":
        launch_command_parser().parse_args(words[2 : at + 1])
    elif words[0] == "torchrun":
        get_args_parser().parse_args(words[1 : at + 1])
    parse_only(words[at], words[at + 1 :])


@functools.cache
def dry_run(start: str, variables: str) -> list[str]:
    """What a launch file prints for a script without flags; equal starts are run once."""
    return shlex.split(users_shell(f"{variables} {start}").splitlines()[-1])


def check_profile(words: list[str], variables: dict[str, str]) -> None:
    """Dry-run a launch file, and let the script that it would start read the flags.

    Launch files put the flags of the command line last, as they are.
    """
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    options = [option for option in words[1:at] if option != "--dry-run"]
    start = shlex.join([words[0], *options, "--dry-run", words[at]])
    assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    check_start([*dry_run(start, assignments), *words[at + 1 :]])


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:120])
def test_command_is_accepted_by_what_it_calls(text, request):
    variables, words = split(text)
    kind = kind_of(words)
    for word in words:
        assert not re.search(r"\.\.\.|[<>]|^[A-Z][A-Z_]+$|/[A-Z_]+\.sh", word), (
            f"placeholder {word}"
        )
    if kind == "profile":
        check_profile(words, variables)
    elif kind in ("script", "accelerate", "torchrun"):
        check_start(words)
    elif kind in ("sbatch", "srun"):
        at = next(i for i, word in enumerate(words[1:], 1) if not word.startswith("--"))
        assert words[at] == {"sbatch": "launch/slurm/train.sbatch", "srun": "python"}[kind]
        while re.match(r"[A-Z_]+=", words[at + 1]):  # variables of the job
            at += 1
        check_start(["python", *words[at + 1 :]])
    elif kind == "pipeline":  # a real cluster runs it in tests/launch/test_slurm.py
        recipes, rows, *flags = words[2:]
        assert list((ROOT / recipes).glob("*.yaml")) and "path" in json.loads(rows)[0]
        assert all(flag.startswith("--") for flag in flags)
    elif kind in ("launch/quickstart.sh", "tests/run.sh"):
        options = [word for word in words[1:] if word.startswith("--")]
        assert all(option in (ROOT / words[0]).read_text() for option in options)
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/"))
    elif kind == "shell":
        called = request.getfixturevalue("recorded")(text)
        assert called, f"{text} starts nothing"
        for call in called:
            if call[0] in ("sbatch", "tensorboard"):
                continue
            check_start(call)


STUB = """#!/bin/bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
case ${0##*/} in sbatch) echo 1 ;; esac
"""


@pytest.fixture
def recorded(tmp_path):
    """A function that runs a shell file in a tree of stubs and returns what it called."""
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    for folder in (tree, tools):
        folder.mkdir()
    for part in ROOT.iterdir():
        if part.name not in (".venv", "runs", ".git", "my_data"):
            (tree / part.name).symlink_to(part)
    for name in ("python", "python3", "accelerate", "torchrun", "sbatch", "tensorboard"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        output = tree / yaml.safe_load(recipe.read_text())["output_dir"]
        output.mkdir(parents=True, exist_ok=True)
        (output / "done.json").write_text("{}")
    calls = tmp_path / "calls"

    def recorded(command: str) -> list[list[str]]:
        (tree / "runs/own_data").mkdir(parents=True, exist_ok=True)
        path = f"{tools}:/usr/bin:/bin"
        users_shell(command, cwd=tree, PATH=path, CALLS=str(calls))
        return [shlex.split(line) for line in calls.read_text().splitlines()]

    return recorded


@pytest.mark.parametrize("file", list(sources()))
def test_no_command_hides_in_a_sentence(file):
    """What looks like a command is in code, where the other tests find it."""
    prose, found = sources()[file]
    for text in sorted(found, key=len, reverse=True):
        prose = " ".join(prose.split()).replace(" ".join(text.split()), "")
    prose = re.sub(r"```(?!bash).*?```", "", prose, flags=re.S)
    assert not SURE.search(prose), SURE.search(prose)[0]


def test_activation_of_the_readme_gives_the_environment_that_the_setup_made():
    found = users_shell("python -c 'import kd, sys; print(sys.prefix)'")
    assert found.strip() == str(ROOT / ".venv")
    assert SETUP[0] == "bash launch/setup.sh"


@pytest.mark.parametrize("profile", PROFILES)
def test_launch_files_need_no_activation(profile):
    command = f"{profile} --dry-run train/sft.py --config recipes/small/a_teacher.yaml"
    done = subprocess.run(
        ["bash", "-c", f"source launch/activate.sh; command -v accelerate; {command}"],
        cwd=ROOT,
        env=users_environment(),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and done.stdout.startswith(str(ROOT / ".venv/bin/accelerate"))


# Not run here: what needs a GPU, the hub, a server, the network or a user's data; what other tests
# run, in the last line test_recipes_run and test_other_tokenizer.
NOT_HERE = re.compile(
    r"recipes/(?!small/|quickstart/)|my_data|own_data|runs/a/|localhost|llama\.cpp|Qwen/"
    r"|openlm-research/|HuggingFace|benchmarks/wheels\.py|benchmarks/readme\.py|benchmarks/gpu\.sh"
    r"|^launch/tensorboard|^launch/quickstart|^tests/run|^bash launch/setup"
    r"|small/f_stages|small/g_start|small/g_distill|runs/small/cache|runs/rehearsal"
)


def runnable(command: Command) -> bool:
    """Whether a command of the guides is run here, in the order in which it stands there."""
    _, words = split(command.text)
    if NOT_HERE.search(command.text) or kind_of(words) not in ("profile", "script", "shell"):
        return False
    here = words[0] == "launch/cpu.sh" or {"--cpu", "--dry-run", "train/plan.py"} & set(words)
    return kind_of(words) != "profile" or bool(here)


RUN = [
    Command(page, text)
    for page in GUIDES
    for text in in_page((ROOT / page).read_text())
    if runnable(Command(page, text))
]


@pytest.mark.slow
@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("command", RUN, ids=lambda command: command.name)
def test_command_of_the_guides_runs(command):
    users_shell(command.text, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_setup_of_the_readme_ends_where_nothing_is_missing():
    assert ".venv is ready" in users_shell(SETUP[0])
