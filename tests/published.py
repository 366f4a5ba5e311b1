"""Configurations of the hub models that the recipes name, by their published shapes. No weights."""

from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied head
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151_936, True),
    "Qwen/Qwen1.5-14B": (5120, 40, 40, 40, 13_696, 152_064, False),
    "Qwen/Qwen1.5-32B-Chat-AWQ": (5120, 64, 40, 8, 27_392, 152_064, False),
    "meta-llama/Meta-Llama-3-8B-Instruct": (4096, 32, 32, 8, 14_336, 128_256, False),
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}


def save_config(folder: Path, name: str) -> Path:
    """Write the config.json of a hub model into `folder`."""
    hidden, layers, heads, kv, intermediate, vocab_size, tied = SHAPES[name]
    awq = {"quantization_config": AWQ} if name.endswith("AWQ") else {}
    kind = LlamaConfig if "llama" in name else Qwen2Config
    kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        dtype="float16" if awq else "bfloat16",
        **awq,
    ).save_pretrained(folder)
    return folder
