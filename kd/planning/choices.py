"""Choose what a recipe leaves `auto`: precision, attention, sharding, checkpointing, micro-batch.

What the recipe or the command line says is never changed. The rest is decided by the first of these
that has an answer: an earlier start of the same run, the machine file, the memory plan. The plan
takes the layout with the shortest step that fits, that is, leaves memory to spare. Every choice has
a reason, which is printed and recorded.
"""

import copy
import itertools
from dataclasses import replace
from typing import Any

from kd.models.adapters import is_adapter
from kd.models.frozen import teacher_base
from kd.models.load import has_flash_attention
from kd.planning.activations import CannotTrace
from kd.planning.fitting import (
    OFFLOADED,
    SHARDED,
    ZERO2,
    ZERO3,
    layout_of,
    rates_of,
    scoring_layout,
    splits,
    step_seconds,
)
from kd.planning.machine import Machine
from kd.planning.memory import plan_scoring, plan_training
from kd.planning.search import MICRO, Candidate, search
from kd.recipe import AUTO, NONE
from kd.settings.distillation import LOSS_WORKSPACE, SMALLEST_WORKSPACE
from kd.settings.teacher import TEACHER_WORKSPACE
from kd.settings.training import LAUNCHED, MOST_ROWS, derive_batch
from kd.settings.training_recipe import Recipe, resolve_dtype

# What the memory plan decides. Of values that take equally long, the first that fits is chosen.
PLANNED: dict[str, list] = {
    "deepspeed": [ZERO2, ZERO3],
    "teacher_deepspeed": [NONE, SHARDED],
    "teacher_sharded_over": ["node", "all"],
    "gradient_checkpointing": [False, True],
    "loss_workspace_mb": [SMALLEST_WORKSPACE, LOSS_WORKSPACE, 4 * LOSS_WORKSPACE],
    "teacher_workspace_mb": [TEACHER_WORKSPACE, 4 * TEACHER_WORKSPACE],
}
# Keys that have an effect only if the teacher is sharded.
SHARDED_ONLY = {key: PLANNED[key] for key in ("teacher_sharded_over", "teacher_workspace_mb")}
# Without a plan: the values that need the least memory without moving weights.
UNPLANNED = {
    "deepspeed": ZERO2,
    "teacher_deepspeed": SHARDED,
    "teacher_sharded_over": "all",
    "gradient_checkpointing": True,
    "loss_workspace_mb": LOSS_WORKSPACE,
    "teacher_workspace_mb": TEACHER_WORKSPACE,
}


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
        parts = ("training", "model", *(("teacher", "objective") if recipe.teacher else ()))
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
                vars(part)[key] = value  # an Objective is frozen, and this is a copy

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
            self.keep_default("loss_workspace_mb")
        if self.machine.zero is not None:
            self.take("deepspeed", LAUNCHED, "accelerate's configuration has a DeepSpeed engine")
        if self.machine.processes == 1:
            self.take("deepspeed", NONE, "one process")
            self.take("teacher_deepspeed", NONE, "one process")
        if not teacher:
            self.take("teacher_deepspeed", NONE, "no teacher is loaded beside the student")
        elif is_adapter(teacher.teacher):
            self.take("teacher_deepspeed", NONE, "the teacher is an adapter")
        if self.teacher_deepspeed == NONE or not self.spans_nodes():
            self.keep_default("teacher_sharded_over")
        if not self.trains or self.teacher_deepspeed == NONE:
            self.keep_default("teacher_workspace_mb")

    def keep_default(self, key: str) -> None:
        """Decide a key that is no choice in this run, so that nothing is told."""
        if self.undecided(key):
            self.set(key, UNPLANNED[key])

    def spans_nodes(self) -> bool:
        """Whether the run has several nodes."""
        return self.machine.per_machine not in (None, self.machine.processes)

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
        """What the memory plan decides: the layout with the shortest step that fits."""
        keys = [key for key in PLANNED if self.undecided(key)]
        if not keys:
            return
        plan = plan_training if self.trains else plan_scoring
        try:
            found = search(self.candidates(keys, PLANNED), plan)
            if found.plan.exceeds and "teacher_deepspeed" in keys:
                offloaded = PLANNED | {"teacher_deepspeed": [OFFLOADED]}
                moved = search(self.candidates(keys, offloaded), plan)
                found = min(found, moved, key=lambda each: each.plan.total)
        except CannotTrace as error:
            for key in keys:
                self.take(key, UNPLANNED[key], f"there is no memory plan: {error}")
            return
        layout, values = found.plan.layout, found.best.values
        for key in keys:
            if key in SHARDED_ONLY and values["teacher_deepspeed"] == NONE:
                self.keep_default(key)
            else:
                self.take(key, values[key], found.reason(key))
        training = self.recipe.training
        if self.trains and not training.micro_batch_given:
            training.use_batch(layout.micro, layout.accumulation)
            if len({each.layout.micro for each in found.ranked}) > 1:
                self.recipe.chosen[MICRO] = found.reason(MICRO)

    def candidates(self, keys: list[str], options: dict[str, list]) -> list[Candidate]:
        """All combinations of `options`, each with every micro-batch that the recipe allows."""
        found, training = [], self.recipe.training
        for combination in itertools.product(*(options[key] for key in keys)):
            values = dict(zip(keys, combination, strict=True))
            teacher = values.setdefault("teacher_deepspeed", self.teacher_deepspeed)
            if teacher == NONE and any(
                values.get(k, v[0]) != v[0] for k, v in SHARDED_ONLY.items()
            ):
                continue  # nothing is sharded, so the value has no effect
            trial = Choices(self.recipe, self.machine, self.trains)
            for key, value in values.items():
                trial.set(key, value)
            # ZeRO-3's checkpoints belong to one number of processes; the network between nodes may
            # be used by other jobs at the same time.
            resorts = (
                values.get("deepspeed") == ZERO3,
                values.get("teacher_sharded_over") == "all",
            )
            length = self.recipe.data.max_length
            if not self.trains:
                layout = scoring_layout(trial.recipe, length, self.machine)
                found.append(Candidate(values, layout, 0.0, resorts))
                continue
            whole = layout_of(trial.recipe, length, self.machine)
            for layout in splits(whole, training.micro_batch_given):
                seconds = step_seconds(layout, rates_of(self.machine.file))
                found.append(Candidate(values | {MICRO: layout.micro}, layout, seconds, resorts))
        return found

    @property
    def teacher_deepspeed(self) -> str:
        """How the teacher is sharded, NONE without a teacher."""
        return self.recipe.teacher.teacher_deepspeed if self.recipe.teacher else NONE


def lines(recipe: Recipe) -> str:
    """One line for each choice, with its reason."""
    values = recipe.to_dict()
    return "\n".join(
        f"{key}: {str(values[key]).lower() if isinstance(values[key], bool) else values[key]} "
        f"({why})"
        for key, why in recipe.chosen.items()
    )
