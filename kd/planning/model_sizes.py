"""Tensors and activations of a layout's models; results are cached and shared between layouts."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from kd.planning.activations import Activations, trace_activations
from kd.planning.blueprint import (
    StoredTensor,
    build,
    build_trained,
    checkpoint_tensors,
    stored_tensors,
)
from kd.planning.layout import Layout
from kd.pretrained import load_config

_CACHE: dict[tuple, Any] = {}


@functools.lru_cache(maxsize=8)
def config_of(name: str) -> PretrainedConfig:
    """The configuration of a hub name or folder. Raises ValueError if there is none."""
    return load_config(name)


def student_tensors(layout: Layout) -> list[StoredTensor]:
    """All weights of the student, adapters included."""
    return cached(
        ("student", layout.student, str(layout.model), casts_weights(layout)),
        lambda: stored_tensors(build_student(layout, config_of(layout.student))),
    )


def teacher_tensors(layout: Layout) -> list[StoredTensor]:
    """All weights of the teacher, as its checkpoint stores them."""
    return cached(
        ("teacher", layout.teacher, layout.teacher_dtype),
        lambda: checkpoint_tensors(config_of(layout.teacher), layout.teacher_dtype),
    )


def activations(
    name: str, layout: Layout, gradients: bool = True, dtype: torch.dtype | None = None
) -> Activations:
    """Activations of a micro-batch: of the student, or (without gradients) of the teacher.

    `dtype` is the type of the teacher's weights.
    """
    if gradients:
        build_model: Callable = functools.partial(build_student, layout)
        model_key: tuple = (str(layout.model), casts_weights(layout))
    else:
        attention = layout.model.attention
        build_model = functools.partial(build, dtype=dtype, attention=attention)
        model_key = (dtype, attention)
    # DeepSpeed computes in the type of the weights; everything else runs under autocast.
    autocast = getattr(torch, layout.half) if layout.half and not layout.stage else None
    options = {
        "checkpointing": layout.checkpointing and gradients,
        "gradients": gradients,
        "packed": layout.packing,
        "autocast": autocast,
        "device": layout.device,
        "repeats_keys": layout.repeats_keys,
    }
    shape = (layout.micro, layout.max_length)
    return cached(
        ("activations", name, *model_key, *shape, str(options)),
        lambda: trace_activations(config_of(name), build_model, *shape, **options),
    )


def build_student(layout: Layout, config: PretrainedConfig) -> torch.nn.Module:
    """The student with its adapters, without weights."""
    dtype = getattr(torch, layout.model.dtype)
    return build_trained(config, layout.model, dtype, cast=casts_weights(layout))


def casts_weights(layout: Layout) -> bool:
    """Whether DeepSpeed casts all weights to the half precision of the profile."""
    return layout.stage > 0 and bool(layout.half)


def cached(key: tuple, compute: Callable[[], Any]) -> Any:
    """The value of `key`, computed once; building a large model takes seconds."""
    if key not in _CACHE:
        _CACHE[key] = compute()
    return _CACHE[key]
