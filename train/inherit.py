"""Make a student of some of its parent's blocks.

python train/inherit.py --parent data/quickstart/teacher --keep 3 --output_dir runs/student

--choice says which: even (evenly spaced, with the first and the last), first or last; or measured
on --data, which is read up to --tokens: angular (without the blocks that turn the hidden states
least), angular_run (without the run of blocks that does), perplexity (without the blocks that are
missed least). --layers 0 2 5 names them instead.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kd.data.sources import check_sources
from kd.data.tokenizer import load_tokenizer
from kd.distributed import device
from kd.evaluation.influence import MEASURED, measured_layers, text_batches
from kd.models.inherit import CHOICES, check_keep, check_layers, inherit, parent_config
from kd.recipe import parse, parse_json_list, setting
from kd.run.exit import is_done, mark_done, run
from kd.run.run_record import write_record


@dataclass
class InheritSettings:
    parent: str = setting("", "hub name or folder, not quantised; also in several files")
    layers: list[int] = field(
        default_factory=list, metadata={"help": "blocks to keep, counted from 0: 0 2 5"}
    )
    keep: int = setting(0, "number of blocks to keep, where `choice` says which")
    choice: Literal["even", "first", "last", "angular", "angular_run", "perplexity"] = setting(
        "even", "of the blocks; the last three are measured on `data`"
    )
    data: str = setting("", "JSON list of sources to measure on: [{path, split, count, ...}, ...]")
    mixture_seed: int = setting(0, "draws the rows of `data`")
    max_length: int = setting(512, "tokens a row at most, where measured")
    tokens: int = setting(20_000, "measured at most, of rows drawn from all of `data`")
    batch_size: int = setting(8, "rows a forward; the figures do not depend on it")
    output_dir: str = setting("", "folder of the student")

    def __post_init__(self) -> None:
        for key in ("parent", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; --help says what it means")
        if bool(self.layers) == bool(self.keep):
            found = "both" if self.layers else "neither"
            raise ValueError(
                f"layers, keep: {found} given; wanted one: --layers 0 2 5, or --keep 3"
            )
        self.sources = parse_json_list("data", self.data)
        measured = not self.layers and self.choice in MEASURED
        if measured != bool(self.sources):
            raise ValueError(
                f"choice: {self.choice} is measured on text; give data"
                if measured
                else "data: given, and nothing is measured on it; wanted keep with a choice of "
                + ", ".join(MEASURED)
            )
        check_sources(self.sources)
        if self.max_length < 2 or self.tokens < 2 or self.batch_size < 1:
            raise ValueError("max_length, tokens: wanted 2 or more; batch_size: 1 or more")


def main() -> None:
    (settings,) = parse(InheritSettings, description=__doc__)
    depth = parent_config(settings.parent).num_hidden_layers
    if settings.layers:
        check_layers(settings.layers, depth)
    else:
        check_keep(settings.keep, depth)
    if is_done(settings.output_dir):
        print(f"{settings.output_dir} is finished already; remove it to make it anew")
        return
    tokenizer = load_tokenizer(settings.parent)
    parent = AutoModelForCausalLM.from_pretrained(
        settings.parent, dtype="auto", device_map={"": device()} if settings.sources else None
    ).eval()
    layers, figures = choose(settings, parent, tokenizer)
    student = inherit(parent, layers)
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    student.save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    write_record(settings.output_dir, [settings])
    mark_done(settings.output_dir, {"layers": layers, "of": depth, **figures})
    print(
        f"saved to {settings.output_dir}: blocks {layers} of {depth}, "
        f"{student.num_parameters():,} parameters of {parent.num_parameters():,}"
    )


def choose(
    settings: InheritSettings, parent, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], dict]:
    """(the blocks to keep, the figures that chose them)."""
    if settings.layers:
        return settings.layers, {}
    if settings.choice in CHOICES:
        return CHOICES[settings.choice](settings.keep, parent.config.num_hidden_layers), {}
    batches = text_batches(
        settings.sources,
        tokenizer,
        settings.max_length,
        settings.tokens,
        settings.batch_size,
        settings.mixture_seed,
    )
    layers, figures = measured_layers(
        settings.choice, parent, batches, len(tokenizer), settings.keep
    )
    print(json.dumps(figures))
    return layers, figures


if __name__ == "__main__":
    run(main)
