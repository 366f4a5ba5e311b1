"""Choose what a recipe leaves `auto`: precision, attention, sharding, checkpointing, micro-batch.

What the recipe or the command line says is never changed. The rest is decided by the first of these
that has an answer: an earlier start of the same run, the machine file, the memory plan. The plan
takes the smallest of the layouts that fit and are nearly as fast as the fastest. Every choice has a
reason, which is printed and recorded.
"""

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

from kd.models.adapters import is_adapter
from kd.models.frozen import teacher_base
from kd.models.load import has_flash_attention
from kd.planning.activations import CannotTrace
from kd.planning.device_rates import Rates
from kd.planning.fitting import (
    OFFLOADED,
    SHARDED,
    TYPICAL,
    ZERO2,
    ZERO3,
    largest_that_fits,
    layout_of,
    scoring_layout,
)
from kd.planning.layout import GIB, Plan
from kd.planning.machine import Machine
from kd.planning.memory import plan_scoring
from kd.planning.throughput import duration
from kd.recipe import AUTO, NONE
from kd.settings.training import LAUNCHED, MOST_ROWS, derive_batch
from kd.settings.training_recipe import Recipe, resolve_dtype

SPARE = 0.9  # share of the memory that a chosen layout may take, if there is such a layout
NEAR = 1.1  # times the shortest step: up to here, the model cannot tell which layout is faster
# What the memory plan decides; the values that take the least time come first.
PLANNED: dict[str, list] = {
    "deepspeed": [ZERO2, ZERO3],
    "teacher_deepspeed": [NONE, SHARDED],
    "teacher_sharded_over": ["node", "all"],
    "gradient_checkpointing": [False, True],
}


@dataclass(frozen=True)
class Tried:
    """Values of the keys that the plan decides, and what they would cost."""

    values: dict[str, Any]
    plan: Plan
    seconds: float  # per step, modelled


def choose(
    recipe: Recipe, machine: Machine, earlier: dict[str, Any], trains: bool = True
) -> Recipe:
    """Return the recipe with a value for every key that was `auto`; `chosen` holds the reasons.

    `earlier` are the settings of the run that is resumed; {} for a new one. Without `trains`, the
    teacher fills its cache, and there is no student.
    """
    choices = Choices(recipe, machine, trains)
    for key, value in earlier.items():
        choices.take(key, value, "as in the run that is resumed")
    choices.exclude()
    for key, value in machine.file.preferences.given.items():
        choices.take(key, value, f"machine {machine.file.name}")
    choices.choose_precision()
    choices.choose_attention()
    choices.choose_rows()
    choices.choose_dtype()
    choices.choose_layout()
    return choices.recipe


