"""How a teacher is had: a model, a model with its adapter, or the student's own base; and how not."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kd.data.tokenizer import load_tokenizer
from kd.models.heads import backbone_only, causal_lm
from kd.models.load import adapter_base
from kd.models.quantized import check_teacher as check_format
from kd.models.quantized import has_own_layers
from kd.models.sharding import load_unsharded, without_zero_init
from kd.settings.distillation import OWN_BASE, ModelSettings, TeacherSettings


def check_teacher(teacher: TeacherSettings, model: ModelSettings) -> None:
    """Raise ValueError where the teacher cannot be had in the way that was asked for."""
    if teacher.teacher == OWN_BASE:
        if not model.lora_rank:
            raise ValueError(
                "teacher: self is the student without its adapters, and with lora_rank: 0 it has "
                "none; set lora_rank (16, say), or give the teacher's name"
            )
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "teacher: self with the student under ZeRO-3, which gathers layers in the order of "
                "the training forward alone; take ZeRO-2 or DDP, or give the base's name as teacher"
            )
        return
    if teacher.teacher_deepspeed and adapter_base(teacher.teacher):
        raise ValueError(
            f"teacher_deepspeed: {teacher.teacher} is an adapter, and only a whole model is "
            f"sharded; {merge_command(teacher.teacher)}"
        )
    if teacher.teacher_deepspeed and "RANK" not in os.environ:
        raise ValueError(
            "teacher_deepspeed: this is one process without a launcher, so there is nothing to "
            "shard over; start it by a profile (launch/cpu.sh train/distill.py ...), or leave it out"
        )
    if not adapter_base(teacher.teacher):
        check_format(teacher.teacher, teacher.teacher_deepspeed is not None)


def base_model(teacher: TeacherSettings, student: str) -> str:
    """The name of the model that the teacher is, adapters aside."""
    name = student if teacher.teacher == OWN_BASE else teacher.teacher
    return adapter_base(name) or name


def teacher_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the teacher's weights; an adapter may have left it to its base."""
    own = (Path(name) / "tokenizer_config.json").is_file()
    return load_tokenizer(name if own else adapter_base(name) or name)


def load_whole(
    settings: TeacherSettings, model: ModelSettings, device: torch.device
) -> PreTrainedModel:
    """The unsharded teacher, frozen; a quantised one has the layers of the sharded one.

    An adapter stays beside its base, unmerged, and both are loaded as Transformers and PEFT load
    them. Raises ValueError where it has a head of its own.
    """
    dtype, base = settings.teacher_dtype, adapter_base(settings.teacher)
    if not base and has_own_layers(settings.teacher):
        teacher = load_unsharded(settings.teacher, model.attn_implementation, dtype, device)
        backbone_only(teacher)
        return teacher
    with without_zero_init():
        teacher = AutoModelForCausalLM.from_pretrained(
            base or settings.teacher,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=model.attn_implementation,
            device_map={"": device},
        )
    if base:
        PeftModel.from_pretrained(teacher, settings.teacher, torch_device=str(device))
        head = teacher.get_output_embeddings()
        if not isinstance(head, nn.Linear | TrainableTokensWrapper):
            raise ValueError(
                f"teacher: the adapter {settings.teacher} makes of the head a "
                f"{type(head).__name__}; wanted a plain Linear: {merge_command(settings.teacher)}"
            )
    teacher.eval().requires_grad_(False)
    backbone_only(teacher)
    return teacher


def merge_command(adapter: str) -> str:
    """What to do with an adapter that cannot be taken as it is."""
    merged = f"{adapter.rstrip('/')}-merged"
    return f"merge it first: python train/merge.py --adapter {adapter} --output_dir {merged}"


def base_of_student(student: PeftModel) -> Callable[..., Tensor]:
    """A function that gives the last hidden states, (B, T, H), of the student's base.

    Its adapters are off while it runs, and so are dropout and gradient checkpointing.
    """
    backbone: nn.Module = causal_lm(student).base_model

    def call(**inputs: Tensor) -> Tensor:
        training = student.training
        student.eval()
        try:
            with student.disable_adapter():
                return backbone(**inputs, use_cache=False).last_hidden_state
        finally:
            student.train(training)

    return call
