"""A teacher that was scored beforehand: its targets travel in the batch, and no model is loaded."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.data.row_cache import TokenisedRows
from kd.losses.objective import Objective
from kd.losses.sparse import SparseSignal
from kd.settings.distillation import ModelSettings, TeacherSettings
from kd.teachers.cache_files import SCALARS, TeacherCache, check_manifest, unpack_ids
from kd.teachers.fingerprint import NO_HIDDEN_STATES, rows_manifest, teacher_manifest

PREFIX = "teacher_"  # of a batch's keys


def open_cache(
    settings: TeacherSettings,
    objective: Objective,
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> TeacherCache:
    """The cache of a training run; a student without a chat template gets that of the cache.

    Raises ValueError where it was made from something else than this run has.
    """
    if objective.hidden_weight:
        raise ValueError(NO_HIDDEN_STATES)
    cache = TeacherCache(settings.teacher_cache)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = cache.manifest["chat_template"]
    wanted = rows_manifest(objective, model, tokenizer)
    if settings.teacher:
        wanted |= teacher_manifest(settings.teacher)
    check_manifest(settings.teacher_cache, cache.manifest, wanted)
    return cache


class Documents(Sequence):
    """All documents of prepared rows, each read from the disk as it is asked for."""

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
    """The fields of a SparseSignal; the tail's is there also where there is none."""
    arrays = {
        "ids": unpack_ids(records, manifest["vocabulary"]),  # (N, k)
        "log_probabilities": records["log_probabilities"],  # (N, k)
    } | {name: records["scalars"][:, i] for i, name in enumerate(SCALARS)}  # (N,)
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def signal_of(records: np.ndarray, manifest: dict) -> SparseSignal:
    return without_empty_tail(SparseSignal(**tensors_of(records, manifest)), manifest)


def without_empty_tail(signal: SparseSignal, manifest: dict) -> SparseSignal:
    whole = manifest["top_k"] == manifest["vocabulary"]
    return replace(signal, log_tail=None) if whole else signal


class CachedCollator:
    """Adds the cached targets of its documents to a collator's batch, in the order of targets.

    Here, and not in the step, so that DataLoader workers read ahead.
    """

    def __init__(self, collator: Collator, cache: TeacherCache) -> None:
        self.collator, self.cache = collator, cache
        self.flat = collator.flat

    def __call__(self, rows: list[list[EncodedRow]]) -> dict[str, Tensor]:
        records = self.cache.records(document for documents in rows for document in documents)
        found = tensors_of(records, self.cache.manifest)
        return self.collator(rows) | {PREFIX + name: tensor for name, tensor in found.items()}


class CachedTeacher:
    """Gives a batch of CachedCollator as the loss takes it. Hidden states it has none."""

    def __init__(self, cache: TeacherCache, device: torch.device) -> None:
        self.manifest, self.device = cache.manifest, device

    def signals(
        self, batches: list[dict[str, Tensor]], layers: list[int] | None = None
    ) -> Iterator[contextlib.AbstractContextManager[tuple[SparseSignal, list[Tensor]]]]:
        """One context for each batch, as LiveTeacher has them."""
        return (self.signal(batch, layers) for batch in batches)

    @contextlib.contextmanager
    def signal(
        self, batch: dict[str, Tensor], layers: list[int] | None = None
    ) -> Iterator[tuple[SparseSignal, list[Tensor]]]:
        assert not layers
        names = [field.name for field in fields(SparseSignal)]
        signal = SparseSignal(**{name: batch[PREFIX + name].to(self.device) for name in names})
        yield without_empty_tail(signal, self.manifest), []
