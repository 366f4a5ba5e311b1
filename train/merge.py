"""Merge a LoRA adapter into its base, so that plain Transformers can load the result.

python train/merge.py --adapter runs/student --output_dir runs/student-merged

The sum is computed in float32 on the CPU (4 bytes of memory per parameter) and rounded once. The
base is loaded unquantized even if the adapter was trained on 4-bit weights (QLoRA); the difference
between the merged and the trained model is then measured on rows of the run and printed. With
--llama_cpp FOLDER (a checkout of llama.cpp, or the one in the source package of llama-cpp-python),
the script also writes a GGUF file, loads it back and compares it. README.md in the output folder is
a model card.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kd.data.sources import check_sources
from kd.recipe import check_ranges, parse, parse_json_list, require_given, setting
from kd.run.exit import run
from kd.run.finished import done_settings, finished_before, mark_done
from kd.run.folder_lock import lock_folder


@dataclass
class MergeSettings:
    """The adapter, the merged model's format, and what to measure on it."""

    adapter: str = setting("", "Folder of a LoRA adapter: adapter_config.json and its weights.")
    output_dir: str = setting("", "Folder of the merged model.")
    base: str | None = setting(
        None, "Hub name or folder of the base; by default the base that the adapter names."
    )
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "Type of the merged weights.")
    quantization: Literal["auto", "none", "nf4"] = setting(
        "auto",
        "Quantization of the base during training; with nf4 the merged model is compared with the "
        "trained one. auto reads it from run.json.",
    )
    data: str | None = setting(
        None,
        "JSON list of sources for the comparison; by default the run's held-out or training data.",
    )
    compared_rows: int = setting(16, "Rows of each source in the comparison.", least=1)
    llama_cpp: str | None = setting(
        None, "Folder with convert_hf_to_gguf.py; if given, a GGUF file is written as well."
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = setting("bf16", "Type of the GGUF weights.")
    results: str | None = setting(
        None, "Folder of evaluation results for the table in the model card."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        require_given(self, "adapter", "output_dir", hint="wanted a folder")
        parse_json_list("data", self.data)

    def read_adapter(self) -> None:
        """Fill in what the adapter's folder says: its base, its run and the rows to compare on.

        Raises ValueError if it is not the folder of a LoRA adapter.
        """
        from kd.models.card import read_run
        from kd.models.gguf import check_llama_cpp
        from kd.models.merging import check_lora

        adapter_base = check_lora(self.adapter, self.output_dir)
        self.base = self.base or adapter_base
        if self.llama_cpp:
            check_llama_cpp(self.llama_cpp)
        self.run = read_run(self.adapter)
        if self.quantization == "auto":
            self.quantization = self.run.get("quantization", "none")
        given = self.data or self.run.get("eval_data") or self.run.get("data")
        self.sources = parse_json_list("data", given)
        if self.data:
            check_sources(self.sources)


def main() -> None:
    (settings,) = parse(MergeSettings, description=__doc__)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.data.tokenizer import generation_config
    from kd.models.adapters import model_tokenizer
    from kd.models.card import model_card
    from kd.models.merging import check_unquantized, merge_adapter

    settings.read_adapter()
    out = Path(settings.output_dir)
    lock_folder("output_dir", settings.output_dir)
    if finished_before(settings.output_dir, done_settings(out), asdict(settings)):
        return
    check_unquantized(settings.base)
    tokenizer = model_tokenizer(settings.adapter, settings.base)
    model = merge_adapter(settings.adapter, settings.base, settings.dtype)
    model.generation_config = generation_config(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    measured = measure(settings, model, tokenizer)
    card = model_card(str(out), settings.base, settings.run, measured, settings.results)
    (out / "README.md").write_text(card)
    (out / "merge.json").write_text(json.dumps(measured, indent=2) + "\n")
    mark_done(settings.output_dir, asdict(settings))
    print(f"saved to {out}: {model.num_parameters():,} parameters, {settings.dtype}")


def measure(settings: MergeSettings, model, tokenizer) -> dict[str, dict]:
    """Compare the merged model with the trained one, and write and compare the GGUF file."""
    from kd.evaluation.merged import four_bit_difference
    from kd.models.gguf import compare_gguf, write_gguf

    measured: dict[str, dict] = {}
    if settings.quantization == "nf4":
        data = (settings.sources, settings.compared_rows)
        measured["four_bit"] = four_bit_difference(
            model, settings.base, settings.adapter, tokenizer, *data
        )
        print(measured["four_bit"]["text"])
    if settings.llama_cpp:
        file = write_gguf(settings.output_dir, settings.llama_cpp, settings.gguf_type)
        measured["gguf"] = compare_gguf(model, file)
        print(measured["gguf"]["text"])
    return measured


if __name__ == "__main__":
    run(main)
