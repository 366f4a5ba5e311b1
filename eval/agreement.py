"""Measure how closely students' distributions match their teacher's at held-out target tokens.

python eval/agreement.py --teacher runs/teacher --models student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

The script measures both KL divergences, top-1 agreement, both cross-entropies and calibration, for
each source and by position in the row. The result of each model is OUT_DIR/agreement/NAME.json. The
perplexity results of all models are written as well, because they follow from the cross-entropies.
The teacher runs once: its hidden states at the target tokens stay in memory. With a launch file in
front, the processes share the batches.
"""

from pathlib import Path

from kd.data.sources import check_sources
from kd.distributed import print_rank0
from kd.recipe import all_mistakes, parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import AgreementSettings, EvaluationSettings


def main() -> None:
    with all_mistakes():
        settings, agreement = parse(EvaluationSettings, AgreementSettings, description=__doc__)
        check_sources(settings.sources)
    check_writable("out_dir", agreement.out_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.agreement import (
        agreement_result,
        agreement_text,
        measure_against_teacher,
        write_perplexities,
    )
    from kd.evaluation.results import write_result

    out_dir = Path(agreement.out_dir)
    teacher = {agreement.teacher_name: agreement.teacher}
    if agreement.teacher_name in settings.named_models:
        teacher = {}  # its perplexity is measured under this name as one of the models
    for measured in measure_against_teacher(settings, agreement.teacher, out_dir / "agreement"):
        models = {measured.name: measured.path} | teacher
        write_perplexities(settings, measured, models, out_dir / "perplexity")
        # The agreement's file last: it marks the model as measured.
        result = agreement_result(measured.rows, measured.sums)
        write_result(measured.file, measured.description, result)
        print_rank0(f"{agreement_text(measured.name, result)}\nwrote {measured.file}")


if __name__ == "__main__":
    run(main)
