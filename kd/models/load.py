"""The trained model: full weights, LoRA on full weights, or LoRA on four-bit weights (QLoRA)."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kd.data.tokenizer import generation_config, template_tokens, untrained_tokens
from kd.settings.distillation import ModelSettings


def check_attention(implementation: str) -> None:
    """Raise ValueError where the machine has no kernel for it, before anything is loaded."""
    if implementation != "flash_attention_2":
        return
    if not torch.cuda.is_available():
        raise ValueError("attn_implementation: flash_attention_2 runs on GPUs alone; set sdpa")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise ValueError(
            f"attn_implementation: flash_attention_2 needs compute capability 8.0 or more, and "
            f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}; set sdpa, which "
            "keeps packed documents apart by a mask"
        )


def load_trained(
    name: str, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | PeftModel:
    """The model of a hub name or folder, ready for the Trainer."""
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        quantization_config=four_bit(dtype) if settings.quantization == "nf4" else None,
        attn_implementation=settings.attn_implementation,
    )
    keep_packing_of_four_bit_weights(model)
    model.generation_config = generation_config(model, tokenizer)
    new_tokens = check_template_tokens(model, tokenizer, settings)
    if settings.lora_rank:
        tokens = new_tokens if settings.train_template_tokens else None
        model = get_peft_model(model, lora_config(settings, tokens))
    return model


def adapter_base(name: str) -> str | None:
    """The base's name where `name` is the folder of a PEFT adapter."""
    if not (Path(name) / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's base: NF4 with double quantisation."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # The storage type must be the others' type, or DeepSpeed cannot flatten the weights.
        bnb_4bit_quant_storage=dtype,
    )


def lora_config(settings: ModelSettings, tokens: list[int] | None) -> LoraConfig:
    """`tokens`: ids whose embeddings are trained as well."""
    targets = settings.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        trainable_token_indices=tokens,
    )


def keep_packing_of_four_bit_weights(model: PreTrainedModel) -> None:
    """On CPUs with avx512_bf16 bitsandbytes repacks a weight at its first forward in eval mode,
    which breaks ZeRO-3 and any training after an evaluation; switch that off."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def check_template_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings
) -> list[int]:
    """The template's special tokens; says which of them the base model was never trained on."""
    ids = template_tokens(tokenizer)
    embedding = model.get_input_embeddings().weight
    if not ids or embedding.numel() == 0:  # under ZeRO-3 the rows are spread over the ranks
        return ids
    untrained = untrained_tokens(embedding.detach(), ids)
    if untrained and settings.lora_rank and not settings.train_template_tokens:
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(untrained))
        print(
            f"note: the template's tokens {tokens} look untrained in this model, and LoRA leaves "
            "embeddings as they are; train_template_tokens: true trains them "
            "(PEFT's trainable_token_indices)"
        )
    return ids


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all), four-bit weights and ZeRO-3 shards counted as the numbers they stand for."""
    trained = total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
