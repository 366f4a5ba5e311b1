"""Measure what quantising a teacher costs: how far its distributions move, and its perplexity.

python eval/teacher_cost.py --teacher runs/teacher --models awq=runs/teacher-awq \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

KL(unquantised || quantised) in nats a target token, equal most probable tokens, both perplexities,
and both checkpoints' bytes; one file a model, OUT_DIR/teacher_cost/NAME.json. A student can come no
nearer to the unquantised teacher than this by learning from the quantised one alone.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from kd.data.tokenizer import check_same_tokenizer
from kd.distributed import print_rank0, start_gloo
from kd.evaluation.likelihood import make_batches, row_sums, teacher_states
from kd.evaluation.models import EvaluationSettings, check_path, fingerprint
from kd.evaluation.results import agreement_result, missing_results, write_result
from kd.evaluation.rows import encode_heldout, load_sources, rows_hash
from kd.models.sharding import checkpoint_folder
from kd.models.tensor_files import TensorFiles
from kd.recipe import parse, setting
from kd.run.exit import run


@dataclass
class CostSettings:
    teacher: str = setting("", "hub name or folder of the unquantised teacher")
    out_dir: str = setting("results", "folder of the results; teacher_cost/NAME.json in it")

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("teacher: not given; wanted a hub name or a folder")
        check_path("teacher", self.teacher)


def main() -> None:
    settings, cost = parse(EvaluationSettings, CostSettings, description=__doc__)
    tokenizer = settings.tokenizer(cost.teacher)
    for path in settings.named_models.values():
        check_same_tokenizer(tokenizer, settings.tokenizer(path))
    raw = load_sources(settings.sources, settings.mixture_seed)
    start_gloo()
    teacher = {"teacher": cost.teacher, "teacher_files_hash": fingerprint(cost.teacher)}
    folder = Path(cost.out_dir) / "teacher_cost"
    wanted = missing_results(settings, folder, rows_hash(raw), tokenizer, **teacher)
    if not wanted:
        return
    rows = encode_heldout(raw, tokenizer, settings.max_length)
    batches = make_batches(rows, tokenizer.pad_token_id, settings.batch_size)
    states = teacher_states(settings.load(cost.teacher), batches, len(tokenizer))
    for name, (file, description) in wanted.items():
        path = settings.named_models[name]
        model = settings.load(path)
        sums = row_sums(model, batches, len(tokenizer), states, description=name)
        del model  # before the next one is loaded
        result = agreement_result(rows, sums)
        for means in [*result["sources"].values(), *result["kinds"].values(), result["overall"]]:
            means["teacher_perplexity"] = math.exp(means["teacher_cross_entropy"])
            means["perplexity"] = math.exp(means["cross_entropy"])
        result["bytes"] = stored_bytes(path)
        result["teacher_bytes"] = stored_bytes(cost.teacher)
        write_result(file, description, result)
        show(name, result, file)


def stored_bytes(path: str) -> int:
    return TensorFiles(checkpoint_folder(path)).total_bytes


def show(name: str, result: dict, file: Path) -> None:
    size = result["bytes"] / result["teacher_bytes"]
    print_rank0(f"{name}: {result['bytes']:,} bytes, {size:.1%} of the teacher's")
    for source, means in [*result["sources"].items(), ("overall", result["overall"])]:
        print_rank0(
            f"{name}, {source}: KL(unquantised || {name}) {means['forward_kl']:.4g} nats a token; "
            f"top-1 agreement {means['top1_agreement']:.1%}; perplexity "
            f"{means['teacher_perplexity']:.4g} -> {means['perplexity']:.4g}"
        )
    print_rank0(f"wrote {file}")


if __name__ == "__main__":
    run(main)
