"""Quantize a model to 4-bit AWQ by rounding to nearest, without the activation-aware search.

python train/quantize.py --model runs/teacher --output_dir runs/teacher-awq

AutoAWQ's search for better scales needs text and a GPU, and loses less accuracy;
eval/teacher_cost.py measures the loss of either checkpoint. After an interruption, the same command
continues after the last complete file.
"""

from dataclasses import asdict, dataclass

from kd.data.tokenizer import load_tokenizer
from kd.models.awq_writer import choose_linears, open_unquantized, write_config, write_tensors
from kd.recipe import parse, require_given, setting
from kd.run.exit import is_done, mark_done, run


@dataclass
class QuantizeSettings:
    """The model to quantize and the group size."""

    model: str = setting("", "Hub name or folder of the unquantized model.")
    output_dir: str = setting("", "Folder of the AWQ checkpoint.")
    group_size: int = setting(128, "Number of inputs that share one scale and one zero point.")

    def __post_init__(self) -> None:
        require_given(self, "model", "output_dir")
        if self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size}; wanted 1 or more (128, for example)")


def main() -> None:
    (settings,) = parse(QuantizeSettings, description=__doc__)
    out = settings.output_dir
    config, files = open_unquantized(settings.model)
    packed, skipped = choose_linears(config, files, settings.group_size)
    write_config(out, settings.model, files.folder, settings.group_size, skipped)
    if is_done(out):
        print(f"{out} is finished already; remove it to quantize again")
        return
    size = write_tensors(out, files, packed, settings.group_size)
    load_tokenizer(settings.model).save_pretrained(out)
    mark_done(out, asdict(settings) | {"bytes": size})
    print(f"saved to {out}: {len(packed)} 4-bit layers, {size:,} bytes of {files.total_bytes:,}")


if __name__ == "__main__":
    run(main)
