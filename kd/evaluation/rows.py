"""Held-out rows, encoded as in training, each with its source and its number of bytes.

With `rolling`, text is encoded as in lm-evaluation-harness: every token is predicted, including the
first, a control token in the text counts as one, and a long text is split into windows.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kd.data.control_tokens import ControlTokens
from kd.data.encoding import (
    IGNORE_INDEX,
    EncodedRow,
    EncodingReport,
    count_rows,
    encode_each,
    require_rows,
)
from kd.data.sources import load_rows
from kd.distributed import print_rank0


@dataclass(frozen=True)
class HeldoutRow:
    """One held-out row, in one window or, if rolling, in several."""

    source: str
    index: int  # among the rows drawn from the source; dropped rows count
    windows: list[EncodedRow]
    bytes: int | None  # UTF-8 bytes of the target text; None for chat

    @property
    def kind(self) -> str:
        """The kind of the row: chat or text."""
        return "chat" if self.bytes is None else "text"

    @property
    def targets(self) -> int:
        """The number of target tokens."""
        return sum(window.targets for window in self.windows)


def load_sources(sources: list[dict], seed: int) -> dict[str, list[dict]]:
    """Load the rows of every source: {label: rows in the form of `kd.data.sources`}.

    Raises ValueError on an unknown key of a source and on a row that cannot be read.
    """
    return {
        label: load_rows([source], seed)
        for label, source in zip(source_labels(sources), sources, strict=True)
    }


def source_labels(sources: list[dict]) -> list[str]:
    """Return a short name for each source: the file's stem, or the data set with its split."""
    names = []
    for source in sources:
        path = source["path"]
        hub = [path, source.get("name"), source.get("split")]
        names.append(Path(path).stem if Path(path).is_file() else ":".join(filter(None, hub)))
    double = {name for name, times in Counter(names).items() if times > 1}
    return [f"{name}#{i}" if name in double else name for i, name in enumerate(names, 1)]


def rows_hash(raw: dict[str, list[dict]]) -> str:
    """Hash raw rows: two measurements with equal hashes read the same rows."""
    return text_hash(json.dumps(raw, sort_keys=True))


def text_hash(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_heldout(
    raw: dict[str, list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    rolling: bool = False,
    control_tokens: str = "split",
) -> list[HeldoutRow]:
    """Encode all rows that have a target, and print how many were truncated or dropped.

    `control_tokens` is that of `kd.data.encoding.Encoder`; rolling text always keeps them.
    Raises ValueError if a source has no row with a target.
    """
    heldout = []
    for label, rows in raw.items():
        if rolling:
            heldout += rolling_rows(label, rows, tokenizer, max_length)
            rows = [row if "messages" in row else {} for row in rows]  # keep the indices
            if not any(rows):
                continue
        chosen = [i for i, row in enumerate(rows) if row]
        rows = [rows[i] for i in chosen]
        results = encode_each(rows, tokenizer, max_length, control_tokens=control_tokens)
        report = EncodingReport()
        encoded = count_rows(results, report)
        require_rows(report)
        print_rank0(f"{label}: {report}")
        kept = [i for i, result in enumerate(results) if isinstance(result, EncodedRow)]
        kept_rows = [rows[i] for i in kept]
        sizes = target_bytes(kept_rows, encoded, tokenizer, control_tokens)
        for i, row, size in zip(kept, encoded, sizes, strict=True):
            heldout.append(HeldoutRow(label, chosen[i], [row], size))
    return heldout


def rolling_rows(
    label: str, rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[HeldoutRow]:
    """Encode the text rows of a source with every token as a target; skip empty texts."""
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = {i: row["text"] for i, row in enumerate(rows) if "text" in row}
    batch = tokenizer(list(texts.values()), verbose=False)["input_ids"] if texts else []
    found = []
    for (i, text), ids in zip(texts.items(), batch, strict=True):
        if ids[:1] == [prefix]:  # the tokenizer adds it itself
            ids = ids[1:]
        if ids:
            windows = rolling_windows(ids, prefix, max_length)
            found.append(HeldoutRow(label, i, windows, len(text.encode())))
    if texts:
        windows = sum(len(row.windows) for row in found)
        print_rank0(f"{label}: {len(texts)} texts read, {len(found)} kept, {windows} windows")
    return found


def rolling_windows(ids: list[int], prefix: int, max_length: int) -> list[EncodedRow]:
    """Split `ids` into windows of at most max_length tokens that predict each token once.

    The first token of a window is context; the last window starts early enough to be full. Equals
    lm-evaluation-harness's `get_rolling_token_windows` with max_seq_len = max_length - 1 and
    context_len = 1.
    """
    sequence, predicted, windows = [prefix, *ids], 0, []
    while predicted < len(ids):
        end = min(predicted + max_length - 1, len(ids))
        start = max(end - (max_length - 1), 0)
        context = [IGNORE_INDEX] * (predicted + 1 - start)
        labels = context + ids[predicted:end]
        windows.append(EncodedRow.from_labels(sequence[start : end + 1], labels))
        predicted = end
    return windows


def target_bytes(
    rows: list[dict],
    encoded: list[EncodedRow],
    tokenizer: PreTrainedTokenizerBase,
    control_tokens: str = "split",
) -> list[int | None]:
    """Return the UTF-8 bytes of every text row's target tokens; None for chat rows.

    The first token, which is not predicted, and truncated text do not count. The end-of-sequence
    token has no bytes.
    """
    split = ControlTokens(tokenizer, control_tokens)  # as `Encoder` encodes texts
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
        spans = next(offsets)
        if split.found_in(row["text"]):
            spans = split.encode_text(row["text"]).offsets
        spans = spans[: len(ids)]
        start = spans[0][1] if spans else 0
        end = max((right for _, right in spans), default=0)
        sizes.append(len(row["text"][start:end].encode()))
    return sizes
