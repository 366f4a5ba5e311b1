"""Build a student from some of its parent's layers.

python train/inherit.py --parent data/quickstart/teacher --keep 3 --output_dir runs/student

--choice selects the layers: even (evenly spaced, with the first and the last), first, last, or by
measurements on up to --tokens tokens of --data. Of the measured choices, angular removes the layers
that change the direction of the hidden states least. angular_run removes the run of consecutive
layers that changes it least. perplexity removes the layers whose removal raises the perplexity
least. To name the layers instead, use --layers 0 2 5.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from kd.data.sources import check_sources
from kd.gpu import device
from kd.recipe import (
    check_ranges,
    mistake,
    parse,
    parse_json_list,
    require_given,
    setting,
)
from kd.run.exit import run
from kd.run.finished import finished_before, mark_done
from kd.run.folder_lock import lock_folder
from kd.run.run_record import recorded_settings, write_record

MEASURED_CHOICES = ("angular", "angular_run", "perplexity")


@dataclass
class InheritSettings:
    """The parent, and which of its layers the student gets."""

    parent: str = setting("", "Hub name or folder of the unquantized parent.")
    layers: list[int] = setting([], "Layers to keep, counted from 0: 0 2 5.", least=0)
    keep: int = setting(0, "Number of layers to keep; --choice decides which ones.", least=0)
    choice: Literal["even", "first", "last", "angular", "angular_run", "perplexity"] = setting(
        "even", "How to choose the layers; angular, angular_run and perplexity measure on --data."
    )
    data: str = setting(
        "", "JSON list of sources for a measured choice: [{path, split, count, ...}, ...]."
    )
    mixture_seed: int = setting(0, "Seed that draws the rows of data.")
    max_length: int = setting(512, "Maximum number of tokens per measured row.", least=2)
    tokens: int = setting(
        20_000, "Maximum number of measured tokens, over all sources of data.", least=2
    )
    batch_size: int = setting(8, "Rows per forward pass; results do not depend on it.", least=1)
    output_dir: str = setting("", "Folder of the student.")

    def __post_init__(self) -> None:
        check_ranges(self)
        require_given(self, "parent", "output_dir")
        if bool(self.layers) == bool(self.keep):
            found = "both" if self.layers else "neither"
            mistake(f"layers, keep: {found} given; wanted one: --layers 0 2 5, or --keep 3")
        self.sources = parse_json_list("data", self.data)
        measured = not self.layers and self.choice in MEASURED_CHOICES
        if measured and not self.sources:
            mistake(f"choice: {self.choice} is measured on text; give data")
        if self.sources and not measured:
            mistake(
                "data: given, but nothing is measured on it; wanted keep with a choice of "
                + ", ".join(MEASURED_CHOICES)
            )
        check_sources(self.sources)


def main() -> None:
    (settings,) = parse(InheritSettings, description=__doc__)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.data.tokenizer import load_tokenizer
    from kd.models.frozen import load_frozen
    from kd.models.inherit import inherit

    depth = check_parent_and_layers(settings)
    lock_folder("output_dir", settings.output_dir)
    earlier = recorded_settings(settings.output_dir)
    if finished_before(settings.output_dir, earlier, asdict(settings), free=("batch_size",)):
        return
    tokenizer = load_tokenizer(settings.parent)
    parent = load_frozen(settings.parent, device=device() if settings.sources else "cpu")
    layers, measured = choose_layers(settings, parent, tokenizer)
    student = inherit(parent, layers)
    student.save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    write_record(settings.output_dir, [settings])
    mark_done(settings.output_dir, {"layers": layers, "of": depth, **measured})
    print(
        f"saved to {settings.output_dir}: layers {layers} of {depth}, "
        f"{student.num_parameters():,} of {parent.num_parameters():,} parameters"
    )


def check_parent_and_layers(settings: InheritSettings) -> int:
    """The parent's number of layers. Raises ValueError before any weights are loaded."""
    from kd.models.inherit import check_keep, check_layers, parent_config

    depth = parent_config(settings.parent).num_hidden_layers
    if settings.layers:
        check_layers(settings.layers, depth)
    else:
        check_keep(settings.keep, depth)
    return depth


def choose_layers(settings: InheritSettings, parent, tokenizer) -> tuple[list[int], dict]:
    """The layers to keep, and the measurements that chose them."""
    from kd.evaluation.influence import choose_by_influence, text_batches
    from kd.models.inherit import CHOICES

    if settings.layers:
        return settings.layers, {}
    if settings.choice in CHOICES:
        return CHOICES[settings.choice](settings.keep, parent.config.num_hidden_layers), {}
    limits = (settings.max_length, settings.tokens, settings.batch_size, settings.mixture_seed)
    batches = text_batches(settings.sources, tokenizer, *limits)
    layers, measured = choose_by_influence(
        settings.choice, parent, batches, len(tokenizer), settings.keep
    )
    print(json.dumps(measured))
    return layers, measured


if __name__ == "__main__":
    run(main)
