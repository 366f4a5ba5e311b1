"""All settings of one training run as one object, parsed from a recipe file and flags."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kd.recipe import all_mistakes, attempt, mistake, parse
from kd.settings.combinations import check_on_policy, check_teacher_keys
from kd.settings.distillation import (
    OWN_BASE,
    DataSettings,
    ModelSettings,
    Objective,
    OnPolicySettings,
    SftSettings,
    ShowSettings,
    StudentSettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings

if TYPE_CHECKING:  # Transformers takes seconds to import; mistakes are told before that
    from kd.settings.training_arguments import RunArguments

SFT = Objective(soft_weight=0.0)


@dataclass
class Recipe:
    """The settings of one training run; supervised fine-tuning has no teacher.

    Raises ValueError if weight updates would be lost to rounding, see `resolve_dtype`.
    """

    model_name: str  # hub name or folder of the trained model
    model: ModelSettings  # with `dtype: auto` resolved
    data: DataSettings
    training: "TrainingSettings | RunArguments"  # the latter from `with_arguments` on
    teacher: TeacherSettings | None = None
    objective: Objective = SFT
    on_policy: OnPolicySettings | None = None
    deepspeed: bool | None = None  # default: as this process was launched
    show_rows: int = 0  # print this many rows instead of training

    def __post_init__(self) -> None:
        if self.deepspeed is None:
            launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower()
            self.deepspeed = bool(self.training.deepspeed) or launched in ("true", "1", "yes")
        self.model = resolve_dtype(self.model, self.training, self.deepspeed)

    def with_arguments(self) -> "Recipe":
        """The recipe with Transformers' TrainingArguments; it imports torch and Transformers."""
        from kd.settings.training_arguments import RunArguments

        return replace(self, training=RunArguments(self.training))

    @property
    def cached_teacher(self) -> bool:
        """Whether the teacher's outputs come from a cache, so that no teacher is loaded."""
        return bool(self.teacher and self.teacher.teacher_cache)

    @property
    def live_teacher(self) -> TeacherSettings | None:
        """The teacher that runs in the training step, if there is one."""
        return None if self.cached_teacher else self.teacher

    @property
    def separate_teacher(self) -> TeacherSettings | None:
        """The live teacher if it has weights of its own; the student's frozen base has none."""
        live = self.live_teacher
        return live if live and live.teacher != OWN_BASE else None

    @property
    def generates_answers(self) -> bool:
        """Whether the student generates some of the answers that it is trained on."""
        return bool(self.on_policy and self.on_policy.student_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Every recipe key with its value, as run.json and the checkpoints record it."""
        values = {"student" if self.teacher else "model": self.model_name}
        values |= asdict(self.model) | asdict(self.data) | self.training.to_dict()
        if self.teacher:
            values |= asdict(self.teacher) | asdict(self.objective)
        return values | (asdict(self.on_policy) if self.on_policy else {})


def resolve_dtype(
    model: ModelSettings, training: TrainingSettings, deepspeed: bool
) -> ModelSettings:
    """Replace `dtype: auto` by the precision of bf16 / fp16, where a float32 copy is kept.

    DeepSpeed keeps float32 copies of trained weights, DDP does not. Raises ValueError if trained
    weights would have half precision and no float32 copy.
    """
    no_copy = not model.lora_rank and not deepspeed
    dtype = model.dtype
    if dtype == "auto":
        half = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
        dtype = "float32" if no_copy else half
    if no_copy and dtype != "float32":
        mistake(
            f"dtype: {dtype} with every weight trained and no DeepSpeed: small updates are lost to "
            "rounding, because there is no float32 copy of the weights; set dtype: float32 (bf16: "
            "true still computes in bfloat16), or set lora_rank"
        )
    return replace(model, dtype=dtype)


CheckSources = Callable[[list[dict]], None]  # kd.data.sources.check_sources, of a later room


def parse_sft(
    description: str = "", argv: list[str] | None = None, check_sources: CheckSources | None = None
) -> Recipe:
    """The recipe of train/sft.py.

    Raises ValueError with a line for every mistake in the recipe and the flags.
    """
    kinds = (SftSettings, ModelSettings, DataSettings, TrainingSettings, ShowSettings)
    with all_mistakes():
        sft, *settings, show = parse(*kinds, argv=argv, description=description)
        recipe = attempt(Recipe, sft.model, *settings, show_rows=show.show_rows)
        if check_sources:
            check_sources([*settings[1].sources, *settings[1].eval_sources])
    return recipe


def parse_distillation(
    description: str = "",
    argv: list[str] | None = None,
    on_policy: bool = True,
    check_sources: CheckSources | None = None,
) -> Recipe:
    """The recipe of train/distill.py; without its on-policy keys, that of train/cache_teacher.py.

    Raises ValueError with a line for every mistake in the recipe and the flags.
    """
    kinds = (StudentSettings, TeacherSettings, Objective, ModelSettings, DataSettings)
    kinds += (TrainingSettings,)
    kinds += (OnPolicySettings, ShowSettings) if on_policy else ()
    with all_mistakes():
        student, teacher, objective, model, data, training, *rest = parse(
            *kinds, argv=argv, description=description
        )
        on_policy_keys, show = rest or (None, ShowSettings())
        run = (student.student, model, data, training, teacher, objective, on_policy_keys)
        recipe = attempt(Recipe, *run, show_rows=show.show_rows)
        attempt(check_teacher_keys, teacher, model, objective, scoring=not on_policy)
        if on_policy_keys:
            attempt(check_on_policy, on_policy_keys, teacher, data)
        if check_sources:
            check_sources([*data.sources, *data.eval_sources])
    return recipe
