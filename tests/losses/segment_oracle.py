"""Reference of the cross-tokenizer loss: segment by segment in probabilities, with autograd."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.losses.divergences import DIVERGENCES
from kd.losses.segments import AlignedTeacherOutputs
from kd.settings.distillation import Objective


def segment_by_segment(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor,
    outputs: AlignedTeacherOutputs,
    objective: Objective,
) -> tuple[Tensor, float]:
    """Return (loss, its divergence) from whole logits (N, V) and (M, V of the teacher)."""
    temperature, total = objective.temperature, 0.0
    sides = outputs.segments, outputs.teacher_segments
    for number in range(max(sides[1], default=-1) + 1):
        ours, theirs = (np.flatnonzero(side == number).tolist() for side in sides)
        both = (
            (student, labels, ours, outputs.student_classes),
            (teacher, outputs.labels, theirs, outputs.teacher_classes),
        )
        firsts = [ids[rows[0]].item() for _, ids, rows, _ in both]
        classes = [known.class_of[i].item() for i, (*_, known) in zip(firsts, both, strict=True)]
        nonempty = [
            len(rows) > 1 or (known.class_of == known.class_of[i]).sum() > 1
            for i, (_, _, rows, known) in zip(firsts, both, strict=True)
        ]
        pair = [known.main[c].item() for c, (*_, known) in zip(classes, both, strict=True)]
        single_pair = pair == firsts and classes[0] == classes[1] and len(ours) == len(theirs) == 1
        separate = all(nonempty) and not single_pair
        masses = []
        for logits, ids, rows, known in both:
            p = (logits[rows] / temperature).softmax(-1)
            text = p[range(len(rows)), ids[rows]].prod()
            mass = torch.zeros(len(known.main), dtype=p.dtype)
            mass = mass.index_add(0, known.class_of, p[0])
            if separate:
                out = torch.zeros_like(mass)
                out[known.class_of[ids[rows[0]]]] = 1.0
                mass = torch.cat([mass - out * text, text[None]])
            elif classes[0] != classes[1]:
                kept = [k for k in range(len(mass)) if k not in classes]
                mass = torch.cat([mass[kept], mass[classes].sum()[None]])
            masses.append(mass.log())
        divergence = DIVERGENCES[objective.divergence]
        total = total + divergence(masses[1], masses[0], **objective.mixture)
    soft = total * objective.divergence_scale
    hard = cross_entropy(student, labels, reduction="sum")
    loss = objective.soft_weight * soft + (1 - objective.soft_weight) * hard
    return loss, soft.item()
