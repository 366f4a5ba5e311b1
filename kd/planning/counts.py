"""Tensors and activations of a layout's models, each counted once: plans of other layouts share them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from kd.planning.activations import Activations, trace_activations
from kd.planning.blueprint import (
    Piece,
    build,
    build_trained,
    checkpoint_pieces,
    pieces_of,
    read_config,
)
from kd.planning.layout import Layout

_KNOWN: dict[tuple, Any] = {}


@functools.lru_cache(maxsize=8)
def config_of(name: str) -> PretrainedConfig:
    return read_config(name)


def student_pieces(layout: Layout) -> list[Piece]:
    return remembered(
        ("student", layout.student, str(layout.model), casts(layout)),
        lambda: pieces_of(build_student(layout, config_of(layout.student))),
    )


def teacher_pieces(layout: Layout) -> list[Piece]:
    return remembered(
        ("teacher", layout.teacher, layout.teacher_dtype),
        lambda: checkpoint_pieces(config_of(layout.teacher), layout.teacher_dtype),
    )


def activations(
    name: str, layout: Layout, gradients: bool = True, dtype: torch.dtype | None = None
) -> Activations:
    """Of a micro-batch: of the student, or (without gradients) of the teacher."""
    if gradients:

        def made(config):
            return build_student(layout, config)
    else:

        def made(config):
            return build(config, dtype, layout.model.attn_implementation)

    # DeepSpeed computes in the weights' own type, everything else under autocast.
    autocast = getattr(torch, layout.half) if layout.half and not layout.stage else None
    options = {
        "checkpointing": layout.checkpointing,
        "gradients": gradients,
        "packed": layout.packing,
        "autocast": autocast,
        "device": layout.device,
    }
    owner = (
        (str(layout.model), casts(layout))
        if gradients
        else (dtype, layout.model.attn_implementation)
    )
    key = ("activations", name, *owner, layout.micro, layout.max_length, str(options))
    return remembered(
        key,
        lambda: trace_activations(
            config_of(name), made, layout.micro, layout.max_length, **options
        ),
    )


def build_student(layout: Layout, config: PretrainedConfig) -> torch.nn.Module:
    dtype = getattr(torch, layout.model.dtype)
    return build_trained(config, layout.model, dtype, cast=casts(layout))


def casts(layout: Layout) -> bool:
    """Whether DeepSpeed brings all weights to the half precision of the profile."""
    return layout.stage > 0 and bool(layout.half)


def remembered(key: tuple, make: Callable[[], Any]) -> Any:
    """What plans of other layouts share is counted once: building a large model takes seconds."""
    if key not in _KNOWN:
        _KNOWN[key] = make()
    return _KNOWN[key]
