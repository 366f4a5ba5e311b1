"""Print the largest differences between the Triton kernel and elementwise.py as JSON.

TRITON_INTERPRET=1 python tests/jobs/triton_interpreted.py
"""

import itertools
import json
import sys

import torch

from kd.losses import elementwise, triton_kernels
from kd.losses.head import Head, padded_width
from kd.settings.distillation import Objective

TOKENS, VOCAB_SIZE = 3, 300


def main() -> None:
    triton_kernels.BLOCK = 128  # three blocks per row, the last one not full
    found = {}
    for name in triton_kernels.KERNEL_DIVERGENCES:
        for soft_weight, temperature, real in itertools.product(
            (0.0, 0.3, 1.0), (1.0, 2.0), (False, True)
        ):
            objective = Objective(soft_weight, name, temperature, True, 0.3, 0.2)
            scale = 1000.0 if soft_weight == 0.3 else 1.0
            key = f"{objective}, bias and soft-cap: {real}"
            found[key] = difference(objective, real, True, scale)
        objective = Objective(1.0, name)
        found[f"{objective}, no gradient"] = difference(objective, True, False, 1.0)
        squared = Objective(1.0, name, 4.0, True)
        found[f"{squared}, float16"] = difference(squared, True, True, 0.1, half=True)
        found[f"{objective}, infinite"] = difference(objective, False, True, 1.0, infinite=True)
        key = f"{objective}, aligned"
        found[key] = difference(Objective(0.5, name, 2.0), True, True, 1.0, aligned=True)
    for training in (False, True):
        key = f"no teacher, gradient: {training}"
        found[key] = difference(Objective(soft_weight=0.0), False, training, 1.0, teacher=False)
    json.dump(found, sys.stdout)


def difference(
    objective, real, training, scale, teacher=True, half=False, infinite=False, aligned=False
) -> float:
    """Return the larger of the metrics' relative and the gradient's absolute difference.

    With `half`, the kernel's gradient is float16, and the difference that of its norm; with
    `infinite`, both models exclude the same ids, a whole block among them; with `aligned`, its rows
    are those of the fused loss, with NaN in the memory after the ids.
    """
    torch.manual_seed(0)
    labels = torch.randint(VOCAB_SIZE, (TOKENS,))
    student_logits = scale * torch.randn(TOKENS, VOCAB_SIZE)
    teacher_logits = scale * torch.randn(TOKENS, VOCAB_SIZE) if teacher else None
    head, teacher_head = (
        Head(
            torch.empty(0),
            torch.randn(VOCAB_SIZE + 8) if real else None,
            0.5,
            softcap if real else None,
        )
        for softcap in (20.0, 30.0)
    )
    if infinite:
        for logits in (student_logits, teacher_logits):
            logits[:, :130] = -torch.inf
        labels = labels.clamp(min=130)
    results, scales = [], None
    for module in (elementwise, triton_kernels):
        student, others = student_logits.clone(), teacher_logits.clone() if teacher else None
        if aligned and module is triton_kernels:
            student, others = in_aligned_rows(student), in_aligned_rows(others)
        gradient = student if training else None
        if half and module is triton_kernels:
            gradient, scales = torch.empty_like(student, dtype=torch.half), torch.empty(TOKENS)
        sums = module.tile_metrics(
            student,
            others,
            labels,
            head,
            teacher_head if teacher else None,
            objective,
            gradient,
            scales,
        )
        results.append((sums, gradient))
        if student.stride(0) > VOCAB_SIZE:
            padding = student.as_strided((TOKENS, student.stride(0)), student.stride())
            assert not padding[:, VOCAB_SIZE:].any()  # the products multiply it
    (sums, gradient), (kernel_sums, kernel_gradient) = results
    worst = ((kernel_sums - sums).abs() / sums.abs().clamp(min=1.0)).max().item()
    if half:
        assert torch.equal(scales.log2(), scales.log2().round())  # powers of two, which are exact
        exact = kernel_gradient.float() / scales[:, None]
        rounding = (exact - gradient).norm() / gradient.norm() / 2**-11  # at most 1 in float16
        return max(worst, 2e-5 * rounding.item())
    if training:
        # Gradients of reverse KL are of the order of the logits.
        size = gradient.abs().max().clamp(min=1.0)
        worst = max(worst, ((kernel_gradient - gradient).abs().max() / size).item())
    return worst


def in_aligned_rows(logits: torch.Tensor) -> torch.Tensor:
    rows = torch.full((TOKENS, padded_width(VOCAB_SIZE)), torch.nan)
    return rows[:, :VOCAB_SIZE].copy_(logits)


if __name__ == "__main__":
    main()
