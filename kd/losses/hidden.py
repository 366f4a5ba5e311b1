"""Losses between hidden states of student and teacher, by a map of layers.

N target tokens, H hidden. Layer 0 is the embeddings' output, layer n that of block n, and the last
one is taken behind the final norm, as `output_hidden_states` of Transformers has it. DistilBERT
(Sanh et al. 2019, section 2) adds the cosine loss to soft targets and language modelling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

PROJECTIONS = "hidden_projections"  # the attribute of the student's CausalLM that holds them


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of the two states of every token, (N, H) and (N, H) to (N,)."""
    return 1.0 - cosine_similarity(student, teacher, dim=-1)


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over H of the squared difference, (N, H) and (N, H) to (N,)."""
    return (student - teacher).square().mean(-1)


HIDDEN_LOSSES = {"cosine": cosine, "mse": mse}


@dataclass(frozen=True)
class HiddenObjective:
    """weight * mean over the layer map of the loss, a target token; added to the others."""

    weight: float
    loss: str  # a key of HIDDEN_LOSSES
    layers: tuple[tuple[int, int], ...]  # (student layer, teacher layer)


def layer_map(pairs: list[str] | None, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pairs "student:teacher", or every student block to an evenly spaced one of the teacher.

    `student` and `teacher` are numbers of blocks. Raises ValueError naming the pair that is wrong.
    """
    if pairs is None:
        return tuple((n, round(n * teacher / student)) for n in range(1, student + 1))
    found = []
    for pair in pairs:
        parts = pair.split(":")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise ValueError(f"hidden_layers: {pair!r}; wanted student:teacher, such as 2:4")
        ours, theirs = map(int, parts)
        if ours > student or theirs > teacher:
            raise ValueError(
                f"hidden_layers: {pair}; the student has layers 0 to {student}, the teacher 0 to "
                f"{teacher}"
            )
        found.append((ours, theirs))
    return tuple(found)


def add_projections(model: nn.Module, objective: HiddenObjective, width: int) -> None:
    """Give the student one trained (H student -> `width`) map a pair, where the widths differ.

    They are part of the student's module, so that DDP and ZeRO reduce their gradients; only its
    weights for inference are saved under its own name.
    """
    own = model.config.get_text_config().hidden_size
    if own == width:
        return
    like = model.get_input_embeddings().weight
    maps = [nn.Linear(own, width, bias=False) for _ in objective.layers]
    setattr(model, PROJECTIONS, nn.ModuleList(maps).to(like.device, torch.float32))


def hidden_loss(
    model: nn.Module,
    states: list[Tensor],
    teacher: list[Tensor],
    objective: HiddenObjective,
    own: Tensor | None = None,
) -> Tensor:
    """(2,) the loss summed over tokens: over those that are not `own`, (N,) bool, and those that are.

    `states` and `teacher`: (N, H) of every pair of the map. Without `own` the second sum is 0.
    """
    if hasattr(model, PROJECTIONS):
        maps = getattr(model, PROJECTIONS)
        states = [m(state.to(m.weight.dtype)) for m, state in zip(maps, states, strict=True)]
    loss = HIDDEN_LOSSES[objective.loss]
    # In float32: squares of activations pass the range of float16.
    exact = torch.promote_types(states[0].dtype, torch.float32)
    pairs = zip(states, teacher, strict=True)
    apart = [loss(ours.to(exact), theirs.to(exact)) for ours, theirs in pairs]  # (N,) each
    groups = [slice(None), slice(0)] if own is None else [~own, own]
    return torch.stack([torch.stack([x[g].sum() for x in apart]).mean() for g in groups])
