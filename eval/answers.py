"""Write the greedy answers of several models to the same held-out prompts, side by side.

python eval/answers.py --models teacher=runs/teacher student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --count 8 --out results/answers.jsonl

A prompt is what comes before the first assistant turn of a chat row. eval/report.py shows the file
with --samples.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from kd.data.sources import load_rows
from kd.evaluation.answers import prompts_of, sample_answers
from kd.evaluation.models import EvaluationSettings
from kd.evaluation.results import write_text
from kd.recipe import parse, setting
from kd.training.exit import run


@dataclass
class AnswerSettings:
    count: int = setting(8, "prompts, the first of the data")
    max_new_tokens: int = setting(64, "tokens of an answer at most")
    out: str = setting("results/answers.jsonl", "the file that is written")

    def __post_init__(self) -> None:
        for key in ("count", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted 1 or more")


def main() -> None:
    settings, answering = parse(EvaluationSettings, AnswerSettings, description=__doc__)
    rows = prompts_of(load_rows(settings.sources, settings.mixture_seed), answering.count)
    answers = {
        name: sample_answers(
            settings.load(path),
            settings.tokenizer(path),
            [row["prompt"] for row in rows],
            answering.max_new_tokens,
            name,
        )
        for name, path in settings.named_models.items()
    }
    for i, row in enumerate(rows):
        row["answers"] = {name: texts[i] for name, texts in answers.items()}
    write_text(Path(answering.out), "".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {answering.out}")


if __name__ == "__main__":
    run(main)
