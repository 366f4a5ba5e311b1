"""Quantize a model to 4-bit AWQ by rounding to nearest, without the activation-aware search.

python train/quantize.py --model runs/teacher --output_dir runs/teacher-awq

AutoAWQ's search for better scales needs text and a GPU, and loses less accuracy;
eval/teacher_cost.py measures the loss of either checkpoint. After an interruption, the same command
continues after the last complete file.
"""

from dataclasses import asdict, dataclass

from kd.recipe import check_ranges, parse, require_given, setting
from kd.run.exit import run
from kd.run.finished import done_settings, finished_before, mark_done
from kd.run.folder_lock import lock_folder


@dataclass
class QuantizeSettings:
    """The model to quantize and the group size."""

    model: str = setting("", "Hub name or folder of the unquantized model.")
    output_dir: str = setting("", "Folder of the AWQ checkpoint.")
    group_size: int = setting(
        128, "Number of inputs that share one scale and one zero point.", least=1
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        require_given(self, "model", "output_dir")


def main() -> None:
    (settings,) = parse(QuantizeSettings, description=__doc__)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.data.tokenizer import load_tokenizer
    from kd.models.awq_writer import choose_linears, open_unquantized, write_config, write_tensors

    out = settings.output_dir
    config, files = open_unquantized(settings.model)
    packed, skipped = choose_linears(config, files, settings.group_size)
    lock_folder("output_dir", out)
    if finished_before(out, done_settings(out), asdict(settings)):
        return
    write_config(out, settings.model, files.folder, settings.group_size, skipped)
    size = write_tensors(out, files, packed, settings.group_size)
    load_tokenizer(settings.model).save_pretrained(out)
    mark_done(out, asdict(settings) | {"bytes": size})
    print(f"saved to {out}: {len(packed)} 4-bit layers, {size:,} bytes of {files.total_bytes:,}")


if __name__ == "__main__":
    run(main)
