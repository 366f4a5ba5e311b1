"""Combinations of keys that cannot work, as far as the keys alone say it."""

from kd.recipe import mistake
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    Objective,
    OnPolicySettings,
)
from kd.settings.model_paths import require_model
from kd.settings.teacher import OWN_BASE, TeacherSettings

NO_HIDDEN_STATES = (
    "hidden_weight with teacher_cache: a cache has distributions but no hidden states; remove "
    "hidden_weight, or remove teacher_cache so that the teacher runs in every step"
)


def check_teacher_keys(
    teacher: TeacherSettings, model: ModelSettings, objective: Objective, scoring: bool = False
) -> None:
    """Note what a teacher without weights of its own, or with another tokenizer, excludes.

    With `scoring` the teacher is to fill a cache. Raises ValueError outside of `all_mistakes`.
    """
    if scoring:
        if not teacher.teacher_cache:
            mistake("teacher_cache: not given; wanted the folder for the teacher's outputs")
        elif teacher.teacher != OWN_BASE:  # with a cache, training may leave the teacher out
            require_model("teacher", teacher.teacher)
        if teacher.teacher == OWN_BASE:
            mistake(
                "teacher: self; wanted a model to score with: give the name of the student's base"
            )
    if teacher.teacher_cache and objective.hidden_weight:
        mistake(NO_HIDDEN_STATES)
    own = teacher.teacher == OWN_BASE and not teacher.teacher_cache
    if own and not model.lora_rank:
        mistake(
            "teacher: self is the student without its adapters, but lora_rank: 0 means that it has "
            "none; set lora_rank (16, for example) or give the name of a teacher"
        )
    if not teacher.align_tokenizers:
        return
    if teacher.teacher_cache:
        mistake(
            "align_tokenizers: true with teacher_cache: a cache stores the most likely ids of one "
            "vocabulary; remove one of the two"
        )
    if teacher.teacher == OWN_BASE:
        mistake(
            "align_tokenizers: true with teacher: self: this teacher has the student's tokenizer; "
            "remove align_tokenizers"
        )
    if objective.hidden_weight:
        mistake(
            "align_tokenizers: true with hidden_weight: hidden states of different tokens cannot "
            "be compared; set hidden_weight: 0"
        )


def check_on_policy(
    settings: OnPolicySettings, teacher: TeacherSettings, data: DataSettings
) -> None:
    """Note what excludes on-policy rows. Raises ValueError outside of `all_mistakes`."""
    if not settings.student_fraction:
        return
    share = f"student_fraction: {settings.student_fraction}"
    if teacher.teacher_cache:
        mistake(
            f"{share} with teacher_cache: a cache has no scores for text that the student has yet "
            "to generate; remove teacher_cache, so that the teacher runs in every step"
        )
    if teacher.align_tokenizers:
        mistake(
            f"{share} with align_tokenizers: generated text cannot be aligned in advance; train on "
            "the data alone (student_fraction: 0), or use a teacher with the student's tokenizer"
        )
    if data.packing:
        mistake(
            f"{share} with packing: a generated answer differs in length from the one it replaces, "
            "and a packed row has no room for it; set packing: false, and "
            "train_sampling_strategy: group_by_length to reduce padding"
        )
