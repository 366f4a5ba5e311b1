"""Write the greedy answers of several models to the same held-out prompts, side by side.

python eval/answers.py --models teacher=runs/teacher student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --count 8 --out results/answers.jsonl

A prompt is the messages of a chat row before its first assistant turn; the reference is that turn.
With --out_dir, the share of answers that contain the reference is written to
OUT_DIR/open_answers/NAME.json, and the input files for eval/judge.py to OUT_DIR/open_answers/judge.
"""

from pathlib import Path

from kd.data.sources import check_sources, load_rows
from kd.recipe import all_mistakes, parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import AnswerSettings, HeldoutSettings


def main() -> None:
    with all_mistakes():
        settings, answering = parse(HeldoutSettings, AnswerSettings, description=__doc__)
        check_sources(settings.sources)
    check_writable("out", Path(answering.out).parent)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.answers import (
        answer_prompts,
        select_prompts_with_references,
        write_jsonl,
        write_judge_files,
    )

    raw = load_rows(settings.sources, settings.mixture_seed)
    rows = select_prompts_with_references(raw, answering.count)
    answers = {
        name: answer_prompts(settings, answering, name, path, rows)
        for name, path in settings.named_models.items()
    }
    if answering.out_dir:
        write_judge_files(Path(answering.out_dir) / "open_answers" / "judge", rows, answers)
    for i, row in enumerate(rows):
        row["answers"] = {name: texts[i] for name, texts in answers.items()}
    write_jsonl(Path(answering.out), rows)
    print(f"wrote {answering.out}")


if __name__ == "__main__":
    run(main)
