"""All settings of one training run as one object, parsed from a recipe file and flags."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kd.distributed import world_size
from kd.recipe import AUTO, NONE, all_mistakes, attempt, mistake, parse
from kd.settings.combinations import check_on_policy, check_teacher_keys
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    Objective,
    OnPolicySettings,
    SftSettings,
    ShowSettings,
    StudentSettings,
)
from kd.settings.teacher import OWN_BASE, TeacherSettings
from kd.settings.training import TrainingSettings, set_by_accelerate

if TYPE_CHECKING:  # Transformers takes seconds to import; mistakes are told before that
    from kd.settings.training_arguments import RunArguments

SFT = Objective(soft_weight=0.0)


@dataclass
class Recipe:
    """The settings of one training run; supervised fine-tuning has no teacher."""

    model_name: str  # hub name or folder of the trained model
    model: ModelSettings
    data: DataSettings
    training: "TrainingSettings | RunArguments"  # the latter from `with_arguments` on
    teacher: TeacherSettings | None = None
    objective: Objective = SFT
    on_policy: OnPolicySettings | None = None
    show_rows: int = 0  # print this many rows instead of training
    chosen: dict[str, str] = field(
        default_factory=dict
    )  # why each key that was `auto` has its value

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


def check_dtype(model: ModelSettings, engine: bool) -> None:
    """Note trained weights of half precision without a float32 copy.

    `engine`: whether DeepSpeed trains, which keeps such copies; DDP does not. Raises ValueError
    outside of `all_mistakes`.
    """
    if not model.lora_rank and not engine and model.dtype not in (AUTO, "float32"):
        mistake(
            f"dtype: {model.dtype} with every weight trained and no DeepSpeed: small updates are "
            "lost to rounding, because there is no float32 copy of the weights; set dtype: float32 "
            "(precision: bfloat16 still computes in bfloat16), or set lora_rank"
        )


def resolve_dtype(model: ModelSettings, precision: str, engine: bool) -> ModelSettings:
    """Replace `dtype: auto` by the precision of the run, where a float32 copy is kept.

    Raises ValueError as `check_dtype` does.
    """
    check_dtype(model, engine)
    kept = bool(model.lora_rank) or engine
    dtype = (precision if kept else "float32") if model.dtype == AUTO else model.dtype
    return replace(model, dtype=dtype)


def expects_engine(training: TrainingSettings) -> bool:
    """Whether DeepSpeed will train, as far as the settings and the launcher say."""
    if training.deepspeed == AUTO:
        return world_size() > 1 or set_by_accelerate("ACCELERATE_USE_DEEPSPEED")
    return training.deepspeed != NONE


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
        recipe = Recipe(sft.model, *settings, show_rows=show.show_rows)
        attempt(check_dtype, recipe.model, expects_engine(recipe.training))
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
        recipe = Recipe(*run, show_rows=show.show_rows)
        attempt(check_dtype, model, expects_engine(training))
        attempt(check_teacher_keys, teacher, model, objective, scoring=not on_policy)
        if on_policy_keys:
            attempt(check_on_policy, on_policy_keys, teacher, data)
        if check_sources:
            check_sources([*data.sources, *data.eval_sources])
    return recipe
