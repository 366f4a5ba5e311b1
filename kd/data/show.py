"""Show rows to the user: decoded text with marked targets, and a summary in rows.json."""

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd.data.alignment import NO_SEGMENT, AlignedRow
from kd.data.encoding import EncodedRow
from kd.data.tokenised_rows import TokenisedRows

BEGIN, END = "[[", "]]"  # around targets
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def shown_rows(
    rows: TokenisedRows,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    teacher: PreTrainedTokenizerBase | None = None,
) -> str:
    """Return the text of `count` rows, evenly spaced over the mixture, with marked targets.

    With `teacher`, the tokenizer of a teacher to which the rows are aligned, also what it reads and
    the segments that are compared.
    """
    count = min(count, len(rows))
    parts = [f"targets are between {BEGIN} and {END}, which are not part of the data"]
    for i in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist():
        for number, document in enumerate(rows[i], 1):
            which = f", document {number} of {len(rows[i])}" if rows.bins else ""
            parts.append(
                f"--- row {i} of {len(rows)}{which}: {len(document)} tokens, "
                f"{document.targets} targets\n{marked(document, tokenizer)}"
            )
            if teacher:
                parts.append(shown_alignment(document, tokenizer, teacher))
    return "\n".join(parts)


def shown_alignment(
    row: AlignedRow, ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> str:
    """Return what the teacher reads, and each segment's tokens: student's = teacher's."""
    sides = [(row.input_ids, row.segments, ours), (row.teacher_ids, row.teacher_segments, theirs)]
    found: list[list[str]] = [[], []]
    for i in range(int(row.segments.max(initial=NO_SEGMENT)) + 1):
        for (ids, segments, tokenizer), shown in zip(sides, found, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(ids[segments == i].tolist())
            shown.append(" ".join(tokens))
    segments = "; ".join(f"{a} = {b}" if a != b else a for a, b in zip(*found, strict=True))
    tokens, targets = len(row.teacher), row.teacher.targets
    return (
        f"the teacher: {tokens} tokens up to its last target, {targets} targets\n"
        f"{marked(row.teacher, theirs)}\nsegments (= where the tokens differ): {segments}"
    )


def marked(row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a row, special tokens included, with its targets between BEGIN and END."""
    text = ""
    pairs = zip(row.input_ids.tolist(), row.target_mask.tolist(), strict=True)
    for target, run in groupby(pairs, lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        text += f"{BEGIN}{part}{END}" if target else part
    return text


def summary(rows: TokenisedRows) -> dict:
    """Return the entry of rows.json for a set of rows."""
    quantiles = np.quantile(rows.document_lengths, QUANTILES).round().astype(int).tolist()
    return asdict(rows.report) | {
        "rows_of_the_trainer": len(rows),  # fewer if documents are packed
        "length_quantiles": {f"{q:g}": n for q, n in zip(QUANTILES, quantiles, strict=True)},
        "tokenised_rows": str(rows.folder),
    }


def write_summary(output_dir: str, rows: TokenisedRows, heldout: TokenisedRows | None) -> None:
    """Write rows.json: rows read, kept, dropped by reason, cut; tokens, targets, lengths."""
    found = {"train": summary(rows)} | ({"eval": summary(heldout)} if heldout else {})
    (Path(output_dir) / "rows.json").write_text(json.dumps(found, indent=2) + "\n")


def log_lengths(rows: TokenisedRows, folder: str) -> None:
    """Write TensorBoard histograms of the lengths of documents and rows to `folder`.

    TensorBoard sorts its pages by tag: these tags come after eval/ and train/.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    with SummaryWriter(folder) as writer:
        writer.add_histogram("training_data/document_tokens", rows.document_lengths, 0)
        writer.add_histogram("training_data/row_tokens", np.array(rows.lengths), 0)
