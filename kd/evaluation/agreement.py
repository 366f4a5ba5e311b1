"""Agreement of models with a teacher on held-out rows: divergences, top-1 and calibration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kd.data.tokenizer import check_same_tokenizer
from kd.distributed import print_rank0, start_gloo
from kd.evaluation.likelihood import AGREEMENT, Sums, make_batches, row_sums, teacher_states
from kd.evaluation.models import fingerprint, model_for, tokenizer_for
from kd.evaluation.results import (
    describe,
    grouped,
    is_measured,
    likelihood_result,
    likelihood_text,
    missing_results,
    row_record,
    write_result,
)
from kd.evaluation.rows import HeldoutRow, encode_heldout, load_sources, rows_hash
from kd.settings.evaluation import EvaluationSettings


@dataclass(frozen=True)
class Measured:
    """The sums of one model against the teacher, and the result file they belong to."""

    name: str
    path: str
    file: Path
    description: dict[str, object]
    rows: list[HeldoutRow]
    rows_hash: str
    sums: Sums


def measure_against_teacher(
    settings: EvaluationSettings, teacher: str, folder: Path
) -> Iterator[Measured]:
    """Run the teacher once, then yield every model whose result is missing in `folder`.

    The teacher's hidden states at the target tokens stay in memory. All models share the teacher's
    tokenizer and chat template. Raises ValueError if a tokenizer differs.
    """
    tokenizer = tokenizer_for(settings, teacher)
    for path in settings.named_models.values():
        check_same_tokenizer(tokenizer, tokenizer_for(settings, path))
    raw = load_sources(settings.sources, settings.mixture_seed)
    start_gloo()
    identity = {"teacher": teacher, "teacher_files_hash": fingerprint(teacher)}
    missing = missing_results(settings, folder, rows_hash(raw), tokenizer, **identity)
    if not missing:
        return
    in_text = settings.control_tokens_in_text
    rows = encode_heldout(raw, tokenizer, settings.max_length, control_tokens=in_text)
    batches = make_batches(rows, tokenizer.pad_token_id, settings.batch_size)
    states = teacher_states(model_for(settings, teacher), batches, len(tokenizer))
    for name, (file, description) in missing.items():
        path = settings.named_models[name]
        model = model_for(settings, path)
        sums = row_sums(model, batches, len(tokenizer), states, description=name)
        del model  # free its memory before the next one is loaded
        yield Measured(name, path, file, description, rows, rows_hash(raw), sums)


def write_perplexities(
    settings: EvaluationSettings, measured: Measured, models: dict[str, str], folder: Path
) -> None:
    """Write the files of eval/perplexity.py from the cross-entropies that were measured anyway.

    `models`: {name: path} of the measured model, and of the teacher if its file is wanted. A model
    with another chat template is skipped: eval/perplexity.py would read other rows.
    """
    for name, path in models.items():
        column = "cross_entropy" if name == measured.name else "teacher_cross_entropy"
        file = folder / f"{name}.json"
        tokenizer = tokenizer_for(settings, path)
        description = describe(settings, path, measured.rows_hash, tokenizer, rolling=False)
        result = likelihood_result(measured.rows, measured.sums.rows[:, AGREEMENT.index(column)])
        same = description["chat_template_hash"] == measured.description["chat_template_hash"]
        if same and not is_measured(file, description, quiet=True):
            write_result(file, description, result)
            print_rank0(f"{likelihood_text(name, result)}\nwrote {file}")


def agreement_result(rows: list[HeldoutRow], sums: Sums) -> dict[str, object]:
    """Return means per target token by source, kind and position, calibration, and row sums."""
    records = [
        row_record(row) | dict(zip(AGREEMENT, values, strict=True))
        for row, values in zip(rows, sums.rows.tolist(), strict=True)
    ]
    return {
        "places": place_means(sums.places),
        "calibration": calibration(sums.calibration[0]),
        "teacher_calibration": calibration(sums.calibration[1]),
        **grouped(records, agreement_means),
    }


def agreement_text(name: str, result: dict) -> str:
    """Format the divergences and agreements of a result, one line for each source."""
    lines = [
        f"{name}, {source}: KL(teacher || student) {means['forward_kl']:.4g}, KL(student || "
        f"teacher) {means['reverse_kl']:.4g} nats per token; top-1 agreement "
        f"{means['top1_agreement']:.1%}, in the student's top five {means['top5_overlap']:.1%}"
        for source, means in [*result["sources"].items(), ("overall", result["overall"])]
    ]
    error = result["calibration"]["expected_error"]
    return "\n".join([*lines, f"{name}: expected calibration error {error:.3f}"])


def place_means(places: Tensor) -> dict[str, dict[str, float]]:
    """Return the means by position in the row: "4-7" for the fourth to the seventh target.

    `places` (PLACE_BINS, 1 + M). Bins without tokens are left out.
    """
    means = {}
    for b, (tokens, *values) in enumerate(places.tolist()):
        if tokens:
            label = "1" if b == 0 else f"{2**b}-{2 ** (b + 1) - 1}"
            metrics = {n: v / tokens for n, v in zip(AGREEMENT, values, strict=True)}
            means[label] = {"tokens": int(tokens), **metrics}
    return means


def calibration(bins: Tensor) -> dict[str, object]:
    """Return the expected calibration error, and confidence and accuracy by confidence bin.

    `bins` (CONFIDENCE_BINS, 3): tokens, summed confidence and number of correct top tokens.
    expected_error = sum over bins of n / N * |accuracy - confidence|. Guo et al. 2017, equation 3.
    """
    table = [
        {"tokens": int(n), "confidence": confidence / n, "right": right / n}
        for n, confidence, right in bins.tolist()
        if n
    ]
    tokens = sum(b["tokens"] for b in table)
    error = math.fsum(b["tokens"] * abs(b["right"] - b["confidence"]) for b in table) / tokens
    return {"expected_error": error, "bins": table}


def agreement_means(records: list[dict]) -> dict[str, float]:
    """Return the mean of every metric per target token."""
    tokens = sum(record["tokens"] for record in records)
    means = {name: math.fsum(record[name] for record in records) / tokens for name in AGREEMENT}
    return {"tokens": tokens, **means}
