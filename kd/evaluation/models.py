"""Load the models to measure, and identify their files."""

import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.data.tokenizer import load_tokenizer
from kd.evaluation.rows import text_hash
from kd.gpu import device
from kd.models.adapters import adapter_base
from kd.models.frozen import load_frozen
from kd.models.heads import causal_lm
from kd.settings.evaluation import ModelSelection

WEIGHTS = ("*.safetensors", "*.bin", "*config.json")


def tokenizer_for(settings: ModelSelection, path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with the chat template of the settings if they have one."""
    return load_tokenizer(path, settings.chat_template)


def model_for(settings: ModelSelection, path: str) -> PreTrainedModel:
    """Load a model on the device of this rank, in the data type of the settings."""
    return load_model(path, settings.weights_dtype, settings.attn_implementation, device())


def load_model(path: str, dtype: str, attn_implementation: str, device: str) -> PreTrainedModel:
    """Load a frozen causal language model in eval mode; adapter layers are inside it."""
    return causal_lm(load_frozen(path, dtype, device, attn_implementation))


def fingerprint(path: str) -> str:
    """Hash the names, sizes and modification times of a model's files, its base's included.

    A hub name is returned unchanged.
    """
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    parts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    base = adapter_base(path)
    if base is not None:
        parts.append(fingerprint(base))
    return text_hash(json.dumps(parts))
