"""The frame of the table of bad input: what a case is, and the folder that every case starts with.

To add a case, append a `Case` to the list of its area: models.py, settings.py, rows.py, runs.py or
evaluation.py in this folder. test_cases.py runs all of them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from small import save_small, small_tokenizer

GOOD = {"prompt": "a", "completion": "b"}
DATA = [{"path": "WORK/rows.jsonl"}]
TRAINING = {"data": DATA, "global_batch_size": 8, "use_cpu": True, "output_dir": "HERE/out"}
# Flags with which each script passes its checks, so that a case changes only what it is about.
FLAGS: dict[str, dict] = {
    "train/distill.py": {"student": "WORK/student", "teacher": "WORK/teacher"} | TRAINING,
    "train/sft.py": {"model": "WORK/student"} | TRAINING,
    "train/cache_teacher.py": {
        "student": "WORK/student",
        "teacher": "WORK/teacher",
        "teacher_cache": "HERE/cache",
    }
    | TRAINING,
}


@dataclass(frozen=True)
class Case:
    """One command line with a mistake, and the words in which the user is told.

    In flags, recipe, tokens and file names WORK is the shared folder (`make_work`), which a case
    only reads, and HERE is the case's own folder.

    Attributes:
        name: Unique name of the case.
        script: The script, such as train/sft.py.
        message: A part of the one line that the user sees.
        flags: Added to FLAGS[script]; None removes a flag. Lists and objects are written as JSON.
        tokens: Further command-line tokens, as typed.
        recipe: Text of a recipe file that `--config` names.
        files: Files of HERE, by name: text, bytes, or rows of a JSONL file.
        prepare: Called with HERE, for what `files` cannot say.
        lines: Number of lines of the message.
    """

    name: str
    script: str
    message: str
    flags: dict = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    recipe: str | None = None
    files: dict[str, str | bytes | list] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    lines: int = 1


def make_work(folder: Path, models: Path) -> Path:
    """Make the folder WORK: rows, and models without their weights, which no case may look for.

    student, teacher (another width), other (another tokenizer, with weights), packed (a quantized
    format that is not read), adapter (of the teacher), rows.jsonl and bad.jsonl.
    """
    save_small(folder / "other", small_tokenizer(330))
    write(folder / "rows.jsonl", [{"prompt": f"a{i}", "completion": f"b{i}"} for i in range(8)])
    write(folder / "bad.jsonl", [GOOD, {"answer": 1}])
    for name in ("student", "teacher"):
        skip = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(models / name, folder / name, ignore=skip)
    shutil.copytree(folder / "teacher", folder / "packed")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 8, "group_size": 128}
    write(folder / "packed" / "config.json", json.dumps(config))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "teacher")}
    write(folder / "adapter" / "adapter_config.json", json.dumps(adapter))
    return folder


def write(file: Path, content: str | bytes | list) -> None:
    """Write text, bytes, or the rows of a JSONL file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(f"{json.dumps(row)}\n" for row in content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def command_line(case: Case, work: Path, here: Path) -> list[str]:
    """The tokens of a case after the script's name; writes the case's files to `here`."""

    def placed(text: str) -> str:
        return text.replace("WORK", str(work)).replace("HERE", str(here))

    for name, content in case.files.items():
        write(here / name, placed(content) if isinstance(content, str) else content)
    if case.prepare:
        case.prepare(here)
    tokens = []
    if case.recipe is not None:
        write(here / "recipe.yaml", placed(case.recipe))
        tokens += ["--config", str(here / "recipe.yaml")]
    for key, value in (FLAGS.get(case.script, {}) | case.flags).items():
        if value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        tokens += [f"--{key}", placed(text)]
    return tokens + [placed(token) for token in case.tokens]
