"""Losses between hidden states of student and teacher, for chosen pairs of layers.

N target tokens, H hidden. Layer 0 is the output of the embeddings, layer n that of block n; the
last layer is taken after the final norm, like `output_hidden_states` of Transformers. DistilBERT
(Sanh et al. 2019, section 2) adds the cosine loss to soft targets and language modeling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

PROJECTIONS = "hidden_projections"  # attribute of the student's CausalLM that holds its projections


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos(student, teacher) per token, (N,), for states (N, H)."""
    return 1.0 - cosine_similarity(student, teacher, dim=-1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference over H per token, (N,), for states (N, H)."""
    return (student - teacher).square().mean(-1)


HIDDEN_LOSSES = {"cosine": cosine, "mse": mse}


@dataclass(frozen=True)
class HiddenObjective:
    """A term of the training loss: weight * loss per target token, averaged over the layer pairs.

    Attributes:
        weight: Its weight in the training loss.
        loss: A key of HIDDEN_LOSSES.
        layers: Pairs (student layer, teacher layer).
    """

    weight: float
    loss: str
    layers: tuple[tuple[int, int], ...]


def layer_map(
    pairs: list[str] | None, student_blocks: int, teacher_blocks: int
) -> tuple[tuple[int, int], ...]:
    """Parse pairs "student:teacher"; without any, map every student block to an evenly spaced one.

    Raises ValueError for a pair that is malformed or names a layer that does not exist.
    """
    if pairs is None:
        blocks = range(1, student_blocks + 1)
        return tuple((n, round(n * teacher_blocks / student_blocks)) for n in blocks)
    found = []
    for pair in pairs:
        parts = pair.split(":")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise ValueError(f"hidden_layers: {pair!r}; wanted student:teacher, such as 2:4")
        student_layer, teacher_layer = map(int, parts)
        if student_layer > student_blocks or teacher_layer > teacher_blocks:
            raise ValueError(
                f"hidden_layers: {pair}; the student has layers 0 to {student_blocks}, the teacher "
                f"0 to {teacher_blocks}"
            )
        found.append((student_layer, teacher_layer))
    return tuple(found)


def add_projections(model: nn.Module, objective: HiddenObjective, teacher_width: int) -> None:
    """Give the student a trained linear map (student H -> teacher H) per pair if the H differ.

    The maps are part of the student's module, so that DDP and ZeRO reduce their gradients. They
    are saved in a file of their own, not with the model.
    """
    student_width = model.config.get_text_config().hidden_size
    if student_width == teacher_width:
        return
    like = model.get_input_embeddings().weight
    maps = [nn.Linear(student_width, teacher_width, bias=False) for _ in objective.layers]
    setattr(model, PROJECTIONS, nn.ModuleList(maps).to(like.device, torch.float32))


def hidden_loss(
    model: nn.Module,
    states: list[Tensor],
    teacher_states: list[Tensor],
    objective: HiddenObjective,
    on_policy: Tensor | None = None,
) -> Tensor:
    """Sum the hidden-state loss over data tokens and over on-policy tokens.

    Args:
        model: The student's CausalLM, with its projections if it needs any.
        states: The student's states (N, H) for every pair of the objective.
        teacher_states: The teacher's states (N, H of the teacher) for every pair.
        objective: The loss and its pairs.
        on_policy: (N,) bool, tokens of student-generated answers; None if there are none.

    Returns:
        (2,) sums over data tokens and over on-policy tokens.
    """
    if hasattr(model, PROJECTIONS):
        maps = getattr(model, PROJECTIONS)
        states = [m(state.to(m.weight.dtype)) for m, state in zip(maps, states, strict=True)]
    loss = HIDDEN_LOSSES[objective.loss]
    # In float32: squared activations overflow float16.
    exact = torch.promote_types(states[0].dtype, torch.float32)
    pairs = zip(states, teacher_states, strict=True)
    per_token = [loss(student.to(exact), teacher.to(exact)) for student, teacher in pairs]  # (N,)
    groups = [slice(None), slice(0)] if on_policy is None else [~on_policy, on_policy]
    return torch.stack([torch.stack([x[g].sum() for x in per_token]).mean() for g in groups])
