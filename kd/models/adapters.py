"""LoRA adapters on disk: their base model, their tokenizer, and the command that merges them."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kd.data.tokenizer import load_tokenizer
from kd.pretrained import read_adapter_config


def is_adapter(name: str) -> bool:
    """Whether `name` is the folder of a PEFT adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def adapter_base(name: str) -> str | None:
    """The name of the base model if `name` is the folder of a PEFT adapter, else None."""
    return read_adapter_config(name).base_model_name_or_path if is_adapter(name) else None


def model_tokenizer(name: str, base: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or adapter; an adapter without one has that of its base.

    `base` replaces the base that the adapter's configuration names.
    """
    saved_here = (Path(name) / "tokenizer_config.json").is_file()
    return load_tokenizer(name if saved_here else base or adapter_base(name) or name)


def merge_command(adapter: str) -> str:
    """The remedy for an adapter that cannot be used unmerged: the command that merges it."""
    merged = f"{adapter.rstrip('/')}-merged"
    return f"merge it first: python train/merge.py --adapter {adapter} --output_dir {merged}"
