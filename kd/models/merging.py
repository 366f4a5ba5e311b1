"""Merge a LoRA adapter into the unquantized weights of its base."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from kd.models.adapters import is_adapter
from kd.models.frozen import load_frozen
from kd.pretrained import load_config, read_adapter_config


def check_lora(adapter: str, output_dir: str) -> str:
    """Return the name of the adapter's base.

    Raises ValueError if `adapter` is not the folder of a LoRA adapter or equals `output_dir`.
    """
    if not is_adapter(adapter):
        raise ValueError(
            f"adapter: no adapter_config.json in {adapter}; wanted the folder of a LoRA run or of "
            "one of its checkpoints. A fully trained model needs no merge"
        )
    if Path(adapter).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"output_dir: {output_dir} is the adapter's own folder; give another folder"
        )
    config = read_adapter_config(adapter)
    if config.peft_type != "LORA":
        raise ValueError(
            f"adapter: found {config.peft_type.value}; only LORA adapters can be merged"
        )
    return config.base_model_name_or_path


def check_unquantized(base: str) -> None:
    """Raise ValueError if the weights of `base` are stored quantized."""
    quantization = load_config(base).to_dict().get("quantization_config")
    if quantization:
        method = quantization.get("quant_method")
        raise ValueError(
            f"base: {base} is stored quantized ({method}), and a merge into quantized weights "
            "loses more than the adapter adds; give --base: the model that it was made from"
        )


def merge_adapter(adapter: str, base: str, dtype: str) -> PreTrainedModel:
    """Add the adapter to its base in float32 on the CPU and round the sum once to `dtype`.

    The generation settings in the adapter's folder replace those of the base.
    """
    model = load_frozen(adapter, torch.float32, "cpu", base=base)
    merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    return merged.to(getattr(torch, dtype))
