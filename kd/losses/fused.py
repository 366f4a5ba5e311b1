"""The training loss from hidden states and heads, in tiles of tokens: (N, V) never exists whole.

N target tokens, V vocabulary, H hidden. A tile costs one product for the student's logits, one for
the teacher's (none where a cache gives its likeliest ids), one for the gradient of the hidden states
and, where the head trains, one for the head's. The gradient is that of the SUM over tokens; it is
formed in the forward and kept in float32, because the loss scale is known only in backward.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kd.losses import cross_tokenizer as aligned
from kd.losses import elementwise, sparse
from kd.losses.objective import METRICS, Head, Objective, TeacherSignal
from kd.losses.segments import AlignedSignal
from kd.losses.sparse import SparseSignal

TILE = 256  # tokens a tile at most on a CPU: smaller products are slower, larger ones hardly faster
PIECE_BYTES = 2**25  # of a head that is converted for the product, at one time


def linear_distillation_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    objective: Objective,
    vocabulary: int,
    teacher: TeacherSignal | SparseSignal | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss summed over tokens, metric sums in the order of METRICS).

    `hidden` (N, H) predicts `labels` (N,). N may be 0: the loss is then 0 with a gradient path.
    The gradient reaches `hidden` and, where they train, the head's weight and bias. Both
    distributions are over the first `vocabulary` ids, those that the tokenizer has; a teacher with
    another tokenizer has as many as its signal says.
    Memory beside the results: objective.loss_workspace_mb. Raises ValueError where a head has
    fewer rows than that.
    """
    assert teacher is not None or objective.soft_weight == 0.0
    _check_rows("student", head, vocabulary)
    live = isinstance(teacher, TeacherSignal)
    if live:
        _check_rows("teacher", teacher.head, _teacher_vocabulary(teacher, vocabulary))
    device = hidden.device.type
    if device == "cuda" and torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        hidden = hidden.to(half)
        teacher = replace(teacher, hidden=teacher.hidden.to(half)) if live else teacher
    with torch.autocast(device, enabled=False):
        return _FusedLoss.apply(
            hidden,
            head.weight,
            head.bias,
            labels,
            head,
            objective,
            vocabulary,
            teacher,
            torch.is_grad_enabled(),
        )


def head_logits(hidden: Tensor, head: Head, vocabulary: int) -> Tensor:
    """(n, vocabulary) logits of (n, H) hidden states, in float32 by the products of the loss."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    kind = _product_type(hidden, head.weight, exact)
    logits = torch.empty(len(hidden), vocabulary, dtype=exact, device=hidden.device)
    _project(hidden.to(kind), head.weight, logits)
    return head.finish_(logits)


def tile_tokens(
    objective: Objective,
    vocabulary: int,
    exact: torch.dtype,
    product_types: list[torch.dtype],
    device: torch.device,
) -> int:
    """Tokens a tile, so that its buffers and temporaries stay within the objective's workspace.

    `product_types` are those of the heads' products; a half-precision one needs a copy of the
    gradient.
    """
    block = max(elementwise.BLOCK_ELEMENTS, vocabulary) * exact.itemsize
    aside = (elementwise.SCRATCH + 1) * block + 2 * PIECE_BYTES
    sizes = [exact.itemsize for _ in product_types]
    sizes += [product_types[0].itemsize] if product_types[0] != exact else []
    tokens = max(1, (objective.loss_workspace_mb * 2**20 - aside) // (vocabulary * sum(sizes)))
    if device.type == "cpu":
        return min(tokens, TILE)
    return tokens // 128 * 128 or tokens  # whole blocks of the GPU's products


def _check_rows(owner: str, head: Head, vocabulary: int) -> None:
    if len(head.weight) < vocabulary:
        raise ValueError(
            f"the {owner}'s head has {len(head.weight)} rows and the tokenizer {vocabulary} ids; "
            "wanted a row for every id: resize its embeddings to the tokenizer it was trained with"
        )


def _teacher_vocabulary(teacher: TeacherSignal, vocabulary: int) -> int:
    return teacher.vocabulary if isinstance(teacher, AlignedSignal) else vocabulary


def _tiles(teacher: TeacherSignal | SparseSignal | None, n: int, tokens: int) -> Iterator[tuple]:
    """The student's and the teacher's rows of every tile; the same, but for another tokenizer."""
    if isinstance(teacher, AlignedSignal):
        yield from teacher.tiles(tokens)
        return
    for start in range(0, n, tokens or 1):
        tile = slice(start, min(start + tokens, n))
        yield tile, tile


def _product_type(hidden: Tensor, weight: Tensor, exact: torch.dtype) -> torch.dtype:
    """What a product's factors are converted to; its result is `exact` in either case.

    Half precision only on CUDA, where products of it can be given out in float32.
    """
    if hidden.is_cuda and exact == torch.float32:
        for x in (weight, hidden):
            if x.dtype in (torch.bfloat16, torch.float16):
                return x.dtype
    return exact


def _elementwise_pass(hidden: Tensor, exact: torch.dtype) -> Callable[..., Tensor]:
    """One kernel on CUDA, where Triton comes with PyTorch (on Linux); else passes of PyTorch."""
    if hidden.is_cuda and exact == torch.float32 and importlib.util.find_spec("triton"):
        from kd.losses import triton_kernels

        return triton_kernels.tile_figures
    return elementwise.tile_figures


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, V) = hidden (n, H) @ weight (V or more, H).T"""
    for rows, piece in _pieces(weight, out.shape[-1], hidden.dtype):
        _multiply(hidden, piece.T, out[:, rows])


