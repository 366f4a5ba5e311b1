"""Load a teacher: a full model, a base plus adapter, or the student's frozen base.

`load_frozen` is the one loader of models that are not trained: teachers, evaluated models, local
generation engines, reward models, and the models that merging and layer inheritance start from.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kd.models.adapters import adapter_base, is_adapter, merge_command
from kd.models.attention import use_present_kernels
from kd.models.heads import backbone_only, causal_lm
from kd.models.load import disable_cpu_repacking
from kd.models.quantized import NEED_EXTRA_PACKAGE, READERS, check_readable, packed_format
from kd.models.sharding import load_unsharded, without_zero_init
from kd.pretrained import load_adapter, load_config, load_generation_config, load_model
from kd.run.host_memory import keep_memory_flat
from kd.settings.distillation import ModelSettings
from kd.settings.teacher import OWN_BASE, TeacherSettings


def load_frozen(
    name: str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    base: str | None = None,
    model_class: type = AutoModelForCausalLM,
    quantization_config: BitsAndBytesConfig | None = None,
    packed_formats: Collection[str] = NEED_EXTRA_PACKAGE,
) -> PreTrainedModel | PeftModel:
    """Load a model for inference: whole on one device, in eval mode, without gradients.

    An adapter stays unmerged, because a merge in 16 bits rounds part of it away. Its folder's
    generation settings replace those of its base. (AutoPeftModel is not used: it resizes the
    embeddings of the base to the tokenizer.)

    Args:
        name: Hub name or folder of a model, or folder of a PEFT adapter.
        dtype: Type of the weights, or its name; "auto" keeps the type of the checkpoint.
        device: Device of the whole model.
        attn_implementation: Attention kernel; None leaves the choice to Transformers.
        base: Model that replaces the base named in the adapter's configuration.
        model_class: Auto class of Transformers, which decides on the head.
        quantization_config: Quantizes the weights while they are loaded, as in QLoRA training.
        packed_formats: Quantized formats (keys of READERS) that are read into PackedLinear layers
            instead of the layers of Transformers.

    Returns:
        The model; a PeftModel if `name` is an adapter.
    """
    base = base or adapter_base(name) or name
    dtype = str(dtype).removeprefix("torch.")
    use_present_kernels()
    with without_zero_init():
        if model_class is AutoModelForCausalLM and packed_format(base) in packed_formats:
            attention = attn_implementation or "sdpa"
            model = load_unsharded(base, attention, dtype, torch.device(device))
        else:
            model = load_model(
                base,
                model_class,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
                device_map={"": device},
                quantization_config=quantization_config,
            )
        disable_cpu_repacking(model)
        # Of a model that is loaded without a plan, as in an evaluation, the size is known only now.
        keep_memory_flat(model.device.type, sum(p.nbytes for p in model.parameters()))
        if is_adapter(name):
            model = load_adapter(model, name, device)
            if (Path(name) / "generation_config.json").is_file():
                config = load_generation_config(name)
                causal_lm(model).generation_config = config
    return model.eval().requires_grad_(False)


def load_teacher(
    settings: TeacherSettings, model: ModelSettings, device: torch.device
) -> PreTrainedModel:
    """Load the unsharded, frozen teacher; its forward returns the last hidden states, (B, T, H).

    A quantized teacher has the same PackedLinear layers as a sharded one. With an adapter, base and
    adapter are loaded as Transformers and PEFT load them.

    Raises ValueError if the adapter replaces the head by its own layer.
    """
    adapter = is_adapter(settings.teacher)
    teacher = causal_lm(
        load_frozen(
            settings.teacher,
            settings.teacher_dtype,
            device,
            model.attention,
            packed_formats=NEED_EXTRA_PACKAGE if adapter else READERS,
        )
    )
    head = teacher.get_output_embeddings()
    if adapter and not isinstance(head, nn.Linear | TrainableTokensWrapper):
        raise ValueError(
            f"teacher: the adapter {settings.teacher} turns the head into a "
            f"{type(head).__name__}; wanted a plain Linear: {merge_command(settings.teacher)}"
        )
    backbone_only(teacher)
    return teacher


def check_teacher(teacher: TeacherSettings, model: ModelSettings) -> None:
    """Raise ValueError if the teacher cannot be loaded as the settings ask."""
    if teacher.teacher == OWN_BASE:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "teacher: self does not work with a student under ZeRO-3, which gathers layers "
                "only in the order of the training forward; use ZeRO-2 or DDP, or give the name of "
                "the base as teacher"
            )
        return
    if teacher.sharding and is_adapter(teacher.teacher):
        raise ValueError(
            f"teacher_deepspeed: {teacher.teacher} is an adapter, and only a whole model can be "
            f"sharded; {merge_command(teacher.teacher)}"
        )
    if teacher.sharding and "RANK" not in os.environ:
        raise ValueError(
            "teacher_deepspeed: this is one process without a launcher, so there is nothing to "
            "shard over; start it with a launch profile (launch/cpu.sh train/distill.py ...), or "
            "leave teacher_deepspeed out"
        )
    if is_adapter(teacher.teacher):
        return
    if teacher.sharding is not None or packed_format(teacher.teacher):
        check_readable(load_config(teacher.teacher), teacher.teacher)


def teacher_base(teacher: TeacherSettings, student: str) -> str:
    """The name of the teacher's model without any adapter."""
    name = student if teacher.teacher == OWN_BASE else teacher.teacher
    return adapter_base(name) or name


def student_base_forward(student: PeftModel) -> Callable[..., Tensor]:
    """Return a function that computes the last hidden states, (B, T, H), of the student's base.

    Adapters, dropout and gradient checkpointing are off while it runs.
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
