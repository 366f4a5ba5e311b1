"""Held-out rows, encoded exactly as training encodes them, each with its source and its bytes."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kd.data.masks import EncodedRow, EncodingReport, encode_rows
from kd.data.sources import load_rows


@dataclass(frozen=True)
class HeldoutRow:
    source: str
    index: int  # among the rows drawn from the source, dropped ones counted
    encoded: EncodedRow
    bytes: int | None  # UTF-8 bytes of the target text; None for chat

    @property
    def kind(self) -> str:
        return "chat" if self.bytes is None else "text"


def load_sources(sources: list[dict], seed: int) -> dict[str, list[dict]]:
    """{label: rows in the form of `kd.data.sources`} of every source."""
    return {
        label: load_rows([source], seed)
        for label, source in zip(labels(sources), sources, strict=True)
    }


def labels(sources: list[dict]) -> list[str]:
    """A short name for each source: the file's stem, or the data set with its split."""
    names = []
    for source in sources:
        path = source["path"]
        hub = [path, source.get("name"), source.get("split")]
        names.append(Path(path).stem if Path(path).is_file() else ":".join(filter(None, hub)))
    double = {name for name, times in Counter(names).items() if times > 1}
    return [f"{name}#{i}" if name in double else name for i, name in enumerate(names, 1)]


def rows_hash(raw: dict[str, list[dict]]) -> str:
    """Equal where two measurements read the same rows."""
    return text_hash(json.dumps(raw, sort_keys=True))


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_heldout(
    raw: dict[str, list[dict]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[HeldoutRow]:
    """All rows that have a target; how many were cut or dropped is printed for each source."""
    heldout = []
    for label, rows in raw.items():
        encoded, report = encode_rows(rows, tokenizer, max_length, progress=False)
        print(f"{label}: {report}", flush=True)
        kept = kept_indices(rows, tokenizer, max_length, report)
        sizes = iter(target_bytes([rows[i] for i in kept], encoded, tokenizer))
        for i, row in zip(kept, encoded, strict=True):
            heldout.append(HeldoutRow(label, i, row, next(sizes)))
    return heldout


def kept_indices(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, report: EncodingReport
) -> list[int]:
    """Indices of the rows that `encode_rows` kept of `rows`, all of which it could encode."""
    if not report.without_target:
        return list(range(len(rows)))

    def has_target(row: dict) -> bool:
        try:
            encode_rows([row], tokenizer, max_length, progress=False)
        except ValueError:  # encoding went well before, so this is "no row with a target token"
            return False
        return True

    return [i for i, row in enumerate(rows) if has_target(row)]


def target_bytes(
    rows: list[dict], encoded: list[EncodedRow], tokenizer: PreTrainedTokenizerBase
) -> list[int | None]:
    """UTF-8 bytes of every text row's target tokens, None for chat rows.

    The bytes of the first token, which nothing predicts, and of what was cut do not count; the
    end-of-sequence token counts none.
    """
    texts = [row["text"] for row in rows if "text" in row]
    offsets = iter(
        tokenizer(texts, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if texts
        else []
    )
    sizes: list[int | None] = []
    for row, ids in zip(rows, encoded, strict=True):
        if "text" not in row:
            sizes.append(None)
            continue
        spans = next(offsets)[: len(ids)]
        start = spans[0][1] if spans else 0
        end = max((right for _, right in spans), default=0)
        sizes.append(len(row["text"][start:end].encode()))
    return sizes
