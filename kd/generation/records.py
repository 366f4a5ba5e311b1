"""Append-only JSONL records that survive kill -9: raw.jsonl, rewards.jsonl, judgements.jsonl.

Every process appends to its own file, one line per record. A kill tears at most the last line of
each file, and the next start removes it. The first record of a key counts, so a record never
changes once it is written.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TextIO

from kd.data.sources import read_jsonl
from kd.run.outcome import report_outcome


def digest(value: object) -> str:
    """The SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def record_file(output_dir: str, stem: str, rank: int) -> Path:
    """The file that a rank appends to: STEM.jsonl for rank 0, else STEM.RANK.jsonl."""
    return Path(output_dir) / (f"{stem}.{rank}.jsonl" if rank else f"{stem}.jsonl")


def record_files(output_dir: str, stem: str) -> list[Path]:
    """The existing files of all ranks, without those of a longer stem such as STEM-2."""
    name = re.compile(re.escape(stem) + r"(\.\d+)?\.jsonl")
    return sorted(p for p in Path(output_dir).glob("*.jsonl") if name.fullmatch(p.name))


def append_record(file: TextIO, row: dict) -> None:
    """Append one record and flush it."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    report_outcome("saved")  # tells a SLURM job that it made progress


def cut_torn_lines(output_dir: str, stem: str) -> int:
    """Remove an incomplete last line from each file. Returns the number of bytes removed."""
    removed = 0
    for path in record_files(output_dir, stem):
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            removed += len(content) - complete
            with open(path, "r+b") as file:
                file.truncate(complete)
    return removed


def read_records(output_dir: str, stem: str) -> list[dict]:
    """Read the records of all processes and all earlier runs in a folder."""
    nonempty = [str(path) for path in record_files(output_dir, stem) if path.stat().st_size]
    return [row for path in nonempty for row in read_jsonl(path)]


def read_raw_answers(output_dir: str) -> tuple[dict[str, dict], dict[str, str]]:
    """Read raw.jsonl: the first answer of each key, and the last error of each key without one."""
    answers: dict[str, dict] = {}
    errors: dict[str, str] = {}
    for row in read_records(output_dir, "raw"):
        if "error" in row:
            errors[row["key"]] = row["error"]
        else:
            answers.setdefault(row["key"], row)
    return answers, {key: error for key, error in errors.items() if key not in answers}
