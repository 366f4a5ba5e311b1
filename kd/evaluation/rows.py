"""Held-out rows, encoded exactly as training encodes them, each with its source and its bytes.

With `rolling` text is encoded as lm-evaluation-harness does instead: every token is predicted, the
first one too, and a long text in windows.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kd.data.encoding import IGNORE_INDEX, EncodedRow, EncodingReport, encode_rows
from kd.data.sources import load_rows
from kd.distributed import print_rank0


@dataclass(frozen=True)
class HeldoutRow:
    source: str
    index: int  # among the rows drawn from the source, dropped ones counted
    windows: list[EncodedRow]  # one, where the row is not longer than max_length
    bytes: int | None  # UTF-8 bytes of the target text; None for chat

    @property
    def kind(self) -> str:
        return "chat" if self.bytes is None else "text"

    @property
    def targets(self) -> int:
        return sum(window.targets for window in self.windows)


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
    raw: dict[str, list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rolling: bool = False,
) -> list[HeldoutRow]:
    """All rows that have a target; how many were cut or dropped is printed for each source."""
    heldout = []
    for label, rows in raw.items():
        if rolling:
            heldout += rolling_rows(label, rows, tokenizer, max_length)
            rows = [row if "messages" in row else {} for row in rows]  # indices stay
            if not any(rows):
                continue
        chosen = [i for i, row in enumerate(rows) if row]
        rows = [rows[i] for i in chosen]
        encoded, report = encode_rows(rows, tokenizer, max_length, progress=False)
        print_rank0(f"{label}: {report}")
        kept = kept_indices(rows, tokenizer, max_length, report)
        sizes = iter(target_bytes([rows[i] for i in kept], encoded, tokenizer))
        for i, row in zip(kept, encoded, strict=True):
            heldout.append(HeldoutRow(label, chosen[i], [row], next(sizes)))
    return heldout


def rolling_rows(
    label: str, rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[HeldoutRow]:
    """The text rows of a source, every token a target; the empty ones are left out."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = {i: row["text"] for i, row in enumerate(rows) if "text" in row}
    batch = tokenizer(list(texts.values()), verbose=False)["input_ids"] if texts else []
    found = []
    for (i, text), ids in zip(texts.items(), batch, strict=True):
        if ids[:1] == [prefix]:  # the tokenizer writes it itself
            ids = ids[1:]
        if ids:
            windows = rolling_windows(ids, prefix, max_length)
            found.append(HeldoutRow(label, i, windows, len(text.encode())))
    if texts:
        windows = sum(len(row.windows) for row in found)
        print_rank0(f"{label}: {len(texts)} texts read, {len(found)} kept, {windows} windows")
    return found


def rolling_windows(ids: list[int], prefix: int, max_length: int) -> list[EncodedRow]:
    """Windows of at most max_length tokens in which each of `ids` is predicted once.

    A window's first token is its context; the last window reaches back so far that it is full.
    lm-evaluation-harness: `get_rolling_token_windows` with max_seq_len = max_length - 1 and
    context_len = 1.
    """
    sequence, predicted, windows = [prefix, *ids], 0, []
    while predicted < len(ids):
        end = min(predicted + max_length - 1, len(ids))
        start = max(end - (max_length - 1), 0)
        context = [IGNORE_INDEX] * (predicted + 1 - start)
        windows.append(EncodedRow(sequence[start : end + 1], context + ids[predicted:end]))
        predicted = end
    return windows


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
