"""From settings to a plan that fits: the micro-batch, and where nothing fits, what would."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from kd.losses.objective import Objective
from kd.models.load import adapter_base
from kd.models.sharding import engine_settings
from kd.planning.layout import GIB, Layout, Plan
from kd.planning.memory import offloads, plan, scoring_plan
from kd.planning.throughput import Rates, duration
from kd.settings.distillation import (
    OWN_BASE,
    DataSettings,
    ModelSettings,
    OnPolicySettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings, derive_batch

ZERO3, SHARDED = "ds_configs/student_zero3.json", "ds_configs/teacher_zero3.json"
OFFLOADED = "ds_configs/teacher_zero3_offload.json"
TYPICAL = Rates(tflops=300, memory_gb_s=2000, link_gb_s=100)  # only to put changes in order


@dataclass(frozen=True)
class Machine:
    processes: int
    device: str  # cuda, cpu
    memory: float  # bytes that a process may use on its device
    zero: dict | None = None  # the student's DeepSpeed JSON
    per_machine: int | None = None


@dataclass(frozen=True)
class Change:
    flags: str
    layout: Layout
    price: int = 0  # 0: the same result, perhaps slower; 1: another result; 2: more GPUs


def layout_of(
    student: str,
    length: int,
    model: ModelSettings,
    data: DataSettings,
    training: TrainingSettings,
    teacher: TeacherSettings | None,
    objective: Objective,
    hidden_pairs: int,
    machine: Machine,
    on_policy: OnPolicySettings | None = None,
) -> Layout:
    if teacher and (teacher.teacher_cache or teacher.teacher == OWN_BASE):
        teacher = None  # a cache's batch is little, and the student's own base is there already
    shards = teacher and teacher.teacher_deepspeed and engine_settings(teacher.teacher_deepspeed)
    return Layout(
        student=student,
        model=model,
        micro=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        max_length=length,
        processes=machine.processes,
        memory=machine.memory,
        teacher=teacher and (adapter_base(teacher.teacher) or teacher.teacher),
        teacher_dtype=teacher.teacher_dtype if teacher else "auto",
        teacher_shards=shards or None,
        teacher_workspace=2**20 * teacher.teacher_workspace_mb if teacher else 0.0,
        zero=machine.zero,
        objective=objective,
        hidden_pairs=hidden_pairs,
        half="float16" if training.fp16 else "bfloat16" if training.bf16 else None,
        checkpointing=bool(training.gradient_checkpointing),
        optimizer=getattr(training.optim, "value", training.optim),
        packing=data.packing,
        device=machine.device,
        per_machine=machine.per_machine,
        on_policy=on_policy if on_policy and on_policy.student_fraction else None,
    )


def present_machine(training: TrainingSettings) -> Machine:
    """Where this process runs; the smallest memory of all processes, so that they agree."""
    cuda = training.device.type == "cuda"
    processes = training.world_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if cuda:
        free, total = torch.cuda.mem_get_info()
        memory = min(total, free + GIB)  # this process's own context is in the plan
    else:
        memory = available_memory() / local
    memory = min(memory, (training.gpu_memory_gb or float("inf")) * GIB)
    if dist.is_initialized():
        agreed = torch.tensor(memory, dtype=torch.float64, device=training.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        memory = agreed.item()
    plugin = getattr(training, "deepspeed_plugin", None)
    zero = plugin.hf_ds_config.config if plugin else None
    return Machine(processes, training.device.type, memory, zero, local)


def available_memory() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def fit(layout: Layout, given: bool) -> Plan:
    """The plan with the largest micro-batch that fits, from the layout's own downwards.

    A micro-batch that is `given` is taken as it is. Raises ValueError with the plan and the
    cheapest changes that would make it fit.
    """
    found = largest_that_fits(layout, given)
    if found.fits:
        return found
    lines = [str(found), "", "what would make it fit, cheapest first (each planned):"]
    changes = list(itertools.islice(changes_that_fit(layout, given), 3))
    lines += [f"  {change}" for change in changes] or [
        "  none of the changes known here, alone or in pairs"
    ]
    raise ValueError("the run does not fit; nothing is loaded\n" + "\n".join(lines))


def fit_scoring(layout: Layout) -> Plan:
    """The plan of a teacher that fills a cache, its batch as given: what is scored depends on it.

    Raises ValueError with the plan and the changes that would make it fit.
    """
    found = scoring_plan(layout)
    if found.fits:
        return found
    smaller = [
        Change(f"--max_per_device_train_batch_size {rows}", replace(layout, micro=rows))
        for rows in (layout.micro // 2, 1)
        if 0 < rows < layout.micro
    ]
    sharded = [c for c in changes(layout, True) if c.flags.startswith("--teacher_deepspeed")]
    fitting = [
        f"  {change.flags}  ({planned.total / GIB:.1f} GiB)"
        for change in [*smaller, *sharded]
        if (planned := scoring_plan(change.layout)).fits
    ]
    remedies = fitting or ["  none of the changes known here"]
    raise ValueError(
        "the teacher does not fit; nothing is loaded\n"
        + "\n".join([str(found), "", "what would make it fit (each planned):", *remedies])
    )


def largest_that_fits(layout: Layout, given: bool) -> Plan:
    """The last one tried, the smallest, where none fits."""
    found = plan(layout)
    rows = layout.micro * layout.accumulation
    while not found.fits and found.layout.micro > 1 and not given:
        micro, steps = derive_batch(rows, 1, found.layout.micro - 1)
        found = plan(replace(layout, micro=micro, accumulation=steps))
    return found


def changes_that_fit(layout: Layout, given: bool) -> Iterator[str]:
    """Single changes, then pairs; the cheapest first: Change.price, then the time of a step."""
    single = list(changes(layout, given))
    pairs = [
        Change(f"{a.flags} {b.flags}", b.layout, max(a.price, b.price))
        for i, a in enumerate(single)
        for b in changes(a.layout, given)
        if b.flags in [other.flags for other in single[i + 1 :]]
    ]
    for group in (single, pairs):
        fitting = []
        for change in group:
            found = largest_that_fits(change.layout, given)
            if found.fits:
                seconds = duration(found.layout, TYPICAL).step
                rows = f"{found.layout.micro} rows at a time"
                text = f"{change.flags}  ({found.total / GIB:.1f} GiB, {rows})"
                fitting.append((change.price, seconds, text))
        yield from (text for *_, text in sorted(fitting))


def changes(layout: Layout, given: bool) -> Iterator[Change]:
    """What a user can do about it, each as the flags that do it."""
    if given and layout.micro > 1:
        rows = layout.micro * layout.accumulation
        yield Change("--per_device_train_batch_size 1", replace(layout, micro=1, accumulation=rows))
    if not layout.checkpointing:
        yield Change("--gradient_checkpointing true", replace(layout, checkpointing=True))
    if layout.teacher and layout.objective.loss_workspace_mb > 128:
        small = replace(layout.objective, loss_workspace_mb=128)
        yield Change("--loss_workspace_mb 128", replace(layout, objective=small))
    if layout.teacher and layout.teacher_shards is None and layout.processes > 1:
        yield Change(
            f"--teacher_deepspeed {SHARDED}",
            replace(layout, teacher_shards=engine_settings(SHARDED)),
        )
    if layout.teacher and not offloads(layout.teacher_shards) and layout.device == "cuda":
        yield Change(
            f"--teacher_deepspeed {OFFLOADED}",
            replace(layout, teacher_shards=engine_settings(OFFLOADED)),
        )
    if layout.stage == 2 and layout.processes > 1:
        yield Change(
            f"student's DeepSpeed JSON: {ZERO3}",
            replace(layout, zero=json.loads(Path(ZERO3).read_text())),
        )
    if not layout.model.lora_rank:
        if layout.optimizer.startswith("adamw_torch"):
            yield Change("--optim adamw_bnb_8bit", replace(layout, optimizer="adamw_bnb_8bit"))
        lora = replace(layout.model, lora_rank=16, dtype=layout.half or "float32")
        yield Change("--lora_rank 16", replace(layout, model=lora), price=1)
    if layout.model.quantization == "none":
        rank = layout.model.lora_rank or 16
        dtype = layout.half or "float32"
        model = replace(layout.model, quantization="nf4", lora_rank=rank, dtype=dtype)
        flags = "--quantization nf4" + ("" if layout.model.lora_rank else f" --lora_rank {rank}")
        yield Change(flags, replace(layout, model=model), price=1)
    half = layout.max_length // 2
    yield Change(f"--max_length {half}", replace(layout, max_length=half), price=1)
    if layout.device == "cuda":
        double = replace(layout, processes=2 * layout.processes)
        if layout.accumulation % 2 == 0:
            double = replace(double, accumulation=layout.accumulation // 2)
            yield Change(f"NUM_PROCESSES={double.processes}", double, price=2)
