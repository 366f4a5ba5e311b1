"""Fill a teacher cache: score every document of a recipe once.

N target tokens, V vocabulary, k ids per target token.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.distributed import barrier, print_rank0, rank, world_size
from kd.losses.elementwise import entropy, scaled_logits
from kd.losses.fused import head_logits
from kd.losses.head import TeacherOutputs
from kd.losses.sparse import SparseTeacherOutputs
from kd.models.heads import target_positions
from kd.settings.training_recipe import Recipe
from kd.teachers.cache_files import (
    LOWEST,
    CacheWriter,
    TeacherCache,
    document_key,
    pack_ids,
    record_type,
    remove_torn_shards,
    write_manifest,
)
from kd.teachers.cached import Documents, outputs_of
from kd.teachers.live import LiveTeacher

TILE = 128  # target tokens whose logits exist at a time

Reference = tuple[EncodedRow, SparseTeacherOutputs]  # a document and all V log-probabilities


def score(outputs: TeacherOutputs, labels: Tensor, manifest: dict) -> np.ndarray:
    """The cache records, (N,), of the targets `labels`, (N,), from the teacher's hidden states."""
    records = np.empty(len(labels), record_type(manifest))
    k, vocab_size, temperature = (manifest[x] for x in ("top_k", "vocabulary", "temperature"))
    for start in range(0, len(labels), TILE):
        tile = slice(start, start + TILE)
        logits = head_logits(outputs.hidden[tile], outputs.head, vocab_size)  # (n, V)
        log_p = logits.log_softmax(-1)
        entropies = entropy(log_p.exp(), log_p, out=torch.empty_like(log_p))
        scalars = [log_p.gather(-1, labels[tile, None])[:, 0], entropies]
        if temperature != 1.0:
            log_p = scaled_logits(logits, temperature).log_softmax(-1)
        top, ids = log_p.topk(k)  # (n, k), most likely first
        tail = log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        chosen = records[tile]
        pack_ids(ids.cpu().numpy(), chosen, vocab_size)
        chosen["log_probabilities"] = top.clamp_min(LOWEST).cpu().numpy()
        chosen["scalars"] = torch.stack([tail, *scalars], -1).clamp_min(LOWEST).cpu().numpy()
    return records


def score_batch(
    teacher: LiveTeacher,
    rows: list[EncodedRow],
    manifest: dict,
    pad_token_id: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Collective for a sharded teacher: the records, (N,) each, of the documents `rows`."""
    batch = Collator(pad_token_id)([[row] for row in rows])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    _, labels = target_positions(batch["labels"])
    with teacher.batch_outputs(batch) as (outputs, _):
        records = score(outputs, labels, manifest)
    return np.split(records, np.cumsum([row.targets for row in rows])[:-1])


def fill_cache(
    recipe: Recipe, documents: Documents, manifest: dict, tokenizer: PreTrainedTokenizerBase
) -> tuple[TeacherCache, list[Reference]]:
    """Collective: score the documents that the cache lacks.

    Returns the cache, and a few documents with the teacher's full distributions to measure the
    error of the cache (none if nothing was scored). Batches always consist of all documents, scored
    ones included, so that a resumed run scores the same bits. Every process makes equally many
    calls, as a sharded teacher requires. Raises ValueError if the folder holds a cache that was
    made with other settings.
    """
    settings, training, pad = recipe.teacher, recipe.training, tokenizer.pad_token_id
    folder, processes = settings.teacher_cache, world_size()
    if rank() == 0:
        write_manifest(folder, manifest)
        torn = remove_torn_shards(folder)
        if torn:
            print(f"removed {torn} unfinished files of an interrupted run")
    barrier()
    known = set(TeacherCache(folder).places)
    barrier()  # no rank writes before all ranks have read
    distinct = first_places(documents)
    ordered = sorted(distinct.items(), key=lambda item: (-documents.lengths[item[1]], item[0]))
    size = training.max_per_device_train_batch_size
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    unfinished = [batch for batch in batches if any(key not in known for key, _ in batch)]
    print_rank0(
        f"documents: {len(distinct)} distinct of {len(documents)}, "
        f"{len(known & distinct.keys())} scored already"
    )
    references: list[Reference] = []
    if unfinished:
        teacher = LiveTeacher(settings, recipe.model, training.device)
        writer = CacheWriter(folder, manifest, rank(), settings.cache_shard_mb * 2**20)
        calls = -(-len(unfinished) // processes)
        for call in tqdm(range(calls), desc="scoring", unit="batch", disable=rank() > 0):
            place = call * processes + rank()
            batch = unfinished[min(place, len(unfinished) - 1)]
            rows = [documents[i] for _, i in batch]
            records = score_batch(teacher, rows, manifest, pad, training.device)
            if place >= len(unfinished):  # this call only served the other ranks
                continue
            for (key, _), found in zip(batch, records, strict=True):
                if key not in known:
                    writer.add(key, found)
            writer.flush_if_full()
        writer.close()
        references = [
            (row, full_outputs(teacher, row, manifest, pad, training.device))
            for row in first_documents(documents, settings.cache_check_tokens)
        ]
    barrier()
    return TeacherCache(folder), references


def first_places(documents: Documents) -> dict[bytes, int]:
    """The first index of every distinct document that has targets, by its key."""
    places: dict[bytes, int] = {}
    for i, row in enumerate(documents):
        if row.targets:
            places.setdefault(document_key(row), i)
    return places


def first_documents(documents: Documents, tokens: int) -> list[EncodedRow]:
    """The first documents that together have at least `tokens` target tokens."""
    chosen: list[EncodedRow] = []
    for row in documents:
        if sum(other.targets for other in chosen) >= tokens:
            break
        chosen.append(row)
    return chosen


def full_outputs(
    teacher: LiveTeacher,
    row: EncodedRow,
    manifest: dict,
    pad_token_id: int,
    device: torch.device,
) -> SparseTeacherOutputs:
    """The teacher's log-probabilities, (N, V), at the targets of one document, on the CPU."""
    manifest = manifest | {"top_k": manifest["vocabulary"], "dtype": "float32"}
    (records,) = score_batch(teacher, [row], manifest, pad_token_id, device)
    return outputs_of(records, manifest)


def describe(cache: TeacherCache) -> str:
    """The size of a cache, and how much probability mass its k ids have."""
    manifest, tokens = cache.manifest, cache.tokens
    tail = sum(np.exp(shard["scalars"][:, 0].astype(np.float64)).sum() for shard in cache.shards)
    return (
        f"cache: {tokens} target tokens x {manifest['top_k']} ids in {manifest['dtype']}, "
        f"{cache.bytes / 2**20:.1f} MiB: {cache.bytes / tokens:.1f} bytes per token, "
        f"{cache.bytes / tokens / manifest['top_k']:.2f} per id\n"
        f"mass of the {manifest['top_k']} ids: {1 - tail / tokens:.3%} of the teacher's "
        f"distribution at temperature {manifest['temperature']:g}"
    )
