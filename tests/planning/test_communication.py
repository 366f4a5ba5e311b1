"""Rounds, hops and seconds of a step's collectives, against closed forms; counts: test_scale.py."""

import json
from dataclasses import replace

import pytest
from processes import ROOT

from kd.planning import memory
from kd.planning.communication import (
    block_of,
    buckets,
    communication_seconds,
    hops,
    sent_bytes,
    traffic,
)
from kd.planning.device_rates import Rates
from kd.planning.fitting import changes
from kd.planning.layout import GIB, Layout
from kd.planning.model_sizes import student_tensors, teacher_tensors
from kd.settings.distillation import ModelSettings

ZERO2, ZERO3, SHARDED, OFFLOADED = (
    json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    for name in ("student_zero2", "student_zero3", "teacher_zero3", "teacher_zero3_offload")
)
RATES = Rates(
    tflops=1,
    memory_gb_s=1,
    link_gb_s=8,
    network_gb_s=2,
    link_latency_us=10,
    network_latency_us=1000,
)


@pytest.fixture(scope="module")
def layout(models) -> Layout:
    """Full training on two machines with two processes each."""
    return Layout(
        student=str(models / "student"),
        model=ModelSettings(dtype="float32"),
        micro=2,
        accumulation=3,
        max_length=64,
        processes=4,
        memory=GIB,
        per_machine=2,
    )


@pytest.fixture(scope="module")
def taught(layout, models) -> Layout:
    """The same, with a teacher that is sharded over all four processes."""
    return replace(layout, teacher=str(models / "teacher"), teacher_shards=SHARDED)


def with_zero(config: dict, **settings) -> dict:
    return {"zero_optimization": config["zero_optimization"] | settings}


