"""Train a student on text and on its teacher's distribution over every target token.

launch/cpu.sh train/distill.py --config recipes/tiny/distill.yaml
"""

from dataclasses import dataclass

from kd.recipe import (
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    TeacherSettings,
    TrainingSettings,
    parse,
    setting,
)
from kd.training.exit import run
from kd.training.session import train


@dataclass
class StudentSettings:
    student: str = setting("", "hub name or folder of the model to train")

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student: not given; wanted a hub name or a folder")


def main() -> None:
    student, teacher, objective, model, data, training = parse(
        StudentSettings,
        TeacherSettings,
        ObjectiveSettings,
        ModelSettings,
        DataSettings,
        TrainingSettings,
        description=__doc__,
    )
    train(student.student, model, data, training, teacher, objective)


if __name__ == "__main__":
    run(main)
