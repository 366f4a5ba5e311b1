"""Score the documents of a recipe once: what train/cache_teacher.py does. N target tokens, k ids."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.distributed import barrier
from kd.losses.fused import head_logits
from kd.losses.objective import TeacherSignal
from kd.losses.sparse import SparseSignal
from kd.models.heads import target_positions
from kd.settings.distillation import ModelSettings, TeacherSettings
from kd.settings.training import TrainingSettings
from kd.teachers.cache_files import (
    LEAST,
    CacheWriter,
    TeacherCache,
    document_key,
    pack_ids,
    record_type,
    remove_torn_shards,
    write_manifest,
)
from kd.teachers.cached import Documents, signal_of
from kd.teachers.live import LiveTeacher

TILE = 128  # target tokens whose logits exist at a time


def score(signal: TeacherSignal, labels: Tensor, manifest: dict) -> np.ndarray:
    """The records of N target tokens, from the teacher's hidden states and head."""
    records = np.empty(len(labels), record_type(manifest))
    k, vocabulary, temperature = (manifest[x] for x in ("top_k", "vocabulary", "temperature"))
    for start in range(0, len(labels), TILE):
        tile = slice(start, start + TILE)
        logits = head_logits(signal.hidden[tile], signal.head, vocabulary)  # (n, V)
        log_p = logits.log_softmax(-1)
        scalars = [log_p.gather(-1, labels[tile, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]
        if temperature != 1.0:
            log_p = (logits / temperature).log_softmax(-1)
        top, ids = log_p.topk(k)  # (n, k), likeliest first
        tail = log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        chosen = records[tile]
        pack_ids(ids.cpu().numpy(), chosen, vocabulary)
        chosen["log_probabilities"] = top.clamp_min(LEAST).cpu().numpy()
        chosen["scalars"] = torch.stack([tail, *scalars], -1).clamp_min(LEAST).cpu().numpy()
    return records


def fill_cache(
    settings: TeacherSettings,
    model: ModelSettings,
    training: TrainingSettings,
    documents: Documents,
    manifest: dict,
    pad_token_id: int,
) -> tuple[TeacherCache, list[tuple[EncodedRow, SparseSignal]]]:
    """Score what the folder lacks, all processes together.

    Returns the cache and, of a few documents, the teacher's whole distributions, to measure what
    the cache leaves out (none where nothing was scored). Batches are made of all documents, scored
    ones too: what is scored after a restart is the same to the last bit. Every process makes
    equally many calls, as a sharded teacher needs.
    """
    folder, rank, processes = settings.teacher_cache, training.process_index, training.world_size
    if rank == 0:
        write_manifest(folder, manifest)
        torn = remove_torn_shards(folder)
        if torn:
            print(f"removed {torn} files that a kill left unfinished")
    barrier()
    known = set(TeacherCache(folder).places)
    barrier()  # nobody writes before all have read
    distinct: dict[bytes, int] = {}  # the first place of every document
    for i, row in enumerate(documents):
        if row.targets:
            distinct.setdefault(document_key(row), i)
    ordered = sorted(distinct.items(), key=lambda item: (-documents.lengths[item[1]], item[0]))
    size = training.max_per_device_train_batch_size
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    unfinished = [batch for batch in batches if any(key not in known for key, _ in batch)]
    if rank == 0:
        there = len(known & distinct.keys())
        print(f"documents: {len(distinct)} distinct of {len(documents)}, {there} scored already")
    whole: list[tuple[EncodedRow, SparseSignal]] = []
    if unfinished:
        teacher = LiveTeacher(settings, model, training.device)
        writer = CacheWriter(folder, manifest, rank, settings.cache_shard_mb * 2**20)
        calls = -(-len(unfinished) // processes)
        for call in tqdm(range(calls), desc="scoring", unit="batch", disable=rank > 0):
            place = call * processes + rank
            batch = unfinished[min(place, len(unfinished) - 1)]
            rows = [documents[i] for _, i in batch]
            records = score_batch(teacher, rows, manifest, pad_token_id, training.device)
            if place >= len(unfinished):  # a call for the others' sake
                continue
            for (key, _), found in zip(batch, records, strict=True):
                if key not in known:
                    writer.add(key, found)
            writer.flush_if_full()
        writer.close()
        whole = [
            (row, whole_signal(teacher, row, manifest, pad_token_id, training.device))
            for row in first_documents(documents, settings.cache_check_tokens)
        ]
    barrier()
    return TeacherCache(folder), whole


def first_documents(documents: Documents, tokens: int) -> list[EncodedRow]:
    """As many as together have about so many target tokens, and no fewer."""
    chosen: list[EncodedRow] = []
    for row in documents:
        if sum(other.targets for other in chosen) >= tokens:
            break
        chosen.append(row)
    return chosen


def whole_signal(
    teacher: LiveTeacher,
    row: EncodedRow,
    manifest: dict,
    pad_token_id: int,
    device: torch.device,
) -> SparseSignal:
    """Every id of the teacher's distribution over the targets of one document, in main memory."""
    manifest = manifest | {"top_k": manifest["vocabulary"], "dtype": "float32"}
    (records,) = score_batch(teacher, [row], manifest, pad_token_id, device)
    return signal_of(records, manifest)


def score_batch(
    teacher: LiveTeacher,
    rows: list[EncodedRow],
    manifest: dict,
    pad_token_id: int,
    device: torch.device,
) -> list[np.ndarray]:
    """The records of each of `rows`, one document a row."""
    batch = Collator(pad_token_id)([[row] for row in rows])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    _, labels = target_positions(batch["labels"])
    with teacher.signal(batch) as (signal, _):
        records = score(signal, labels, manifest)
    return np.split(records, np.cumsum([row.targets for row in rows])[:-1])


def describe(cache: TeacherCache) -> str:
    """Size, and how much of the teacher's distributions the k ids have."""
    manifest, tokens = cache.manifest, cache.tokens
    tail = sum(np.exp(shard["scalars"][:, 0].astype(np.float64)).sum() for shard in cache.shards)
    return (
        f"cache: {tokens} target tokens x {manifest['top_k']} ids in {manifest['dtype']}, "
        f"{cache.bytes / 2**20:.1f} MiB: {cache.bytes / tokens:.1f} bytes a token, "
        f"{cache.bytes / tokens / manifest['top_k']:.2f} an entry\n"
        f"mass of the {manifest['top_k']} ids: {1 - tail / tokens:.3%} of the teacher's "
        f"distribution at temperature {manifest['temperature']:g}"
    )
