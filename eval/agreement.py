"""Measure how near students' distributions are to their teacher's at held-out target tokens.

python eval/agreement.py --teacher runs/teacher --models student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

Kullback-Leibler divergence both ways in nats a token, equal most probable tokens, the teacher's
most probable token among the student's five, both cross-entropies, by source and by place in the
row, and how well each model knows when it is right; one file a model, OUT_DIR/agreement/NAME.json.
The teacher runs once for all models: its hidden states at the target tokens wait in memory.
`launch/PROFILE.sh eval/agreement.py ...` shares the work between processes. What eval/perplexity.py
would measure is found on the way, and written as its files.
"""

from dataclasses import dataclass
from pathlib import Path

from kd.data.tokenizer import check_same_tokenizer
from kd.distributed import print_rank0, start_gloo
from kd.evaluation.likelihood import AGREEMENT, make_batches, row_sums, teacher_states
from kd.evaluation.models import EvaluationSettings, check_path, fingerprint
from kd.evaluation.results import (
    agreement_result,
    describe,
    is_measured,
    likelihood_result,
    likelihood_text,
    missing_results,
    write_result,
)
from kd.evaluation.rows import encode_heldout, load_sources, rows_hash
from kd.recipe import parse, setting
from kd.run.exit import run


@dataclass
class AgreementSettings:
    teacher: str = setting("", "hub name or folder of the model that is compared with")
    teacher_name: str = setting("teacher", "its name in the results of perplexity")
    out_dir: str = setting("results", "folder of the results; agreement/NAME.json in it")

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("teacher: not given; wanted a hub name or a folder")
        check_path("teacher", self.teacher)


def main() -> None:
    settings, agreement = parse(EvaluationSettings, AgreementSettings, description=__doc__)
    tokenizer = settings.tokenizer(agreement.teacher)  # its template is every model's here
    for path in settings.named_models.values():
        check_same_tokenizer(tokenizer, settings.tokenizer(path))
    raw = load_sources(settings.sources, settings.mixture_seed)
    start_gloo()
    folder = Path(agreement.out_dir) / "agreement"
    teacher = {"teacher": agreement.teacher, "teacher_files_hash": fingerprint(agreement.teacher)}
    wanted = missing_results(settings, folder, rows_hash(raw), tokenizer, **teacher)
    if not wanted:
        return
    rows = encode_heldout(raw, tokenizer, settings.max_length)
    batches = make_batches(rows, tokenizer.pad_token_id, settings.batch_size)
    states = teacher_states(settings.load(agreement.teacher), batches, len(tokenizer))
    for name, (file, description) in wanted.items():
        model = settings.load(settings.named_models[name])
        sums = row_sums(model, batches, len(tokenizer), states, description=name)
        del model  # before the next one is loaded
        # The agreement's file last: it says that the model is done.
        measured = {name: (settings.named_models[name], "cross_entropy")}
        if agreement.teacher_name not in settings.named_models:
            measured[agreement.teacher_name] = (agreement.teacher, "teacher_cross_entropy")
        for who, (path, column) in measured.items():
            target = Path(agreement.out_dir) / "perplexity" / f"{who}.json"
            own = describe(settings, path, rows_hash(raw), settings.tokenizer(path), rolling=False)
            result = likelihood_result(rows, sums.rows[:, AGREEMENT.index(column)])
            if own["chat_template_hash"] == description["chat_template_hash"]:
                write_likelihood(who, target, own, result)
        result = agreement_result(rows, sums)
        write_result(file, description, result)
        show(name, result, file)


def write_likelihood(name: str, file: Path, description: dict, result: dict) -> None:
    """The file of eval/perplexity.py, which would have read the same rows."""
    if not is_measured(file, description, quiet=True):
        write_result(file, description, result)
        print_rank0(f"{likelihood_text(name, result)}\nwrote {file}")


def show(name: str, result: dict, file: Path) -> None:
    for source, means in [*result["sources"].items(), ("overall", result["overall"])]:
        print_rank0(
            f"{name}, {source}: KL(teacher || student) {means['forward_kl']:.4g}, KL(student || "
            f"teacher) {means['reverse_kl']:.4g} nats a token; top-1 agreement "
            f"{means['top1_agreement']:.1%}, in the five first {means['top5_overlap']:.1%}"
        )
    error = result["calibration"]["expected_error"]
    print_rank0(f"{name}: expected calibration error {error:.3f}\nwrote {file}")


if __name__ == "__main__":
    run(main)