def _back_project(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, H) = gradient (n, V) @ weight (V or more, H)"""
    for rows, piece in _pieces(weight, gradient.shape[-1], gradient.dtype):
        _multiply(gradient[:, rows], piece, out, accumulate=rows.start > 0)


def _pieces(weight: Tensor, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The first rows of a head in `dtype`: one view where they are that, else piece by piece."""
    rows = vocabulary
    if weight.dtype != dtype:
        rows = max(1, PIECE_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, vocabulary, rows):
        piece = slice(start, min(start + rows, vocabulary))
        yield piece, weight.detach()[piece].to(dtype)


def _multiply(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b or out += a @ b, not rounded to the type of a and b before it is in `out`."""
    types = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **types)
    else:
        torch.mm(a, b, out=out, **types)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head, objective, vocabulary, teacher, grad_mode):
        inputs = (hidden, weight, bias)
        trained = [grad_mode and needed for needed in ctx.needs_input_grad[:3]]
        # Logits and sums are in float32, or in float64 where the hidden states are.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        head = Head(
            weight.detach(), bias if bias is None else bias.detach(), head.scale, head.softcap
        )
        kind = _product_type(hidden, weight, exact)
        live, kinds = isinstance(teacher, TeacherSignal), [kind]
        if live:
            teacher_kind = _product_type(teacher.hidden, teacher.head.weight, exact)
            kinds.append(teacher_kind)
        elif teacher is not None and hidden.is_cuda:
            kinds += [exact] * sparse.SCRATCH
        other = isinstance(teacher, AlignedSignal)
        theirs = _teacher_vocabulary(teacher, vocabulary)
        if other and hidden.is_cuda:
            kinds += [exact] * aligned.SCRATCH
        tokens = tile_tokens(objective, max(vocabulary, theirs), exact, kinds, hidden.device)
        tokens = max(tokens, aligned.LEAST_TOKENS) if other else min(tokens, len(labels))

        figures_of = _elementwise_pass(hidden, exact)

        def buffer(dtype, vocabulary):
            return torch.empty(tokens, vocabulary, dtype=dtype, device=hidden.device)

        student_buffer = buffer(exact, vocabulary)
        teacher_buffer = buffer(exact, theirs) if live else None
        gradient_buffer = student_buffer if kind == exact else buffer(kind, vocabulary)
        kept = [
            torch.zeros(x.shape, dtype=exact, device=hidden.device) if wanted else None
            for x, wanted in zip(inputs, trained, strict=True)
        ]
        sums = torch.zeros(len(METRICS), dtype=torch.float64, device=hidden.device)
        for tile, rows in _tiles(teacher, len(labels), tokens):
            n = tile.stop - tile.start
            student = student_buffer[:n]  # (n, V)
            tile_hidden = hidden.detach()[tile].to(kind)  # (n, H)
            _project(tile_hidden, head.weight, student)
            teacher_logits = None
            if live:
                teacher_logits = teacher_buffer[: rows.stop - rows.start]  # (n, V)
                _project(teacher.hidden[rows].to(teacher_kind), teacher.head.weight, teacher_logits)
            gradient = gradient_buffer[:n] if any(trained) else None
            if isinstance(teacher, SparseSignal):
                known = teacher.rows(tile, exact)
                sums += sparse.tile_figures(student, known, labels[tile], head, objective, gradient)
            elif other:
                sums += aligned.tile_figures(
                    student,
                    teacher_logits,
                    labels[tile],
                    teacher,
                    (tile, rows),
                    head,
                    objective,
                    gradient,
                )
            else:
                sums += figures_of(
                    student,
                    teacher_logits,
                    labels[tile],
                    head,
                    teacher and teacher.head,
                    objective,
                    gradient,
                )
            if trained[0]:
                _back_project(gradient, head.weight, kept[0][tile])
            if trained[1]:
                _multiply(gradient.T, tile_hidden, kept[1][:vocabulary], accumulate=True)
            if trained[2]:
                kept[2][:vocabulary] += gradient.sum(0, dtype=exact)
        ctx.kept = kept
        ctx.types = [None if x is None else x.dtype for x in inputs]
        divergence, hard = sums[METRICS.index("divergence")], sums[METRICS.index("cross_entropy")]
        total, sums = objective.total(divergence, hard).to(exact), sums.to(exact)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx, grad_output, _):
        # Through `out`, the multiplication is in float32 and rounds once; no copy of a head.
        scaled = [
            None
            if gradient is None
            else torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.kept, ctx.types, strict=True)
        ]
        return (*scaled, *[None] * 6)
