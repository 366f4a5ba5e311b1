"""Find a layout that fits: the fastest micro-batch, or else changes that make the run fit."""

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kd.models.adapters import adapter_base
from kd.models.layer_pairs import hidden_objective
from kd.models.sharding import engine_settings
from kd.planning.device_rates import Rates
from kd.planning.layout import GIB, Layout, Plan
from kd.planning.machine import Machine
from kd.planning.memory import plan_scoring, plan_training
from kd.planning.teacher_memory import offloads
from kd.planning.throughput import duration
from kd.recipe import NONE
from kd.settings.distillation import SMALLEST_WORKSPACE
from kd.settings.machine_file import MachineFile, repository_file
from kd.settings.training import LAUNCHED
from kd.settings.training_recipe import Recipe

ZERO2, ZERO3, SHARDED, OFFLOADED = (
    f"ds_configs/{name}.json"
    for name in ("student_zero2", "student_zero3", "teacher_zero3", "teacher_zero3_offload")
)
TYPICAL = Rates(
    tflops=300,
    memory_gb_s=2000,
    link_gb_s=100,
    network_gb_s=25,
    link_latency_us=1.9,
    network_latency_us=4.0,
)  # used only to rank changes
SAME_RESULT, OTHER_RESULT, MORE_GPUS = 0, 1, 2  # what a change costs, besides time
NO_REMEDY = "  none of the known changes, alone or in pairs"


@dataclass(frozen=True)
class Change:
    """A change of a run: the flags that make it, the layout that results, and its cost."""

    flags: str
    layout: Layout
    cost: int = SAME_RESULT


def layout_of(recipe: Recipe, length: int, machine: Machine) -> Layout:
    """What the memory and the time of a run depend on; `length` is the longest row in tokens.

    Raises ValueError for pairs of hidden layers that the models do not have.
    """
    training, teacher, on_policy = recipe.training, recipe.separate_teacher, recipe.on_policy
    shards = teacher and teacher.sharding and engine_settings(teacher.sharding)
    within_nodes = shards and teacher.teacher_sharded_over == "node"
    own = training.deepspeed not in (None, NONE, LAUNCHED)
    hidden = hidden_objective(recipe)
    return Layout(
        student=recipe.model_name,
        model=recipe.model,
        micro=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        max_length=length,
        processes=machine.processes,
        memory=machine.memory,
        teacher=teacher and (adapter_base(teacher.teacher) or teacher.teacher),
        teacher_dtype=teacher.teacher_dtype if teacher else "auto",
        teacher_shards=shards or None,
        teacher_processes=machine.per_machine if within_nodes else None,
        teacher_workspace=teacher.workspace_bytes if teacher else 0.0,
        zero=json.loads(repository_file(training.deepspeed).read_text()) if own else machine.zero,
        objective=recipe.objective,
        hidden_pairs=len(hidden.layers) if hidden else 0,
        half=None if training.precision == "float32" else training.precision,
        checkpointing=bool(training.gradient_checkpointing),
        optimizer=getattr(training.optim, "value", training.optim),
        packing=recipe.data.packing,
        device=machine.device,
        repeats_keys=machine.repeats_keys,
        per_machine=machine.per_machine,
        on_policy=on_policy if recipe.generates_answers else None,
    )


def scoring_layout(recipe: Recipe, length: int, machine: Machine) -> Layout:
    """The layout of a teacher that fills its cache; see `layout_of`."""
    teacher = copy.copy(recipe.teacher)
    teacher.teacher_cache = None
    layout = layout_of(replace(recipe, teacher=teacher), length, machine)
    return replace(layout, micro=recipe.training.max_per_device_train_batch_size)


def rates_of(file: MachineFile) -> Rates:
    """The rates of a machine file where it has them; they only rank layouts."""
    given = vars(file)
    return replace(TYPICAL, **{name: given[name] for name in vars(TYPICAL) if given.get(name)})


def fit(layout: Layout, fixed_batch: bool, rates: Rates = TYPICAL) -> Plan:
    """The plan with the fastest micro-batch that fits, at most that of the layout.

    With `fixed_batch` the micro-batch is not changed. If nothing leaves memory to spare, the plan
    is the smallest. Raises ValueError, with that plan and the cheapest changes that would make the
    run fit, if it exceeds the memory of the device.
    """
    plan = fastest_that_fits(layout, fixed_batch, rates)
    if not plan.exceeds:
        return plan
    remedies = list(itertools.islice(changes_that_fit(layout, fixed_batch), 3))
    raise ValueError(
        "the run does not fit; no model was loaded\n"
        f"{plan}\n\nchanges that would make it fit, cheapest first (each planned):\n"
        + ("\n".join(f"  {change}" for change in remedies) or NO_REMEDY)
    )


