"""Make a student of some of its parent's blocks.

python train/inherit.py --parent data/quickstart/teacher --layers 0 2 5 --output_dir runs/student
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from kd.models.inherit import check_layers, inherit
from kd.models.tokenizer import load_tokenizer
from kd.recipe import parse, setting
from kd.training.checkpoint import write_record
from kd.training.exit import mark_done, run


@dataclass
class InheritSettings:
    parent: str = setting("", "hub name or folder, not quantised")
    layers: list[int] = field(
        default_factory=list, metadata={"help": "blocks to keep, counted from 0: 0 2 5"}
    )
    output_dir: str = setting("", "folder of the student")

    def __post_init__(self) -> None:
        for key in ("parent", "layers", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; --help says what it means")


def main() -> None:
    (settings,) = parse(InheritSettings, description=__doc__)
    depth = AutoConfig.from_pretrained(settings.parent).get_text_config().num_hidden_layers
    check_layers(settings.layers, depth)
    tokenizer = load_tokenizer(settings.parent)
    parent = AutoModelForCausalLM.from_pretrained(settings.parent)
    student = inherit(parent, settings.layers)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    student.save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    write_record(settings.output_dir, [settings])
    mark_done(settings.output_dir, {"layers": settings.layers, "of": depth})
    print(
        f"saved to {settings.output_dir}: blocks {settings.layers} of {depth}, "
        f"{student.num_parameters():,} parameters of {parent.num_parameters():,}"
    )


if __name__ == "__main__":
    run(main)
