"""The JSON file of one model's measurement: settings, versions, means and the sums of every row."""

import json
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.distributed import print_rank0, rank
from kd.evaluation.models import fingerprint
from kd.evaluation.rows import HeldoutRow, text_hash
from kd.run import atomic
from kd.run.finished import read_json
from kd.run.run_record import commit
from kd.settings.evaluation import EvaluationSettings, HeldoutSettings, ModelSelection

PACKAGES = ("torch", "transformers", "peft")


def describe(
    settings: HeldoutSettings,
    path: str,
    rows: str,
    tokenizer: PreTrainedTokenizerBase,
    **more: object,
) -> dict[str, object]:
    """Describe a measurement on held-out rows; `rows` is the hash of the rows."""
    return describe_model(
        settings,
        path,
        tokenizer,
        rows_hash=rows,
        **settings.rows_read,
        **more,
    )


def describe_model(
    settings: ModelSelection, path: str, tokenizer: PreTrainedTokenizerBase, **more: object
) -> dict[str, object]:
    """Describe everything that a measurement depends on; equal descriptions are measured once."""
    return {
        "model": path,
        "model_files_hash": fingerprint(path),
        "dtype": settings.weights_dtype,
        "device": settings.device,
        "attn_implementation": settings.attn_implementation,
        "vocabulary_hash": text_hash(json.dumps(sorted(tokenizer.get_vocab().items()))),
        "chat_template_hash": text_hash(tokenizer.chat_template or ""),
        **more,
    }


def is_measured(file: Path, description: dict[str, object], quiet: bool = False) -> bool:
    """Whether `file` holds a measurement with this description; prints it unless `quiet`."""
    if read_json(file, "remove it to measure again").get("settings") != description:
        return False
    if not quiet:
        print_rank0(f"{file} is measured already with these settings; remove it to measure again")
    return True


def missing_results(
    settings: EvaluationSettings,
    folder: Path,
    rows: str,
    tokenizer: PreTrainedTokenizerBase,
    **more: object,
) -> dict[str, tuple[Path, dict]]:
    """Return {name: (file, description)} of the models without a result of these settings."""
    missing = {}
    for name, path in settings.named_models.items():
        file = folder / f"{name}.json"
        description = describe(settings, path, rows, tokenizer, **more)
        if not is_measured(file, description):
            missing[name] = (file, description)
    return missing


def write_result(file: Path, description: dict[str, object], measured: dict[str, object]) -> None:
    """Write settings, versions and metrics atomically; only rank 0 writes."""
    if rank():
        return
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    result = {"settings": description, "versions": versions, "commit": commit(), **measured}
    write_text(file, json.dumps(result) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, and create its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, text, file.with_name(f"{file.name}.tmp{os.getpid()}"))


def row_record(row: HeldoutRow) -> dict[str, object]:
    """Return the fields that identify a held-out row in a result file."""
    return {"source": row.source, "kind": row.kind, "index": row.index, "tokens": row.targets}


def likelihood_result(rows: list[HeldoutRow], nats: Tensor) -> dict[str, object]:
    """Return perplexity and bits per byte by source, by kind and overall, and every row's sums.

    `nats` (R,): negative log-likelihood of every row.
    """
    records = [
        row_record(row) | {"nats": value, "bytes": row.bytes}
        for row, value in zip(rows, nats.tolist(), strict=True)
    ]
    return grouped(records, likelihood_means)


def likelihood_text(name: str, result: dict) -> str:
    """Format the perplexities of a result, one line for each source."""
    lines = []
    for source, means in [*result["sources"].items(), ("overall", result["overall"])]:
        bits = means["bits_per_byte"]
        lines.append(
            f"{name}, {source}: perplexity {means['perplexity']:.4g} over {means['tokens']} tokens"
            + ("" if bits is None else f", {bits:.4g} bits per byte of text")
        )
    return "\n".join(lines)


def grouped(records: list[dict], means: Callable[[list[dict]], dict]) -> dict[str, object]:
    """Apply `means` to the records of every source, of every kind and overall."""

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
    """Return perplexity over all target tokens, and bits per byte over text rows.

    bits per byte = nats / ln 2 / bytes. Unlike perplexity, it compares between tokenizers. It is
    None without text rows.
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