def fit_scoring(layout: Layout) -> Plan:
    """The plan of a teacher that fills a cache; its batch is fixed, since the scores depend on it.

    Raises ValueError, with the plan and changes that would make it fit, if it does not fit.
    """
    plan = plan_scoring(layout)
    if not plan.exceeds:
        return plan
    smaller = [
        Change(f"--max_per_device_train_batch_size {rows}", replace(layout, micro=rows))
        for rows in (layout.micro // 2, 1)
        if 0 < rows < layout.micro
    ]
    sharded = [c for c in changes(layout, True) if c.flags.startswith("--teacher_deepspeed")]
    remedies = [
        f"  {change.flags}  ({planned.total / GIB:.1f} GiB)"
        for change in [*smaller, *sharded]
        if (planned := plan_scoring(change.layout)).fits
    ]
    raise ValueError(
        "the teacher does not fit; no model was loaded\n"
        f"{plan}\n\nchanges that would make it fit (each planned):\n"
        + ("\n".join(remedies) or NO_REMEDY)
    )


def splits(layout: Layout, fixed_batch: bool) -> list[Layout]:
    """The layout with every micro-batch that it allows, the largest first."""
    if fixed_batch:
        return [layout]
    rows = layout.micro * layout.accumulation
    return [
        replace(layout, micro=micro, accumulation=rows // micro)
        for micro in range(layout.micro, 0, -1)
        if rows % micro == 0
    ]


def step_seconds(layout: Layout, rates: Rates) -> float:
    """The modelled time of a step, rounded so that equal times compare as equal."""
    return float(f"{duration(layout, rates).step:.9g}")


def fastest_that_fits(layout: Layout, fixed_batch: bool, rates: Rates = TYPICAL) -> Plan:
    """The plan of the fastest micro-batch that fits; the smallest plan if none does."""
    plans = []
    for each in sorted(splits(layout, fixed_batch), key=lambda each: step_seconds(each, rates)):
        plans.append(plan_training(each))
        if plans[-1].fits:
            return plans[-1]
    return min(plans, key=lambda plan: plan.total)


def changes_that_fit(layout: Layout, fixed_batch: bool) -> Iterator[str]:
    """Single changes, then pairs, that make the run fit, by Change.cost and the time of a step."""
    single = list(changes(layout, fixed_batch))
    pairs = [
        Change(f"{a.flags} {b.flags}", b.layout, max(a.cost, b.cost))
        for i, a in enumerate(single)
        for b in changes(a.layout, fixed_batch)
        if b.flags in [other.flags for other in single[i + 1 :]]
    ]
    for group in (single, pairs):
        fitting = []
        for change in group:
            plan = fastest_that_fits(change.layout, fixed_batch)
            if plan.fits:
                seconds = duration(plan.layout, TYPICAL).step
                rows = f"{plan.layout.micro} rows per micro-batch"
                text = f"{change.flags}  ({plan.total / GIB:.1f} GiB, {rows})"
                fitting.append((change.cost, seconds, text))
        yield from (text for *_, text in sorted(fitting))


def changes(layout: Layout, fixed_batch: bool) -> Iterator[Change]:
    """Changes that reduce memory and that this layout has not made yet."""
    if fixed_batch and layout.micro > 1:
        rows = layout.micro * layout.accumulation
        yield Change("--per_device_train_batch_size 1", replace(layout, micro=1, accumulation=rows))
    if not layout.checkpointing:
        yield Change("--gradient_checkpointing true", replace(layout, checkpointing=True))
    if layout.teacher and layout.objective.workspace_bytes > 2**20 * SMALLEST_WORKSPACE:
        small = replace(layout.objective, loss_workspace_mb=SMALLEST_WORKSPACE)
        yield Change(f"--loss_workspace_mb {SMALLEST_WORKSPACE}", replace(layout, objective=small))
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
            f"--deepspeed {ZERO3}",
            replace(layout, zero=json.loads(repository_file(ZERO3).read_text())),
        )
    if not layout.model.lora_rank:
        if layout.optimizer.startswith("adamw_torch"):
            yield Change("--optim adamw_bnb_8bit", replace(layout, optimizer="adamw_bnb_8bit"))
        lora = replace(layout.model, lora_rank=16, dtype=layout.half or "float32")
        yield Change("--lora_rank 16", replace(layout, model=lora), cost=OTHER_RESULT)
    if layout.model.quantization == "none":
        rank = layout.model.lora_rank or 16
        dtype = layout.half or "float32"
        model = replace(layout.model, quantization="nf4", lora_rank=rank, dtype=dtype)
        flags = "--quantization nf4" + ("" if layout.model.lora_rank else f" --lora_rank {rank}")
        yield Change(flags, replace(layout, model=model), cost=OTHER_RESULT)
    half = layout.max_length // 2
    yield Change(f"--max_length {half}", replace(layout, max_length=half), cost=OTHER_RESULT)
    if layout.device == "cuda" and layout.accumulation % 2 == 0:
        double = replace(
            layout,
            processes=2 * layout.processes,
            accumulation=layout.accumulation // 2,
            per_machine=2 * layout.local_processes,
            teacher_processes=layout.teacher_processes and 2 * layout.teacher_processes,
        )
        yield Change(f"NUM_PROCESSES={double.per_machine}", double, cost=MORE_GPUS)