class Choices:
    """A recipe whose `auto` keys are decided one after the other."""

    def __init__(self, recipe: Recipe, machine: Machine, trains: bool) -> None:
        parts = ("training", "model", *(("teacher",) if recipe.teacher else ()))
        copies = {name: copy.copy(getattr(recipe, name)) for name in parts}
        self.recipe, self.machine = replace(recipe, **copies, chosen=dict(recipe.chosen)), machine
        self.parts, self.trains = list(copies.values()), trains

    def undecided(self, key: str) -> bool:
        """Whether this run has the key, and nothing has decided it yet."""
        return any(vars(part).get(key) == AUTO for part in self.parts)

    def set(self, key: str, value: Any) -> None:
        """Set a key in the settings that have it."""
        for part in self.parts:
            if key in vars(part):
                setattr(part, key, value)

    def take(self, key: str, value: Any, reason: str) -> None:
        """Decide a key, unless it is decided."""
        if self.undecided(key):
            self.set(key, value)
            self.recipe.chosen[key] = reason

    def exclude(self) -> None:
        """What this run cannot have, whatever a machine prefers."""
        teacher = self.recipe.separate_teacher if self.trains else self.recipe.teacher
        if not self.trains:
            self.take("deepspeed", NONE, "no student is trained")
            self.take("gradient_checkpointing", False, "no student is trained")
        if self.machine.zero is not None:
            self.take("deepspeed", LAUNCHED, "accelerate's configuration has a DeepSpeed engine")
        if self.machine.processes == 1:
            self.take("deepspeed", NONE, "one process")
            self.take("teacher_deepspeed", NONE, "one process")
        if not teacher:
            self.take("teacher_deepspeed", NONE, "no teacher is loaded beside the student")
        elif is_adapter(teacher.teacher):
            self.take("teacher_deepspeed", NONE, "the teacher is an adapter")
        if self.undecided("teacher_sharded_over") and not self.spans_nodes():
            self.set("teacher_sharded_over", "all")  # this is no choice, so it is not told

    def spans_nodes(self) -> bool:
        """Whether a teacher may be sharded, and the run has several nodes."""
        sharded = self.recipe.teacher.teacher_deepspeed != NONE
        return sharded and self.machine.per_machine not in (None, self.machine.processes)

    def choose_precision(self) -> None:
        """Where to compute, and in which type."""
        cpu = self.machine.device == "cpu"
        self.take("use_cpu", cpu, "there is no GPU" if cpu else "there is a GPU")
        if cpu:
            self.take("precision", "float32", "on a CPU")
        elif self.machine.bfloat16:
            self.take("precision", "bfloat16", "the GPU has it")
        else:
            self.take("precision", "float16", "the GPU has no bfloat16")

    def choose_attention(self) -> None:
        """flash_attention_2 where it can run."""
        names = [self.recipe.model_name] if self.trains else []
        teacher = self.recipe.live_teacher if self.trains else self.recipe.teacher
        if teacher:
            names.append(teacher_base(teacher, self.recipe.model_name))
        lacking = [name for name in names if not has_flash_attention(name)]
        half = self.recipe.training.precision != "float32"
        if not self.machine.flash_attention:
            self.take(
                "attn_implementation",
                "sdpa",
                "flash-attn needs its package and an Ampere GPU or newer",
            )
        elif not half or lacking:
            why = f"flash-attn does not support {lacking[0] if half else 'float32'}"
            self.take("attn_implementation", "sdpa", why)
        self.take("attn_implementation", "flash_attention_2", "flash-attn is installed")

    def choose_rows(self) -> None:
        """The upper limit of the micro-batch, and the micro-batch if it fits."""
        training = self.recipe.training
        self.take("max_per_device_train_batch_size", MOST_ROWS, "no machine file says another")
        if not training.micro_batch_given:
            most, rows = training.max_per_device_train_batch_size, training.global_batch_size
            training.use_batch(*derive_batch(rows, self.machine.processes, most))

    def choose_dtype(self) -> None:
        """The type of the weights, which depends on the precision and on DeepSpeed."""
        training = self.recipe.training
        engine = training.deepspeed != NONE
        vars(self.recipe.model).update(
            vars(resolve_dtype(self.recipe.model, training.precision, engine))
        )

    def choose_layout(self) -> None:
        """Sharding and checkpointing, by the memory plan: a small layout that is fast and fits."""
        keys = [key for key in PLANNED if self.undecided(key)]
        if not keys:
            return
        try:
            tried = self.tried(keys, PLANNED)
            if not any(each.plan.fits for each in tried) and "teacher_deepspeed" in keys:
                tried += self.tried(keys, PLANNED | {"teacher_deepspeed": [OFFLOADED]})
        except CannotTrace as error:
            for key in keys:  # the values that need the least memory without moving weights
                value = ZERO2 if key == "deepspeed" else PLANNED[key][-1]
                self.take(key, value, f"there is no memory plan: {error}")
            return
        roomy = [each for each in tried if each.plan.share <= SPARE]
        # ZeRO-3 is the last resort: its checkpoints belong to one number of processes.
        lower = [each for each in roomy if each.values.get("deepspeed") != ZERO3] or roomy
        # So are gathers between nodes, whose network other jobs may use at the same time.
        plain = [each for each in lower if each.values.get("teacher_sharded_over") != "all"]
        plain = plain or lower
        shortest = min((each.seconds for each in plain), default=0.0)
        near = [each for each in plain if each.seconds <= NEAR * shortest]
        best = min(near or tried, key=lambda each: each.plan.total)
        if best.values.get("teacher_deepspeed") == NONE and "teacher_sharded_over" in keys:
            keys.remove("teacher_sharded_over")
            self.set("teacher_sharded_over", "all")
        for key in keys:
            others = [each for each in plain if each.values[key] != best.values[key]]
            why = reason(best, others, len(tried))
            if key == "deepspeed" and len(lower) < len(roomy):
                why = f"it fits without ZeRO-3, {size(best.plan)}"
            if key == "teacher_sharded_over" and best.values[key] == "node":
                why = f"it fits without gathers between nodes, {size(best.plan)}"
            self.take(key, best.values[key], why)

    def tried(self, keys: list[str], options: dict[str, list]) -> list[Tried]:
        """The plans of all combinations of `options`; of the first alone if it lacks no memory."""
        found = []
        for combination in itertools.product(*(options[key] for key in keys)):
            values = dict(zip(keys, combination, strict=True))
            if values.get("teacher_deepspeed") == NONE and "all" in combination:
                continue  # the same as "node"
            plan = self.planned(values)
            seconds = duration(plan.layout, self.rates).step if self.trains else 0.0
            found.append(Tried(values, plan, seconds))
            most = self.recipe.training.per_device_train_batch_size
            if len(found) == 1 and plan.share <= SPARE and plan.layout.micro >= most:
                break  # the other layouts save memory and cost time
        return found

    def planned(self, values: dict[str, Any]) -> Plan:
        """The plan with the largest micro-batch that fits, if `values` were chosen."""
        trial = Choices(self.recipe, self.machine, self.trains)
        for key, value in values.items():
            trial.set(key, value)
        if not self.trains:
            layout = scoring_layout(trial.recipe, self.recipe.data.max_length, self.machine)
            return plan_scoring(layout)
        layout = layout_of(trial.recipe, self.recipe.data.max_length, self.machine)
        return largest_that_fits(layout, self.recipe.training.micro_batch_given)

    @property
    def rates(self) -> Rates:
        """The rates of the machine file where it has them; they only rank the layouts."""
        file = vars(self.machine.file)
        return replace(TYPICAL, **{n: file[n] for n in vars(TYPICAL) if file.get(n)})


