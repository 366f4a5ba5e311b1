"""A small distillation, and the comparison of two runs of it that started in different ways."""

import hashlib
import json
from pathlib import Path

from small import small_rows

from kd.recipe import as_flags


def flags(models: Path, output: Path, **changes) -> list[str]:
    """A distillation whose precision, sharding and micro-batch are left to the script."""
    rows = models / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, small_rows(64))))
    keys = {
        "student": models / "student",
        "teacher": models / "teacher",
        "data": json.dumps([{"path": str(rows)}]),
        "global_batch_size": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "output_dir": output,
    }
    return as_flags(keys | changes)


def settings(run: Path) -> dict:
    """What run.json says, besides the command, the folder and the memory that was free."""
    record = json.loads((run / "run.json").read_text())
    del record["command"], record["recipe"]["output_dir"]
    # Each node has a teacher of its own; on one node this is no choice.
    sizes = record["plan"].pop("bytes")
    record["plan"]["bytes"] = {k: v for k, v in sizes.items() if not k.startswith("teacher")}
    for changing in ("of", "host", "total"):
        del record["plan"][changing]
    del record["recipe"]["teacher_sharded_over"]
    record["chosen"].pop("teacher_sharded_over", None)
    return record | {"chosen": sorted(record["chosen"])}


def check_same_run(one: Path, other: Path) -> None:
    """The same settings in run.json, the same losses and the same weights, to the last bit."""
    first, second = (settings(run) for run in (one, other))
    assert first == second
    logs = [
        json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (one, other)
    ]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    files = [(run / "model.safetensors").read_bytes() for run in (one, other)]
    assert len({hashlib.sha256(content).digest() for content in files}) == 1
