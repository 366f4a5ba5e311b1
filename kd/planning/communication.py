"""What a process sends in one step, as DDP and DeepSpeed 0.19 do, and the time that it takes.

benchmarks/scale.py compares bytes and collectives with those of real runs. All collectives are
rings. A ring is as fast as its slowest link, and the last piece of data arrives after it has passed
all of its links but one. Not counted: collectives of a few numbers, such as the gradient's norm and
DDP's broadcast of buffers.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from kd.planning.blueprint import StoredTensor
from kd.planning.device_rates import Rates
from kd.planning.layout import Layout
from kd.planning.model_sizes import config_of, student_tensors, teacher_tensors
from kd.planning.model_states import numbers_bytes, sent_itemsize, zero_setting

DDP_BUCKET, DDP_FIRST = 25 * 2**20, 2**20  # bytes; the first bucket is small


@dataclass(frozen=True)
class Traffic:
    """The collectives of one purpose in one step."""

    sent: float  # bytes, by one process
    rounds: float  # of the ring: one for a gather or a reduce-scatter, two for an all-reduce
    processes: int  # on the ring


def on_ring(size: float, rounds: float, processes: int) -> Traffic:
    """The traffic of gathers (or reduce-scatters) of `size` bytes in total."""
    return Traffic((processes - 1) / processes * size, rounds, processes)


def communication_seconds(layout: Layout, rates: Rates) -> tuple[float, float]:
    """(seconds to send the bytes of a step, seconds of latency)."""
    sending = latency = 0.0
    for part in traffic(layout).values():
        within, between = hops(part.processes, layout.local_processes)
        # All processes of a machine use their network links at the same time, one ring on each.
        network = layout.local_processes * rates.network_gb_s
        rate = min(rates.link_gb_s, network) if between else rates.link_gb_s
        sending += part.sent / (1e9 * rate)
        hop_us = within * rates.link_latency_us + between * rates.network_latency_us
        latency += part.rounds * hop_us / 1e6
    return sending, latency


def hops(processes: int, local_processes: int) -> tuple[int, int]:
    """(hops within a machine, hops between machines) on the longest way of data around a ring.

    A ring passes every machine once, so it has as many links between machines as there are
    machines. Data travel along all links but one, for some of the data a link within a machine.
    """
    machines = -(-processes // local_processes)
    between = min(machines, processes - 1) if machines > 1 else 0
    return processes - 1 - between, between


def sent_bytes(layout: Layout) -> dict[str, float]:
    """Bytes that one process sends in one step, by purpose."""
    return {name: part.sent for name, part in traffic(layout).items()}


def traffic(layout: Layout) -> dict[str, Traffic]:
    """The collectives of one step, by purpose."""
    processes, steps = layout.processes, layout.accumulation
    tensors = student_tensors(layout)
    trained = [tensor for tensor in tensors if tensor.trained]
    size = sum(tensor.bytes for tensor in trained)
    # ZeRO-2 reduces whole buckets on every rank, although each keeps only a part, and it does so
    # in every micro-batch.
    times = {0: 2, 1: 2, 2: 2 * steps, 3: steps}[layout.stage]
    sent = numbers_bytes(trained, sent_itemsize(layout))
    found = {"gradients": on_ring(times * sent, times * buckets(layout, trained), processes)}
    if layout.stage in (1, 2):  # the optimizer has a group with weight decay and one without
        found["updated weights"] = on_ring(size, 2, processes)
    if layout.stage == 3:
        sent, gathers = student_gathers(layout, tensors)
        found["student's shards"] = on_ring(steps * sent, steps * gathers, processes)
        small = zero_setting(layout, "stage3_param_persistence_threshold", 10)
        kept = [tensor for tensor in trained if tensor.numel <= small]  # gathered one by one
        found["updated weights"] = on_ring(sum(t.bytes for t in kept), len(kept), processes)
    if layout.teacher and layout.teacher_shards is not None:
        found["teacher's shards"] = on_ring(*teacher_gathers(layout), layout.teacher_group)
    if layout.on_policy and layout.stage == 3:  # each weight by itself
        whole = [tensor for tensor in tensors if not tensor.replicated]
        gathered = on_ring(sharded_bytes(tensors), len(whole), processes)
        found["student gathered for generation"] = gathered
    return found


def buckets(layout: Layout, trained: list[StoredTensor]) -> int:
    """The number of buckets in which the gradients are reduced, last weights first."""
    if layout.stage == 0:
        itemsize = max((tensor.itemsize for tensor in trained), default=4)
        limits = (DDP_BUCKET / itemsize, DDP_FIRST / itemsize)
        return sum(1 for _ in runs(reversed(trained), *limits))
    most = zero_setting(layout, "reduce_bucket_size", 1, 2)
    count = filled = 0
    for tensor in reversed(trained):
        if not count or filled + tensor.numel > most:
            count, filled = count + 1, 0
        filled += tensor.numel
    return count


def runs(
    tensors: Iterable[StoredTensor], least: float, first: float | None = None
) -> Iterator[list[StoredTensor]]:
    """Split tensors into runs of at least `least` numbers (the first run: `first`)."""
    run: list[StoredTensor] = []
    missing = least if first is None else first
    for tensor in tensors:
        run.append(tensor)
        missing -= tensor.numel
        if missing <= 0:
            yield run
            run, missing = [], least
    if run:
        yield run


def gathers(run: list[StoredTensor]) -> int:
    """The number of gathers of tensors that are fetched together: one for each type."""
    return len({tensor.itemsize for tensor in run})


def student_gathers(layout: Layout, tensors: list[StoredTensor]) -> tuple[float, float]:
    """(bytes, gathers) of the student under ZeRO-3 in a micro-batch.

    Every block is gathered for the forward and for the backward. With adapters, a checkpointed
    block is also gathered for its second forward; a trained one stays gathered from there on (if
    two blocks have at most stage3_max_reuse_distance numbers). The head stays gathered from its
    forward to its backward, and so do the blocks within that distance of the head. Frozen
    embeddings have no backward. Weights are fetched ahead, in runs that fill the prefetch bucket.
    """
    lora = layout.model.lora_rank > 0
    text = config_of(layout.student).get_text_config()
    table = text.vocab_size * text.hidden_size
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10)
    sharded = [tensor for tensor in tensors if not tensor.replicated and tensor.numel > small]
    tables = [tensor.itemsize for tensor in sharded if tensor.numel == table]
    blocks = [tensor for tensor in sharded if tensor.numel != table]
    reuse = layout.zero["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
    near = max(0.0, reuse / (3 if layout.checkpointing else 2) - table)
    stays = min(1.0, near / max(1, sum(tensor.numel for tensor in blocks)))
    passes = (3 if lora and layout.checkpointing else 2) - stays
    times = 1 + (1 if lora or stays == 1.0 else 2)  # the head's, the embeddings'
    prefetch = zero_setting(layout, "stage3_prefetch_bucket_size", 0.9, 2)
    count = sum(gathers(run) for run in runs(blocks, prefetch))
    size = sum(tensor.bytes for tensor in blocks)
    return passes * size + times * table * max(tables, default=0), passes * count + times


def teacher_gathers(layout: Layout) -> tuple[float, float]:
    """(bytes, gathers) of a sharded teacher in a step.

    Its blocks are gathered once per group of micro-batches whose states fit the workspace. Its head
    is gathered once per group if it fits as well, else once per micro-batch.
    """
    config, tensors = config_of(layout.teacher), teacher_tensors(layout)
    text = config.get_text_config()
    width, size = text.hidden_size, (config.dtype or torch.float32).itemsize
    states = (2 + layout.hidden_pairs) * layout.tokens * width * size
    at_once = min(layout.accumulation, max(1, layout.teacher_workspace // states))
    passes = -(-layout.accumulation // at_once)
    head = text.vocab_size * width * size
    keeps_head = at_once * states + head <= layout.teacher_workspace
    heads = passes if keeps_head else layout.accumulation
    sent = passes * (sharded_bytes(tensors) - head) + heads * head
    tables = [tensor for tensor in tensors if tensor.numel == text.vocab_size * width]
    own_head = tables[1:]  # none if the embeddings are the head; they stay gathered until then
    backbone = [tensor for tensor in tensors if tensor not in own_head]
    count = passes * backbone_gathers(layout, backbone) + heads
    return sent, count if own_head else count - passes


def backbone_gathers(layout: Layout, tensors: list[StoredTensor]) -> int:
    """Gathers of a sharded teacher's backbone in one forward.

    DeepSpeed gathers what is missing of a block when the block is called, and then fetches the next
    weights ahead until they fill its prefetch bucket.
    """
    zero = layout.teacher_shards.get("zero_optimization", {})
    small = zero.get("stage3_param_persistence_threshold", 100_000)
    prefetch = zero.get("stage3_prefetch_bucket_size", 5e7)
    sharded = [tensor for tensor in tensors if not tensor.replicated and tensor.numel > small]
    count = called = fetched = 0
    for _, block in itertools.groupby(sharded, lambda tensor: block_of(tensor.name)):
        called += len(list(block))
        count += gathers(sharded[fetched:called])
        fetched = max(fetched, called)
        ahead = next(runs(sharded[fetched:], prefetch), [])
        count += gathers(ahead)
        fetched += len(ahead)
    return count


def block_of(name: str) -> str:
    """The name of the decoder block that a weight belongs to; elsewhere, the weight's own name."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered.group() if numbered else name


def sharded_bytes(tensors: list[StoredTensor]) -> float:
    """Bytes of the tensors that ZeRO-3 shards."""
    return sum(tensor.bytes for tensor in tensors if not tensor.replicated)
