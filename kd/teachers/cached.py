"""A teacher that is read from a cache: its outputs travel in the batch, and no model is loaded.

N target tokens, k ids.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.data.tokenised_rows import TokenisedRows
from kd.losses.sparse import SparseTeacherOutputs
from kd.settings.combinations import NO_HIDDEN_STATES
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.cache_files import SCALARS, TeacherCache, check_manifest, unpack_ids
from kd.teachers.fingerprint import rows_manifest, teacher_manifest

PREFIX = "teacher_"  # of the batch keys that hold teacher outputs


def open_cache(
    settings: TeacherSettings,
    objective: Objective,
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> TeacherCache:
    """Collective: open a run's cache; a student without a chat template takes the cache's.

    Raises ValueError if the cache was made with other settings, and for a hidden-state loss.
    """
    if objective.hidden_weight:
        raise ValueError(NO_HIDDEN_STATES)
    cache = TeacherCache(settings.teacher_cache)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = cache.manifest["chat_template"]
    expected = rows_manifest(objective, model, tokenizer)
    if settings.teacher:
        expected |= teacher_manifest(settings.teacher)
    check_manifest(settings.teacher_cache, cache.manifest, expected)
    return cache


class Documents(Sequence):
    """All documents of tokenized rows; each is read from the disk when it is accessed."""

    def __init__(self, rows: list[TokenisedRows]) -> None:
        self.rows = rows
        self.lengths = np.concatenate([part.document_lengths for part in rows])
        self.starts = np.cumsum([0, *(len(part.ends) for part in rows)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> EncodedRow:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = int(np.searchsorted(self.starts, i, "right")) - 1
        return self.rows[part].document(i - int(self.starts[part]))


def tensors_of(records: np.ndarray, manifest: dict) -> dict[str, Tensor]:
    """The fields of SparseTeacherOutputs; `log_tail` is present even if the tail is empty."""
    arrays = {
        "ids": unpack_ids(records, manifest["vocabulary"]),  # (N, k)
        "log_probabilities": records["log_probabilities"],  # (N, k)
    } | {name: records["scalars"][:, i] for i, name in enumerate(SCALARS)}  # (N,)
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def outputs_of(records: np.ndarray, manifest: dict) -> SparseTeacherOutputs:
    """The teacher outputs of records, (N,): ids and log-probabilities (N, k), scalars (N,)."""
    return _without_empty_tail(SparseTeacherOutputs(**tensors_of(records, manifest)), manifest)


def _without_empty_tail(outputs: SparseTeacherOutputs, manifest: dict) -> SparseTeacherOutputs:
    whole = manifest["top_k"] == manifest["vocabulary"]
    return replace(outputs, log_tail=None) if whole else outputs


class CachedCollator:
    """Adds the cached teacher outputs to the batches of another collator, in the order of targets.

    The cache is read here, not in the step, so that DataLoader workers read ahead.
    """

    def __init__(self, collator: Collator, cache: TeacherCache) -> None:
        self.collator, self.cache = collator, cache
        self.flat = collator.flat

    def __call__(self, rows: list[list[EncodedRow]]) -> dict[str, Tensor]:
        """A batch, (B, T), with the teacher outputs of its N targets: ids (N, k), scalars (N,)."""
        records = self.cache.records(document for documents in rows for document in documents)
        found = tensors_of(records, self.cache.manifest)
        return self.collator(rows) | {PREFIX + name: tensor for name, tensor in found.items()}


class CachedTeacher:
    """Turns the batches of CachedCollator into teacher outputs; it has no hidden states."""

    def __init__(self, cache: TeacherCache, device: torch.device) -> None:
        self.manifest, self.device = cache.manifest, device

    def outputs(
        self, batches: list[dict[str, Tensor]], layers: list[int] | None = None
    ) -> Iterator[contextlib.AbstractContextManager[tuple[SparseTeacherOutputs, list[Tensor]]]]:
        """One context per batch: (top-k outputs of the targets (N, k), no hidden states)."""
        return (self.batch_outputs(batch, layers) for batch in batches)

    @contextlib.contextmanager
    def batch_outputs(
        self, batch: dict[str, Tensor], layers: list[int] | None = None
    ) -> Iterator[tuple[SparseTeacherOutputs, list[Tensor]]]:
        """The context of one batch: (top-k outputs of the targets (N, k), no hidden states)."""
        assert not layers
        names = [field.name for field in fields(SparseTeacherOutputs)]
        tensors = {name: batch[PREFIX + name].to(self.device) for name in names}
        outputs = SparseTeacherOutputs(**tensors)
        yield _without_empty_tail(outputs, self.manifest), []
