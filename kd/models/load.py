"""Load the model that is trained: all weights, LoRA, or LoRA on 4-bit weights (QLoRA)."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kd.data.tokenizer import generation_config, template_tokens, turn_end, untrained_tokens
from kd.distributed import rank
from kd.models.attention import use_present_kernels
from kd.models.liger import use_liger
from kd.models.lora import LAYERS
from kd.models.quantized import quantization_format, quantization_settings
from kd.pretrained import load_config, load_model
from kd.settings.distillation import ModelSettings

EXPECTED_END = 0.1  # least probability of the end of a turn in a model that was trained on it


def has_flash_attention(name: str) -> bool:
    """Whether Transformers has flash attention for this model."""
    kind = type(load_config(name))
    known = AutoModelForCausalLM._model_mapping
    return kind in known and bool(getattr(known[kind], "_supports_flash_attn", False))


def check_trainable(config: PretrainedConfig, name: str, settings: ModelSettings) -> None:
    """Raise ValueError if the model's weights are stored in a form that cannot be trained.

    LoRA trains on 4-bit weights of bitsandbytes, which Transformers reads into the same layers as
    `quantization: nf4`.
    """
    stored = quantization_settings(config)
    if not stored:
        return
    found = quantization_format(stored)
    if found != "bitsandbytes 4-bit":
        raise ValueError(
            f"{name}: found {found} weights, which cannot be trained; wanted the unquantized model "
            "that they were made from (with quantization: nf4 and lora_rank, to train on 4 bits)"
        )
    if not settings.lora_rank:
        raise ValueError(
            f"{name}: found {found} weights, and without LoRA there is nothing to train; set "
            "lora_rank (16, for example), or give the unquantized model"
        )


def load_trained(
    name: str, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """Load the model of a hub name or folder, ready for the Trainer."""
    use_present_kernels()
    dtype = getattr(torch, settings.dtype)
    model = load_model(
        name,
        dtype=dtype,
        quantization_config=nf4_config(dtype) if settings.quantization == "nf4" else None,
        attn_implementation=settings.attention,
    )
    use_liger(model, settings.liger_kernels)
    disable_cpu_repacking(model)
    model.generation_config = generation_config(model, tokenizer)
    new_tokens = check_template_tokens(model, tokenizer, settings)
    if settings.lora_rank:
        tokens = new_tokens if settings.train_template_tokens else None
        model = get_peft_model(model, lora_config(settings, tokens))
    return model


def nf4_config(dtype: torch.dtype, storage: torch.dtype | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantization (arXiv 2305.14314, section 3), computed in `dtype`.

    `storage` is the type of the packed weights; the default, `dtype`, is that of a QLoRA base.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # DeepSpeed flattens all weights together, so their storage types must be the same.
        bnb_4bit_quant_storage=storage or dtype,
    )


def lora_config(settings: ModelSettings, tokens: list[int] | None) -> LoraConfig:
    """The LoRA configuration of the settings; embeddings of the ids `tokens` are trained, too."""
    targets = settings.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        trainable_token_indices=tokens,
    )
    config._register_custom_module(LAYERS)  # not saved with the adapter
    return config


def disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with avx512_bf16.

    It does so at the first forward in eval mode, which breaks ZeRO-3 and any training after an
    evaluation.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def check_template_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings
) -> list[int]:
    """Return the template's special tokens; print a note if LoRA leaves some untrained."""
    ids = template_tokens(tokenizer)
    embedding = model.get_input_embeddings().weight  # (V, H)
    if not ids or embedding.numel() == 0:  # ZeRO-3 has sharded the rows
        return ids
    if rank() > 0 or not settings.lora_rank or settings.train_template_tokens:
        return ids
    untrained = untrained_tokens(embedding.detach(), ids)
    if untrained and not ends_turns(model, tokenizer):
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(untrained))
        print(
            f"note: the template's tokens {tokens} look untrained in this model, and LoRA does not "
            "train embeddings; train_template_tokens: true trains them "
            "(PEFT's trainable_token_indices)"
        )
    return ids


@torch.no_grad()
def ends_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects the template's end-of-turn token after a complete answer.

    A chat model does, also if its template's tokens have small or similar embeddings, as those of
    Qwen2.5-Coder-Instruct.
    """
    end = turn_end(tokenizer)
    if end is None:
        return False
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    last = (ids[0] == end).nonzero()[-1].item()
    attention = model.config._attn_implementation
    try:
        if "flash" in attention:  # it has no kernel for CPUs
            model.set_attn_implementation("sdpa")
        logits = model(input_ids=ids[:, :last].to(model.device), use_cache=False).logits[0, -1]
    finally:
        model.set_attn_implementation(attention)
    return logits.float().softmax(-1)[end].item() > EXPECTED_END


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """The numbers of trainable and of all parameters.

    4-bit weights and ZeRO-3 shards count as the parameters that they stand for.
    """
    trained = total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
