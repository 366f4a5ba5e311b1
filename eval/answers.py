"""Write the greedy answers of several models to the same held-out prompts, side by side.

python eval/answers.py --models teacher=runs/teacher student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --count 8 --out results/answers.jsonl

A prompt is what comes before the first assistant turn of a chat row. eval/report.py shows the file
with --samples. With --out_dir the answers are also compared with the rows' own: sciq without options,
--data '[{"path": "allenai/sciq", "split": "test", "columns": {"prompt": "question", "completion":
"correct_answer"}}]' --count 1000 --out_dir results, writes OUT_DIR/open_answers/NAME.json, and in
open_answers/judge the same answers for eval/judge.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from kd.data.sources import load_rows
from kd.evaluation.answers import for_the_judge, match_result, prompts_of, sample_answers
from kd.evaluation.models import EvaluationSettings
from kd.evaluation.results import describe, is_measured, write_result, write_text
from kd.evaluation.rows import text_hash
from kd.recipe import parse, setting
from kd.run.exit import run

MATCH = "the reference's words in the answer, without case, punctuation and articles"


@dataclass
class AnswerSettings:
    count: int = setting(8, "prompts, the first of the data")
    max_new_tokens: int = setting(64, "tokens of an answer at most")
    out: str = setting("results/answers.jsonl", "the file that is written")
    out_dir: str | None = setting(
        None, "also match the answers with the rows' own: open_answers/NAME.json in this folder"
    )

    def __post_init__(self) -> None:
        for key in ("count", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted 1 or more")


def main() -> None:
    settings, answering = parse(EvaluationSettings, AnswerSettings, description=__doc__)
    raw = load_rows(settings.sources, settings.mixture_seed)
    rows = prompts_of(raw, answering.count)
    answers = {}
    for name, path in settings.named_models.items():
        answers[name] = answer(name, path, settings, answering, rows)
    if answering.out_dir:
        folder = Path(answering.out_dir) / "open_answers" / "judge"
        for name, lines in for_the_judge(rows, answers).items():
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in lines))
    for i, row in enumerate(rows):
        row["answers"] = {name: texts[i] for name, texts in answers.items()}
    write_text(Path(answering.out), "".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {answering.out}")


def answer(
    name: str, path: str, settings: EvaluationSettings, answering: AnswerSettings, rows: list[dict]
) -> list[str]:
    """The model's answers; with out_dir those of its file, where that has them already."""
    tokenizer, file = settings.tokenizer(path), None
    if answering.out_dir:
        file = Path(answering.out_dir) / "open_answers" / f"{name}.json"
        description = describe(
            settings,
            path,
            text_hash(json.dumps(rows)),
            tokenizer,
            max_new_tokens=answering.max_new_tokens,
            match=MATCH,
        )
        if is_measured(file, description):
            return [item["answer"] for item in json.loads(file.read_text())["items"]]
    prompts = [row["prompt"] for row in rows]
    texts = sample_answers(settings.load(path), tokenizer, prompts, answering.max_new_tokens, name)
    if file:
        result = match_result(rows, texts)
        write_result(file, description, result)
        shares = result["overall"]
        print(
            f"{name}: {shares['match']:.1%} of {shares['n']} answers have the reference in them, "
            f"{shares['exact']:.1%} are nothing else\nwrote {file}",
            flush=True,
        )
    return texts


if __name__ == "__main__":
    run(main)
