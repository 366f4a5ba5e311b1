"""The JSON file of one model's measurement: settings, versions, means and the sums of every row."""

import json
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from kd.evaluation.likelihood import AGREEMENT
from kd.evaluation.models import EvaluationSettings, fingerprint
from kd.evaluation.rows import HeldoutRow, text_hash
from kd.training.checkpoint import commit

PACKAGES = ("torch", "transformers", "peft")


def describe(
    settings: EvaluationSettings, path: str, rows: str, tokenizer, **more: str
) -> dict[str, object]:
    """All that a figure depends on; a result with an equal description is not measured again."""
    return {
        "model": path,
        "model_files_hash": fingerprint(path),
        "data": settings.sources,
        "rows_hash": rows,
        "mixture_seed": settings.mixture_seed,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
        "device": settings.device,
        "attn_implementation": settings.attn_implementation,
        "vocabulary_hash": text_hash(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat_template_hash": text_hash(tokenizer.chat_template or ""),
        **more,
    }


def is_measured(file: Path, description: dict[str, object]) -> bool:
    """True where `file` was made with this description; says so."""
    if not file.is_file() or json.loads(file.read_text())["settings"] != description:
        return False
    print(f"{file} is measured already with these settings; remove it to measure anew", flush=True)
    return True


def write_result(file: Path, description: dict[str, object], measured: dict[str, object]) -> None:
    """Write settings, versions and figures, whole or not at all."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    result = {"settings": description, "versions": versions, "commit": commit(), **measured}
    write_text(file, json.dumps(result) + "\n")


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(file)


def likelihood_result(rows: list[HeldoutRow], sums: Tensor) -> dict[str, object]:
    """Perplexity and bits per byte of sums (R, 1) in nats: by source, by kind, overall, by row."""
    records = [
        {
            "source": row.source,
            "kind": row.kind,
            "index": row.index,
            "tokens": row.encoded.targets,
            "nats": nats,
            "bytes": row.bytes,
        }
        for row, (nats,) in zip(rows, sums.tolist(), strict=True)
    ]
    return grouped(records, likelihood_means)


def agreement_result(rows: list[HeldoutRow], sums: Tensor) -> dict[str, object]:
    """Means a target token of sums (R, F) in the order of AGREEMENT, and the sums by row."""
    records = [
        {
            "source": row.source,
            "kind": row.kind,
            "index": row.index,
            "tokens": row.encoded.targets,
            **dict(zip(AGREEMENT, values, strict=True)),
        }
        for row, values in zip(rows, sums.tolist(), strict=True)
    ]
    return grouped(records, agreement_means)


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
