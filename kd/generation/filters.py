"""Raw answers to training rows: a pure function of raw.jsonl and of the samples that are wanted."""

import json
from dataclasses import dataclass
from pathlib import Path

from kd.generation.sampling import Sample


@dataclass
class FilterReport:
    """What happened to the samples; printed, and left in done.json."""

    samples: int = 0
    kept: int = 0
    empty: int = 0
    cut: int = 0
    duplicate: int = 0

    def __str__(self) -> str:
        return (
            f"samples: {self.samples}, kept {self.kept}; dropped {self.empty} empty, {self.cut} "
            f"cut at max_new_tokens, {self.duplicate} exact duplicates"
        )


def training_rows(samples: list[Sample], raw: dict[str, dict]) -> tuple[list[dict], FilterReport]:
    """Rows {"messages": [...]} in the order of `samples`, without the hidden system prompt.

    Raises ValueError where no row is left.
    """
    rows, seen, report = [], set(), FilterReport(samples=len(samples))
    for sample in samples:
        found = raw[sample.key]
        messages = [*sample.prompt, {"role": "assistant", "content": found["answer"]}]
        text = json.dumps(messages)
        if not found["stopped"]:
            report.cut += 1
        elif not found["answer"].strip():
            report.empty += 1
        elif text in seen:
            report.duplicate += 1
        else:
            seen.add(text)
            rows.append({"messages": messages})
    report.kept = len(rows)
    if not rows:
        raise ValueError(
            f"no training row is left ({report}). Look at raw.jsonl; where all are cut, raise "
            "max_new_tokens, or the model has not learnt to stop"
        )
    return rows, report


def write_rows(path: Path, rows: list[dict]) -> None:
    """Written aside and renamed, so that the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.rename(path)
