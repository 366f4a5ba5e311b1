"""Append-only files of JSON lines that survive kill -9: raw.jsonl, rewards.jsonl.

Every process appends to a file of its own, a line at a time. A kill tears at most the last line of
each; the next start cuts it. For each key the first line counts, so what is there never changes.
"""

import json
from pathlib import Path
from typing import TextIO

from kd.data.sources import read_jsonl
from kd.run.signals import report_outcome


def record_file(output_dir: str, stem: str, rank: int) -> Path:
    """The file that process `rank` appends to; one process has STEM.jsonl alone."""
    return Path(output_dir) / (f"{stem}.{rank}.jsonl" if rank else f"{stem}.jsonl")


def append(file: TextIO, row: dict) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()
    report_outcome("saved")  # a SLURM job that is stopped now has come further


def cut_torn_lines(output_dir: str, stem: str) -> int:
    """Cut what follows the last newline of each file. Returns the bytes that were cut."""
    cut = 0
    for path in sorted(Path(output_dir).glob(f"{stem}*.jsonl")):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            cut += len(content) - whole
            with open(path, "r+b") as file:
                file.truncate(whole)
    return cut


def read_records(output_dir: str, stem: str) -> list[dict]:
    """The lines of all processes of all earlier runs in this folder."""
    paths = sorted(Path(output_dir).glob(f"{stem}*.jsonl"))
    filled = [str(path) for path in paths if path.stat().st_size]
    return [row for path in filled for row in read_jsonl(path)[0]]


def read_answers(output_dir: str) -> tuple[dict[str, dict], dict[str, str]]:
    """({key: row with an answer}, {key: last error of those that have none})."""
    answers: dict[str, dict] = {}
    errors: dict[str, str] = {}
    for row in read_records(output_dir, "raw"):
        if "error" in row:
            errors[row["key"]] = row["error"]
        else:
            answers.setdefault(row["key"], row)
    return answers, {key: error for key, error in errors.items() if key not in answers}
