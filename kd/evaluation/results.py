"""The JSON file of one model's measurement: settings, versions, means and the sums of every row."""

import json
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from kd.distributed import print_rank0, rank
from kd.evaluation.likelihood import AGREEMENT, Sums
from kd.evaluation.models import EvaluationSettings, ModelSelection, fingerprint
from kd.evaluation.rows import HeldoutRow, text_hash
from kd.run.run_record import commit

PACKAGES = ("torch", "transformers", "peft")


def describe(
    settings: EvaluationSettings, path: str, rows: str, tokenizer, **more: object
) -> dict[str, object]:
    """All that a figure on held-out rows depends on."""
    return describe_model(
        settings,
        path,
        tokenizer,
        data=settings.sources,
        rows_hash=rows,
        mixture_seed=settings.mixture_seed,
        max_length=settings.max_length,
        **more,
    )


def describe_model(
    settings: ModelSelection, path: str, tokenizer, **more: object
) -> dict[str, object]:
    """All that a figure depends on; a result with an equal description is not measured again."""
    return {
        "model": path,
        "model_files_hash": fingerprint(path),
        "dtype": settings.dtype,
        "device": settings.device,
        "attn_implementation": settings.attn_implementation,
        "vocabulary_hash": text_hash(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat_template_hash": text_hash(tokenizer.chat_template or ""),
        **more,
    }


def is_measured(file: Path, description: dict[str, object], quiet: bool = False) -> bool:
    """True where `file` was made with this description; says so."""
    if not file.is_file() or json.loads(file.read_text())["settings"] != description:
        return False
    if not quiet:
        print_rank0(f"{file} is measured already with these settings; remove it to measure anew")
    return True


def missing_results(
    settings: EvaluationSettings, folder: Path, rows: str, tokenizer, **more: object
) -> dict[str, tuple[Path, dict]]:
    """{name: (file, description)} of the models that were not measured like this yet."""
    wanted = {}
    for name, path in settings.named_models.items():
        file = folder / f"{name}.json"
        description = describe(settings, path, rows, tokenizer, **more)
        if not is_measured(file, description):
            wanted[name] = (file, description)
    return wanted


def write_result(file: Path, description: dict[str, object], measured: dict[str, object]) -> None:
    """Write settings, versions and figures, whole or not at all; the first process does it."""
    if rank():
        return
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    result = {"settings": description, "versions": versions, "commit": commit(), **measured}
    write_text(file, json.dumps(result) + "\n")


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(file)


def row_record(row: HeldoutRow) -> dict[str, object]:
    return {"source": row.source, "kind": row.kind, "index": row.index, "tokens": row.targets}


def likelihood_result(rows: list[HeldoutRow], nats: Tensor) -> dict[str, object]:
    """Perplexity and bits per byte of sums (R,) in nats: by source, by kind, overall, by row."""
    records = [
        row_record(row) | {"nats": value, "bytes": row.bytes}
        for row, value in zip(rows, nats.tolist(), strict=True)
    ]
    return grouped(records, likelihood_means)


def likelihood_text(name: str, result: dict) -> str:
    """A line a source of the perplexities, to be printed."""
    lines = []
    for source, means in [*result["sources"].items(), ("overall", result["overall"])]:
        bits = means["bits_per_byte"]
        lines.append(
            f"{name}, {source}: perplexity {means['perplexity']:.4g} over {means['tokens']} tokens"
            + ("" if bits is None else f", {bits:.4g} bits per byte of text")
        )
    return "\n".join(lines)


def agreement_result(rows: list[HeldoutRow], sums: Sums) -> dict[str, object]:
    """Means a target token by source, kind and place, both calibrations, and the sums by row."""
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


def place_means(places: Tensor) -> dict[str, dict[str, float]]:
    """{"4-7": means over the fourth to seventh target of a row}, of the bins that have tokens."""
    means = {}
    for b, (tokens, *values) in enumerate(places.tolist()):
        if tokens:
            label = "1" if b == 0 else f"{2**b}-{2 ** (b + 1) - 1}"
            figures = {n: v / tokens for n, v in zip(AGREEMENT, values, strict=True)}
            means[label] = {"tokens": int(tokens), **figures}
    return means


def calibration(bins: Tensor) -> dict[str, object]:
    """How often the most probable token is right where the model gives it so much probability.

    expected_error = sum over bins of n / N * |right - confidence|. Guo et al. 2017, equation 3.
    """
    table = [
        {"tokens": int(n), "confidence": confidence / n, "right": right / n}
        for n, confidence, right in bins.tolist()
        if n
    ]
    tokens = sum(b["tokens"] for b in table)
    error = math.fsum(b["tokens"] * abs(b["right"] - b["confidence"]) for b in table) / tokens
    return {"expected_error": error, "bins": table}


def grouped(records: list[dict], means: Callable[[list[dict]], dict]) -> dict[str, object]:
    def by(key: str) -> dict[str, dict]:
        names = dict.fromkeys(record[key] for record in records)
        return {name: means([r for r in records if r[key] == name]) for name in names}

    return {
        "sources": by("source"),
        "kinds": by("kind"),
        "overall": means(records),
        "rows": records,
    }


def likelihood_means(records: list[dict]) -> dict[str, float | None]:
    """Perplexity over all target tokens; bits per byte over text rows alone, None without any.

    bits per byte = nats / ln 2 / bytes: comparable between tokenizers, which perplexity is not.
    """
    tokens = sum(record["tokens"] for record in records)
    nats = math.fsum(record["nats"] for record in records)
    text = [record for record in records if record["bytes"] is not None]
    size = sum(record["bytes"] for record in text)
    text_nats = math.fsum(record["nats"] for record in text)
    return {
        "tokens": tokens,
        "nats": nats,
        "bytes": size if text else None,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": text_nats / math.log(2) / size if size else None,
    }


def agreement_means(records: list[dict]) -> dict[str, float]:
    tokens = sum(record["tokens"] for record in records)
    means = {name: math.fsum(record[name] for record in records) / tokens for name in AGREEMENT}
    return {"tokens": tokens, **means}
