"""Score a recipe's rows with its teacher once; distill.py then trains with no teacher loaded.

launch/cpu.sh train/cache_teacher.py --config recipes/small/d_distill.yaml --teacher_cache runs/small/cache

The recipe is that of train/distill.py, so that rows, tokenizer, template and temperature are those
of the training; run train/distill.py with the same --teacher_cache afterwards. Killed, it goes on
by the same command.
"""

from kd.losses.objective import Objective
from kd.recipe import parse
from kd.run.exit import run
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    StudentSettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings
from kd.teachers.cache_error import UntrainedStudent
from kd.teachers.cached import signal_of
from kd.teachers.scoring import describe, fill_cache
from kd.training.preparation import prepare_scoring


def main() -> None:
    student, teacher, objective, model, data, training = parse(
        StudentSettings,
        TeacherSettings,
        Objective,
        ModelSettings,
        DataSettings,
        TrainingSettings,
        description=__doc__,
    )
    model, loss, tokenizer, manifest, documents = prepare_scoring(
        student.student, model, data, training, teacher, objective
    )
    cache, whole = fill_cache(teacher, model, training, documents, manifest, tokenizer.pad_token_id)
    if training.process_index == 0:
        print(describe(cache))
        if whole:
            untrained = UntrainedStudent(student.student, model, tokenizer, training.device)
            known = (
                (row, signal_of(cache.records([row]), manifest), all_ids) for row, all_ids in whole
            )
            print(untrained.error(loss, known))
        print(f"saved to {teacher.teacher_cache}")


if __name__ == "__main__":
    run(main)
