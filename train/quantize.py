"""Quantize a model to 4 bits by rounding to nearest: NF4 or AWQ.

python train/quantize.py --model runs/teacher --output_dir runs/teacher-nf4 --format nf4

Transformers reads NF4 with bitsandbytes. AWQ is written without the activation-aware search:
AutoAWQ's search for better scales needs text and a GPU, and loses less accuracy.
eval/teacher_cost.py measures the loss of any checkpoint. After an interruption, the same command
continues after the last complete file.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from kd.recipe import check_ranges, parse, require_given, setting
from kd.run.exit import run
from kd.run.finished import done_settings, finished_before, mark_done
from kd.run.folder_lock import lock_folder


@dataclass
class QuantizeSettings:
    """The model to quantize and the format."""

    model: str = setting("", "Hub name or folder of the unquantized model.")
    output_dir: str = setting("", "Folder of the 4-bit checkpoint.")
    format: Literal["awq", "nf4"] = setting("awq", "Format of the packed weights.")
    group_size: int | None = setting(
        None,
        "Number of inputs that share one scale and one zero point in AWQ; by default 128.",
        least=1,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        require_given(self, "model", "output_dir")
        if self.format == "awq":
            self.group_size = self.group_size or 128
        elif self.group_size:
            raise ValueError(
                f"group_size: {self.group_size}, but NF4 has blocks of 64 numbers; leave it out"
            )


def main() -> None:
    (settings,) = parse(QuantizeSettings, description=__doc__)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.data.tokenizer import load_tokenizer
    from kd.models.awq_writer import awq_format
    from kd.models.nf4_writer import nf4_format
    from kd.models.packed_writer import (
        choose_linears,
        open_unquantized,
        write_config,
        write_tensors,
    )

    out = settings.output_dir
    config, files = open_unquantized(settings.model)
    nf4 = settings.format == "nf4"
    form = nf4_format(config.dtype) if nf4 else awq_format(settings.group_size)
    packed, skipped = choose_linears(config, files, form)
    lock_folder("output_dir", out)
    if finished_before(out, done_settings(out), asdict(settings)):
        return
    write_config(out, settings.model, files.folder, form, skipped)
    size = write_tensors(out, files, packed, form)
    load_tokenizer(settings.model).save_pretrained(out)
    mark_done(out, asdict(settings) | {"bytes": size})
    print(f"saved to {out}: {len(packed)} 4-bit layers, {size:,} bytes of {files.total_bytes:,}")


if __name__ == "__main__":
    run(main)
