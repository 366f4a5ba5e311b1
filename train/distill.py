"""Train a student on text and on its teacher's distribution over every target token.

launch/cpu.sh train/distill.py --config recipes/small/d_distill.yaml
"""

from kd.losses.objective import Objective
from kd.recipe import parse
from kd.run.exit import run
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    OnPolicySettings,
    StudentSettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings
from kd.training.run_training import train


def main() -> None:
    student, teacher, objective, on_policy, model, data, training = parse(
        StudentSettings,
        TeacherSettings,
        Objective,
        OnPolicySettings,
        ModelSettings,
        DataSettings,
        TrainingSettings,
        description=__doc__,
    )
    train(student.student, model, data, training, teacher, objective, on_policy)


if __name__ == "__main__":
    run(main)
