"""Worst differences of the Triton kernel from elementwise.py, as JSON; run with TRITON_INTERPRET=1."""

import itertools
import json
import sys

import torch

from kd.losses import elementwise, triton_kernels
from kd.losses.divergences import DIVERGENCES
from kd.losses.objective import Head, Objective

TOKENS, VOCABULARY = 3, 300


def main() -> None:
    triton_kernels.BLOCK = 128  # three blocks a row, the last of them not full
    found = {}
    for name in DIVERGENCES:
        for soft_weight, temperature, real in itertools.product(
            (0.0, 0.3, 1.0), (1.0, 2.0), (False, True)
        ):
            objective = Objective(soft_weight, name, temperature, True, 0.3, 0.2)
            scale = 1000.0 if soft_weight == 0.3 else 1.0
            key = f"{objective}, bias and soft-cap: {real}"
            found[key] = difference(objective, real, True, scale)
        objective = Objective(1.0, name)
        found[f"{objective}, no gradient"] = difference(objective, True, False, 1.0)
    for training in (False, True):
        key = f"no teacher, gradient: {training}"
        found[key] = difference(Objective(soft_weight=0.0), False, training, 1.0, teacher=False)
    json.dump(found, sys.stdout)


def difference(objective, real, training, scale, teacher=True) -> float:
    """The larger of the figures' relative difference and the gradient's absolute one."""
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    student_logits = scale * torch.randn(TOKENS, VOCABULARY)
    teacher_logits = scale * torch.randn(TOKENS, VOCABULARY) if teacher else None
    head, teacher_head = (
        Head(
            torch.empty(0),
            torch.randn(VOCABULARY + 8) if real else None,
            0.5,
            softcap if real else None,
        )
        for softcap in (20.0, 30.0)
    )
    results = []
    for module in (elementwise, triton_kernels):
        student = student_logits.clone()
        gradient = student if training else None
        sums = module.tile_figures(
            student,
            teacher_logits.clone() if teacher else None,
            labels,
            head,
            teacher_head if teacher else None,
            objective,
            gradient,
        )
        results.append((sums, gradient))
    (sums, gradient), (found_sums, found_gradient) = results
    worst = ((found_sums - sums).abs() / sums.abs().clamp(min=1.0)).max().item()
    if training:
        # Gradients of reverse KL are as large as the logits.
        size = gradient.abs().max().clamp(min=1.0)
        worst = max(worst, ((found_gradient - gradient).abs().max() / size).item())
    return worst


if __name__ == "__main__":
    main()