def reason(best: Tried, others: list[Tried], count: int) -> str:
    """Why a value of `best` was chosen; `others` have another value of the key and fit."""
    found = size(best.plan)
    if not best.plan.fits:
        return f"nothing fits; this is the smallest, {found}"
    if count == 1:
        return f"the run fits, {found}"
    if best.plan.share > SPARE:
        return f"the smallest that fits, {found}"
    if not others:
        return f"nothing else leaves memory to spare; {found}"
    ratio = min(each.seconds for each in others) / best.seconds
    why = "the fastest that fits" if ratio >= 1 else "the smallest of the fast ones"
    return f"{why}, {found}; without it a step takes {ratio:.2f} times as long"


def size(plan: Plan) -> str:
    """The memory of a plan, and its micro-batch."""
    rows = f"{plan.layout.micro} row{'s' if plan.layout.micro > 1 else ''}"
    return f"{plan.total / GIB:.1f} of {plan.layout.memory / GIB:.1f} GiB with {rows}"


def lines(recipe: Recipe) -> str:
    """One line for each choice, with its reason."""
    values = recipe.to_dict()
    return "\n".join(
        f"{key}: {str(values[key]).lower() if isinstance(values[key], bool) else values[key]} "
        f"({why})"
        for key, why in recipe.chosen.items()
    )
