"""Measure the cost of quantizing a teacher: KL divergence, perplexity and bytes.

python eval/teacher_cost.py --teacher runs/teacher --models awq=runs/teacher-awq \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

The script measures KL(unquantized || quantized) in nats per target token, top-1 agreement, both
perplexities and both checkpoints' bytes. The result of each model is
OUT_DIR/teacher_cost/NAME.json. A student that learns from the quantized teacher alone cannot come
closer to the unquantized one than this.
"""

import math
from pathlib import Path

from kd.data.sources import check_sources
from kd.distributed import print_rank0
from kd.recipe import all_mistakes, parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import EvaluationSettings, TeacherCostSettings


def main() -> None:
    with all_mistakes():
        settings, cost = parse(EvaluationSettings, TeacherCostSettings, description=__doc__)
        check_sources(settings.sources)
    check_writable("out_dir", cost.out_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.agreement import agreement_result, measure_against_teacher
    from kd.evaluation.results import write_result

    folder = Path(cost.out_dir) / "teacher_cost"
    for measured in measure_against_teacher(settings, cost.teacher, folder):
        result = agreement_result(measured.rows, measured.sums)
        for means in [*result["sources"].values(), *result["kinds"].values(), result["overall"]]:
            means["teacher_perplexity"] = math.exp(means["teacher_cross_entropy"])
            means["perplexity"] = math.exp(means["cross_entropy"])
        result["bytes"] = stored_bytes(measured.path)
        result["teacher_bytes"] = stored_bytes(cost.teacher)
        write_result(measured.file, measured.description, result)
        print_rank0(f"{cost_text(measured.name, result)}\nwrote {measured.file}")


def stored_bytes(path: str) -> int:
    from kd.models.tensor_files import TensorFiles
    from kd.pretrained import model_folder

    return TensorFiles(model_folder(path)).total_bytes


def cost_text(name: str, result: dict) -> str:
    size = result["bytes"] / result["teacher_bytes"]
    lines = [f"{name}: {result['bytes']:,} bytes, {size:.1%} of the teacher's"]
    for source, means in [*result["sources"].items(), ("overall", result["overall"])]:
        lines.append(
            f"{name}, {source}: KL(unquantized || {name}) {means['forward_kl']:.4g} nats per "
            f"token; top-1 agreement {means['top1_agreement']:.1%}; perplexity "
            f"{means['teacher_perplexity']:.4g} -> {means['perplexity']:.4g}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
