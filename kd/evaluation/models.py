"""The models that are measured: hub names, folders and PEFT adapters, each under a short name."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kd.data.sources import check_sources
from kd.data.tokenizer import load_tokenizer
from kd.distributed import device
from kd.evaluation.rows import text_hash
from kd.models.quantized import only_read_here
from kd.models.sharding import load_unsharded
from kd.recipe import parse_json_list, require_file, setting

ADAPTER = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*config.json")


@dataclass
class ModelSelection:
    """The models that are measured, and how they are loaded."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=PATH of each model: a hub name, a folder, a PEFT adapter's folder"},
    )
    batch_size: int = setting(8, "rows a forward; the figures do not depend on it")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "type of the weights; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "attention of every model"
    )
    chat_template: str | None = setting(
        None, "file with a Jinja chat template, in place of the tokenizers' own"
    )

    def __post_init__(self) -> None:
        self.named_models = parse_models(self.models)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; wanted 1 or more")
        require_file("chat_template", self.chat_template)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device == "cuda" else "float32"

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        return load_tokenizer(path, self.chat_template)

    def load(self, path: str) -> PreTrainedModel:
        return load_model(path, self.dtype, self.attn_implementation, device())


@dataclass
class EvaluationSettings(ModelSelection):
    """The models, and the held-out rows that they are measured on."""

    data: str = setting("", "JSON list of sources: [{path, split, count, columns, ...}, ...]")
    mixture_seed: int = setting(0, "draws the rows of every source that has a count")
    max_length: int = setting(1024, "tokens a row at most; longer rows are cut at the end")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = parse_json_list("data", self.data)
        if not self.sources:
            raise ValueError("data: no source given; wanted a list such as [{path: rows.jsonl}]")
        check_sources(self.sources)
        if self.max_length < 2:
            raise ValueError(f"max_length: {self.max_length}; wanted 2 or more")


def parse_models(items: list[str]) -> dict[str, str]:
    """{name: path} of NAME=PATH items. Raises ValueError on names that cannot name a file."""
    named: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (equals and path and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name)):
            raise ValueError(
                f"models: found {item}; wanted NAME=PATH, the name of letters, digits and . _ + -"
            )
        if name in named:
            raise ValueError(f"models: {name} given twice; give each model a name of its own")
        check_path(name, path)
        named[name] = path
    if not named:
        raise ValueError("models: none given; wanted NAME=PATH, such as student=runs/student")
    return named


def check_path(name: str, path: str) -> None:
    """Raise ValueError where `path` is meant as a folder and holds no model."""
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
            raise ValueError(
                f"{name}: {path} holds neither config.json nor {ADAPTER}; wanted the folder of a "
                "finished training run or of one of its checkpoints"
            )
        return
    parent = folder.parent
    if path.count("/") > 1 or path[0] in "./~" or (parent != Path(".") and parent.is_dir()):
        raise ValueError(f"{name}: no folder {path}; wanted a model's folder or a hub name")


def load_model(path: str, dtype: str, attn_implementation: str, device: str) -> PreTrainedModel:
    """The CausalLM itself, in eval mode; an adapter's layers are inside it.

    Not by AutoPeftModel, which resizes the base's embeddings to the tokenizer.
    """
    adapter = is_adapter(path)
    base = PeftConfig.from_pretrained(path).base_model_name_or_path if adapter else path
    if only_read_here(base):
        model = load_unsharded(base, attn_implementation, dtype, torch.device(device))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            device_map={"": device},
        )
    if adapter:
        model = PeftModel.from_pretrained(model, path).get_base_model()
        if (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval().requires_grad_(False)


def is_adapter(path: str) -> bool:
    return (Path(path) / ADAPTER).is_file()


def fingerprint(path: str) -> str:
    """Changes when the files of a model change: a hash of their names, sizes and times.

    A hub name stands for itself.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    parts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if is_adapter(path):
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
        parts.append(fingerprint(base))
    return text_hash(json.dumps(parts))
