"""Merge a LoRA adapter into its base, so that plain transformers loads the result.

python train/merge.py --adapter runs/student --output_dir runs/student-merged

The sum is formed in float32 on the CPU (4 bytes a parameter of memory) and rounded once. The base
is read in its own precision, also where the adapter was trained on four-bit weights (QLoRA): how far
the merged model is from what was trained is measured on rows of the run and printed. --llama_cpp
FOLDER (a checkout of llama.cpp, or the one in the source package of llama-cpp-python) also writes a
GGUF file, which is loaded back and compared. README.md in the folder is a model card.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from kd.data.sources import check_sources
from kd.data.tokenizer import generation_config, load_tokenizer
from kd.evaluation.merged import four_bit_difference
from kd.models.card import model_card, read_run
from kd.models.gguf import check_llama_cpp, compare_gguf, write_gguf
from kd.recipe import parse, parse_json_list, setting
from kd.run.exit import DONE, is_done, mark_done, run


@dataclass
class MergeSettings:
    adapter: str = setting("", "folder of a LoRA adapter: adapter_config.json and its weights")
    output_dir: str = setting("", "folder of the merged model")
    base: str | None = setting(None, "hub name or folder of the base; without: the adapter's own")
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "type of the merged weights")
    quantization: Literal["auto", "none", "nf4"] = setting(
        "auto", "of the base in training; nf4: the merged model is compared with it. auto: run.json"
    )
    data: str | None = setting(
        None,
        "JSON list of sources for the comparison; without: the run's held-out or training data",
    )
    compared_rows: int = setting(16, "rows of each source in the comparison")
    llama_cpp: str | None = setting(
        None, "folder with convert_hf_to_gguf.py: also write a GGUF file"
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = setting("bf16", "type of the GGUF weights")
    results: str | None = setting(None, "folder of measurements, for the table of the model card")

    def __post_init__(self) -> None:
        for key in ("adapter", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; wanted a folder")
        if not (Path(self.adapter) / "adapter_config.json").is_file():
            raise ValueError(
                f"adapter: no adapter_config.json in {self.adapter}; wanted the folder of a LoRA "
                "run or of one of its checkpoints. A fully trained model needs no merge"
            )
        if Path(self.adapter).resolve() == Path(self.output_dir).resolve():
            raise ValueError(f"output_dir: {self.output_dir} is the adapter's own folder")
        config = PeftConfig.from_pretrained(self.adapter)
        if config.peft_type != "LORA":
            raise ValueError(f"adapter: found {config.peft_type.value}; only LORA is merged here")
        self.base = self.base or config.base_model_name_or_path
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
    if merged_before(settings):
        print(f"{settings.output_dir} is finished already; remove it to merge anew")
        return
    check_full_precision(settings.base)
    own_files = (Path(settings.adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(settings.adapter if own_files else settings.base)
    model = merge(settings)
    model.generation_config = generation_config(model, tokenizer)
    model.save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    measured: dict[str, dict] = {}
    if settings.quantization == "nf4":
        measured["four_bit"] = four_bit_difference(
            model,
            settings.base,
            settings.adapter,
            tokenizer,
            settings.sources,
            settings.compared_rows,
        )
        print(measured["four_bit"]["text"])
    if settings.llama_cpp:
        file = write_gguf(settings.output_dir, settings.llama_cpp, settings.gguf_type)
        measured["gguf"] = compare_gguf(model, file)
        print(measured["gguf"]["text"])
    card = model_card(settings.output_dir, settings.base, settings.run, measured, settings.results)
    (Path(settings.output_dir) / "README.md").write_text(card)
    (Path(settings.output_dir) / "merge.json").write_text(json.dumps(measured, indent=2) + "\n")
    mark_done(settings.output_dir, asdict(settings))
    print(
        f"saved to {settings.output_dir}: {model.num_parameters():,} parameters, {settings.dtype}"
    )


def merged_before(settings: MergeSettings) -> bool:
    """Raises ValueError where the folder holds the finished work of another command."""
    if not is_done(settings.output_dir):
        return False
    record = json.loads((Path(settings.output_dir) / DONE).read_text())
    if record != asdict(settings):
        raise ValueError(
            f"output_dir: {settings.output_dir} is the finished run of other settings; "
            "take another folder"
        )
    return True


def check_full_precision(base: str) -> None:
    quantization = AutoConfig.from_pretrained(base).to_dict().get("quantization_config")
    if quantization:
        method = quantization.get("quant_method")
        raise ValueError(
            f"base: {base} is stored quantised ({method}), and a merge into rounded weights loses "
            "more than the adapter brings; give --base: the model that it was made from"
        )


def merge(settings: MergeSettings) -> PreTrainedModel:
    """Base plus adapter, with the generation settings that training left beside the adapter."""
    base = AutoModelForCausalLM.from_pretrained(settings.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, settings.adapter, torch_device="cpu")
    model = model.merge_and_unload(progressbar=True, safe_merge=True).to(
        getattr(torch, settings.dtype)
    )
    if (Path(settings.adapter) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(settings.adapter)
    return model


if __name__ == "__main__":
    run(main)