@pytest.mark.parametrize(
    "processes, local", [(1, 8), (2, 2), (2, 1), (4, 2), (4, 8), (6, 4), (16, 8), (1024, 8)]
)
def test_hops_are_those_of_the_longest_way_around_the_ring(processes, local):
    machines = [rank // local for rank in range(processes)]
    crosses = [machines[rank] != machines[(rank + 1) % processes] for rank in range(processes)]
    between = max(sum(crosses) - crosses[last] for last in range(processes))
    assert hops(processes, local) == (processes - 1 - between, between)


def test_two_machines_with_two_processes_each_have_one_hop_within_and_two_between():
    assert hops(4, 2) == (1, 2)


def test_gradients_of_ddp_go_around_the_ring_twice_at_the_rate_of_its_slowest_link(layout):
    size = sum(tensor.bytes for tensor in student_tensors(layout))
    sending, latency = communication_seconds(layout, RATES)
    # Both processes of a machine send to the other machine: 2 x 2 GB/s.
    assert sending == pytest.approx(2 * 3 / 4 * size / 4e9)
    assert latency == pytest.approx(2 * (10e-6 + 2 * 1000e-6))  # one bucket
    alone = replace(layout, per_machine=4)
    sending, latency = communication_seconds(alone, RATES)
    assert sending == pytest.approx(2 * 3 / 4 * size / 8e9)
    assert latency == pytest.approx(2 * 3 * 10e-6)
    assert communication_seconds(replace(layout, per_machine=None), RATES) == (sending, latency)
    assert communication_seconds(replace(layout, processes=1), RATES) == (0, 0)


def test_a_teacher_that_is_sharded_per_machine_is_gathered_over_its_links(layout, taught):
    student = communication_seconds(layout, RATES)
    own = replace(taught, teacher_processes=2)
    everywhere, within = (traffic(each)["teacher's shards"] for each in (taught, own))
    assert (everywhere.processes, within.processes) == (4, 2)
    assert everywhere.rounds == within.rounds > 0
    assert within.sent == pytest.approx(everywhere.sent * (1 / 2) / (3 / 4))
    sending, latency = communication_seconds(own, RATES)
    assert sending - student[0] == pytest.approx(within.sent / 8e9)
    assert latency - student[1] == pytest.approx(within.rounds * 10e-6)
    sending, latency = communication_seconds(taught, RATES)
    assert sending - student[0] == pytest.approx(everywhere.sent / 4e9)
    assert latency - student[1] == pytest.approx(everywhere.rounds * 2010e-6)


def test_a_block_that_exceeds_the_prefetch_bucket_is_gathered_in_two_parts(taught):
    tensors = teacher_tensors(taught)
    names = {block_of(tensor.name) for tensor in tensors if ".layers." in tensor.name}
    blocks = len(names)
    sizes = [tensor.numel for tensor in tensors if block_of(tensor.name) == min(names)]
    untied = int(tensors[-1].name == "lm_head.weight")  # it is gathered by itself
    for prefetch, gathers in (
        (10**9, 2),  # the embeddings, then everything else
        (sum(sizes) - sizes[-1], 1 + 2 * blocks),
        (sum(sizes), 1 + blocks),
    ):
        shards = with_zero(
            SHARDED,
            stage3_param_persistence_threshold=0,
            stage3_prefetch_bucket_size=prefetch,
        )
        rounds = traffic(replace(taught, teacher_shards=shards, teacher_workspace=2**30))
        final_norm = int(prefetch != 10**9)  # a module by itself
        assert rounds["teacher's shards"].rounds == gathers + final_norm + untied, prefetch


def test_gradients_are_reduced_in_buckets(layout):
    trained = student_tensors(layout)
    assert buckets(layout, trained) == 1  # DDP's first bucket has a megabyte
    for size, count in ((10**9, 1), (1, len(trained))):
        zero = with_zero(ZERO2, reduce_bucket_size=size)
        changed = replace(layout, zero=zero)
        assert buckets(changed, trained) == count
        # ZeRO-2 reduces them in all three micro-batches, by an all-reduce of two rounds.
        assert traffic(changed)["gradients"].rounds == 3 * 2 * count
        assert traffic(changed)["updated weights"].rounds == 2


def test_small_weights_of_a_student_under_zero_3_are_gathered_one_by_one_after_a_step(layout):
    zero = with_zero(ZERO3, stage3_param_persistence_threshold=40, reduce_bucket_size=10**9)
    small = [tensor for tensor in student_tensors(layout) if tensor.numel <= 40]
    found = traffic(replace(layout, zero=zero))
    assert found["updated weights"].rounds == len(small) > 0
    assert found["updated weights"].sent == 3 / 4 * sum(tensor.bytes for tensor in small)
    assert found["gradients"].rounds == 3


def test_shards_are_as_large_as_in_a_run_of_as_many_processes(taught):
    large = replace(taught, processes=16, per_machine=8, device="cuda")
    for processes in (2, 4, 8):
        (held,) = memory.teacher_held(replace(large, teacher_processes=processes)).items()
        (alone,) = memory.teacher_held(replace(large, processes=processes)).items()
        assert held == alone
    assert memory.teacher_held(replace(large, teacher_processes=16)) == memory.teacher_held(large)
    threshold = with_zero(SHARDED, stage3_param_persistence_threshold=0)
    halves, quarters = (
        sum(
            memory.teacher_held(
                replace(large, teacher_shards=threshold, teacher_processes=n)
            ).values()
        )
        for n in (2, 4)
    )
    assert halves == pytest.approx(2 * quarters, rel=0.001)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit"])
def test_host_memory_per_machine_does_not_grow_with_the_machines(taught, optimizer):
    one = replace(
        taught,
        processes=8,
        per_machine=8,
        teacher_shards=OFFLOADED,
        device="cuda",
        optimizer=optimizer,
    )
    per_node = replace(one, processes=16, teacher_processes=8)
    over_all = replace(one, processes=16)
    student = student_tensors(one)
    host, of_node, of_all = (memory.host_parts(each, student) for each in (one, per_node, over_all))
    assert of_node == host and host["libraries"] == 8 * 2.5 * GIB
    assert of_all == host | {"teacher's shards": host["teacher's shards"] / 2}
    assert host["teacher's shards"] == sum(tensor.bytes for tensor in teacher_tensors(one))


def test_more_gpus_means_more_on_every_machine(taught):
    large = replace(taught, device="cuda", accumulation=2, teacher_processes=2)
    (more,) = (c for c in changes(large, False) if c.flags.startswith("NUM_PROCESSES"))
    assert more.flags == "NUM_PROCESSES=4"
    doubled = more.layout
    assert (doubled.processes, doubled.per_machine, doubled.teacher_processes) == (8, 4, 4)
    assert sent_bytes(doubled).keys() == sent_bytes(large).keys()
