"""Fine-tune a model on text and chat: full weights, LoRA or QLoRA.

launch/cpu.sh train/sft.py --config recipes/tiny/sft.yaml
"""

from dataclasses import dataclass

from kd.recipe import parse, setting
from kd.run.exit import run
from kd.settings.distillation import DataSettings, ModelSettings
from kd.settings.training import TrainingSettings
from kd.training.preparation import show_rows
from kd.training.run_training import train


@dataclass
class SftSettings:
    model: str = setting("", "hub name or folder of the model to train")
    show_rows: int = setting(0, "print so many rows with their targets marked, and train nothing")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: not given; wanted a hub name or a folder")


def main() -> None:
    sft, model, data, training = parse(
        SftSettings, ModelSettings, DataSettings, TrainingSettings, description=__doc__
    )
    if sft.show_rows:
        show_rows(sft.show_rows, sft.model, model, data, training)
        return
    train(sft.model, model, data, training)


if __name__ == "__main__":
    run(main)
