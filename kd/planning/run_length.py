"""The length of a whole run: rows, steps, hours and tokens."""

from pathlib import Path

from kd.planning.throughput import Duration
from kd.settings.distillation import DataSettings
from kd.settings.training import TrainingSettings


def count_rows(data: DataSettings) -> int | None:
    """The number of rows before packing; None if a source would have to be read for it."""
    counts = []
    for source in data.sources:
        path = source["path"]
        if "count" in source:
            counts.append(source["count"])
        elif path.endswith(".jsonl") and Path(path).is_file():
            with open(path, encoding="utf-8") as file:
                counts.append(sum(bool(line.strip()) for line in file))
        else:
            return None
    return min(sum(counts), data.train_rows or sum(counts))


def describe_run(training: TrainingSettings, time: Duration, rows: int | None) -> str:
    """One line with steps, hours and tokens of a run over `rows` rows."""
    steps = training.max_steps
    if steps <= 0 and rows is None:
        return "run: hours unknown, because a source states no count; give the number with --rows"
    if steps <= 0:
        steps = max(1, round(training.num_train_epochs * rows / training.global_batch_size))
    hours, tokens = steps * time.step / 3600, steps * time.tokens
    return f"run: {steps} steps, {hours:.1f} hours, at most {tokens / 1e6:.1f} M tokens (full rows)"
