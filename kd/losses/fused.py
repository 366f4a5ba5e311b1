"""The distillation loss fused with the output heads: it never holds all (N, V) logits at once.

N target tokens, V vocabulary, H hidden. The loss runs over tiles of tokens. Each tile costs one
matrix product for the student's logits, one for the teacher's (none if a cache gives them), one for
the gradient of the hidden states and, if the head is trained, one for the gradient of its weight.

The forward pass computes the gradient of the SUM of the loss over tokens and keeps it in float32;
the backward pass only multiplies it by the incoming gradient, such as a loss scale.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kd.gpu import triton_compiles
from kd.losses import cross_tokenizer as aligned
from kd.losses import elementwise, sparse
from kd.losses.head import Head, TeacherOutputs, padded_width
from kd.losses.metrics import TOKEN_METRICS
from kd.losses.segments import AlignedTeacherOutputs
from kd.losses.sparse import SparseTeacherOutputs
from kd.settings.distillation import Objective

TILE = 512  # most tokens per tile on a CPU: larger products are hardly faster
PIECE_BYTES = 2**25  # of a head that is converted to another dtype at one time
# Gradients of logits, of 1e-9 where a student is close to its teacher, underflow float16. So rows
# of a float16 gradient are multiplied by powers of two (kd.losses.elementwise), which the products
# undo: that of the hidden states afterwards. The product of the head's gradient sums over rows, so
# there each row of the states is multiplied by HEAD_SCALE / its power, and the sum divided by
# HEAD_SCALE, which keeps these states within the range of float16.
HEAD_SCALE = 2.0**8


def linear_distillation_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    objective: Objective,
    vocab_size: int,
    teacher: TeacherOutputs | SparseTeacherOutputs | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the training loss, summed over tokens, from hidden states and output heads.

    Gradients reach `hidden` and, where they require one, the weight and bias of `head`. Besides its
    results, the loss needs `objective.loss_workspace_mb` of memory.

    Args:
        hidden: (N, H) states that predict the labels. N may be 0; the loss is then 0.
        labels: (N,) target ids.
        head: The student's head.
        objective: The loss.
        vocab_size: Number of ids of the tokenizer. Both distributions are over the first
            `vocab_size` ids, without the padding of a head. A teacher with another tokenizer
            brings its own vocab_size.
        teacher: The teacher's outputs for these tokens; None only at soft_weight 0.

    Returns:
        The loss, a scalar, and the sums of TOKEN_METRICS, (len(TOKEN_METRICS),), both in float32,
        or float64 for float64 states.

    Raises:
        ValueError: A head has fewer rows than its tokenizer has ids, or the teacher's outputs are
            those of another batch.
    """
    assert teacher is not None or objective.soft_weight == 0.0
    _check_rows("student", head, vocab_size)
    live = isinstance(teacher, TeacherOutputs)
    if live:
        _check_rows("teacher", teacher.head, _teacher_vocab_size(teacher, vocab_size))
        if not isinstance(teacher, AlignedTeacherOutputs) and len(teacher.hidden) != len(labels):
            raise ValueError(
                f"the teacher's outputs cover {len(teacher.hidden)} tokens and the batch has "
                f"{len(labels)} targets; wanted the outputs of the same batch"
            )
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
            vocab_size,
            teacher,
            torch.is_grad_enabled(),
        )


def head_logits(hidden: Tensor, head: Head, vocab_size: int) -> Tensor:
    """Compute (n, vocab_size) logits of (n, H) states, with the dtypes and products of the loss."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    dtype = _product_dtype(hidden, head.weight, exact)
    logits = torch.empty(len(hidden), padded_width(vocab_size), dtype=exact, device=hidden.device)
    return head.finish_(_project(hidden.to(dtype), head.weight, logits, vocab_size))


def tile_tokens(
    objective: Objective,
    vocab_size: int,
    exact: torch.dtype,
    product_dtypes: list[torch.dtype],
    device: torch.device,
) -> int:
    """Return the tokens per tile whose buffers and temporaries fit the objective's workspace.

    Args:
        objective: Sets the workspace.
        vocab_size: Number of ids in a row of logits.
        exact: dtype of logits and sums.
        product_dtypes: dtypes of the heads' products, the student's first. A half-precision
            student needs a second buffer for its gradient.
        device: Where the loss runs.
    """
    vocab_size = padded_width(vocab_size)
    block = max(elementwise.BLOCK_ELEMENTS, vocab_size) * exact.itemsize
    aside = (elementwise.SCRATCH + 1) * block + 2 * PIECE_BYTES
    sizes = [exact.itemsize for _ in product_dtypes]
    sizes += [product_dtypes[0].itemsize] if product_dtypes[0] != exact else []
    tokens = max(1, (objective.workspace_bytes - aside) // (vocab_size * sum(sizes)))
    if device.type == "cpu":
        return min(tokens, TILE)
    return tokens // 128 * 128 or tokens  # whole blocks of the GPU's matrix products


def _check_rows(owner: str, head: Head, vocab_size: int) -> None:
    if len(head.weight) < vocab_size:
        raise ValueError(
            f"the {owner}'s head has {len(head.weight)} rows and the tokenizer {vocab_size} ids; "
            "wanted a row for every id: resize its embeddings to the tokenizer it was trained with"
        )


def _teacher_vocab_size(teacher: TeacherOutputs, vocab_size: int) -> int:
    return teacher.vocab_size if isinstance(teacher, AlignedTeacherOutputs) else vocab_size


def _tiles(
    teacher: TeacherOutputs | SparseTeacherOutputs | None, n: int, tokens: int
) -> Iterator[tuple[slice, slice]]:
    """Yield the student's and the teacher's rows of every tile; they differ across tokenizers."""
    if isinstance(teacher, AlignedTeacherOutputs):
        yield from teacher.tiles(tokens)
        return
    for start in range(0, n, tokens or 1):
        tile = slice(start, min(start + tokens, n))
        yield tile, tile


def _product_dtype(hidden: Tensor, weight: Tensor, exact: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's factors; its result is always in `exact`.

    It is half precision only on CUDA, where such products can accumulate and return float32.
    """
    if hidden.is_cuda and exact == torch.float32:
        for x in (weight, hidden):
            if x.dtype in (torch.bfloat16, torch.float16):
                return x.dtype
    return exact


def _elementwise_pass(
    hidden: Tensor, exact: torch.dtype, objective: Objective
) -> Callable[..., Tensor]:
    """Choose the Triton kernel where it can run, otherwise the passes of PyTorch."""
    if hidden.is_cuda and exact == torch.float32 and triton_compiles():
        from kd.losses import triton_kernels

        if objective.divergence in triton_kernels.KERNEL_DIVERGENCES:
            return triton_kernels.tile_metrics
    return elementwise.tile_metrics


def _product_width(weight: Tensor, vocab_size: int) -> int:
    """Return the rows of a head that take part in its products: an aligned number, if it has it."""
    return min(len(weight), padded_width(vocab_size))


def _project(hidden: Tensor, weight: Tensor, out: Tensor, vocab_size: int) -> Tensor:
    """Compute hidden (n, H) @ weight (V or more, H).T in the rows of `out`; return it, (n, V)."""
    for rows, piece in _pieces(weight, _product_width(weight, vocab_size), hidden.dtype):
        _multiply(hidden, piece.T, out[:, rows])
    return out[:, :vocab_size]


def _back_project(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute out (n, H) = gradient (n, V) @ weight (V or more, H).

    What is after the tokenizer's ids in a row of the gradient is 0.
    """
    for rows, piece in _pieces(weight, gradient.shape[-1], gradient.dtype):
        _multiply(gradient[:, rows], piece, out, accumulate=rows.start > 0)


def _pieces(weight: Tensor, vocab_size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the first rows of a head in `dtype`: one view, or converted copies piece by piece."""
    rows = vocab_size
    if weight.dtype != dtype:
        rows = max(1, PIECE_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, vocab_size, rows):
        piece = slice(start, min(start + rows, vocab_size))
        yield piece, weight.detach()[piece].to(dtype)


def _multiply(
    a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False, factor: float = 1.0
) -> None:
    """Compute out = a @ b or out += factor * a @ b, rounded only to the dtype of `out`."""
    dtypes = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, alpha=factor, out=out, **dtypes)
    else:
        torch.mm(a, b, out=out, **dtypes)


def _add_head_gradients(
    weight: Tensor | None,
    bias: Tensor | None,
    gradient: Tensor,
    hidden: Tensor,
    scales: Tensor | None,
) -> None:
    """Add a tile's part to the gradients of the head, `weight` (V, H) and `bias` (V,).

    Takes the gradient of the logits (n, V), multiplied by `scales` (n,) if they are given, and the
    hidden states (n, H).
    """
    vocab_size, factor, shares = gradient.shape[1], 1.0, None
    if scales is not None:
        factor, shares = 1 / HEAD_SCALE, (HEAD_SCALE / scales).to(gradient.dtype)
    if weight is not None:
        hidden = hidden if shares is None else hidden * shares[:, None]
        _multiply(gradient.T, hidden, weight[:vocab_size], accumulate=True, factor=factor)
    if bias is not None and shares is None:
        bias[:vocab_size] += gradient.sum(0, dtype=bias.dtype)
    elif bias is not None:
        _multiply(shares[None], gradient, bias[None, :vocab_size], accumulate=True, factor=factor)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head, objective, vocab_size, teacher, grad_mode):
        inputs = (hidden, weight, bias)
        trained = [grad_mode and needed for needed in ctx.needs_input_grad[:3]]
        # Logits and sums are in float32, or in float64 where the hidden states are.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        head = Head(
            weight.detach(), bias if bias is None else bias.detach(), head.scale, head.softcap
        )
        dtype = _product_dtype(hidden, weight, exact)
        live, dtypes = isinstance(teacher, TeacherOutputs), [dtype]
        if live:
            teacher_dtype = _product_dtype(teacher.hidden, teacher.head.weight, exact)
            dtypes.append(teacher_dtype)
        elif teacher is not None and hidden.is_cuda:
            dtypes += [exact] * sparse.SCRATCH
        other_tokenizer = isinstance(teacher, AlignedTeacherOutputs)
        teacher_vocab_size = _teacher_vocab_size(teacher, vocab_size)
        if other_tokenizer and hidden.is_cuda:
            dtypes += [exact] * aligned.SCRATCH
        widest = max(vocab_size, teacher_vocab_size)
        room = tile_tokens(objective, widest, exact, dtypes, hidden.device)
        tokens = max(room, aligned.MIN_TILE_TOKENS) if other_tokenizer else min(room, len(labels))

        metrics_of = _elementwise_pass(hidden, exact, objective)

        def buffer(dtype, vocab_size):
            return torch.empty(tokens, padded_width(vocab_size), dtype=dtype, device=hidden.device)

        student_buffer = buffer(exact, vocab_size)
        teacher_buffer = buffer(exact, teacher_vocab_size) if live else None
        gradient_buffer = student_buffer if dtype == exact else buffer(dtype, vocab_size)
        half_scales = None
        if dtype == torch.float16 and any(trained):
            half_scales = torch.empty(tokens, dtype=exact, device=hidden.device)
        gradients = [
            torch.zeros(x.shape, dtype=exact, device=hidden.device) if needed else None
            for x, needed in zip(inputs, trained, strict=True)
        ]
        sums = torch.zeros(len(TOKEN_METRICS), dtype=torch.float64, device=hidden.device)
        for tile, rows in _tiles(teacher, len(labels), tokens):
            n = tile.stop - tile.start
            tile_hidden = hidden.detach()[tile].to(dtype)  # (n, H)
            student = _project(tile_hidden, head.weight, student_buffer[:n], vocab_size)
            teacher_logits = None
            if live:
                teacher_logits = _project(
                    teacher.hidden[rows].to(teacher_dtype),
                    teacher.head.weight,
                    teacher_buffer[: rows.stop - rows.start],
                    teacher_vocab_size,
                )
            gradient = gradient_buffer[:n, :vocab_size] if any(trained) else None
            scales = None if half_scales is None else half_scales[:n]
            if isinstance(teacher, SparseTeacherOutputs):
                known = teacher.rows(tile, exact)
                sums += sparse.tile_metrics(
                    student, known, labels[tile], head, objective, gradient, scales
                )
            elif other_tokenizer:
                sums += aligned.tile_metrics(
                    student,
                    teacher_logits,
                    labels[tile],
                    teacher,
                    (tile, rows),
                    head,
                    objective,
                    gradient,
                    scales,
                )
            else:
                sums += metrics_of(
                    student,
                    teacher_logits,
                    labels[tile],
                    head,
                    teacher and teacher.head,
                    objective,
                    gradient,
                    scales,
                )
            if gradient is not None:
                gradient = gradient_buffer[:n, : _product_width(head.weight, vocab_size)]
                gradient[:, vocab_size:].zero_()
            hidden_gradient, *head_gradients = gradients
            if hidden_gradient is not None:
                _back_project(gradient, head.weight, hidden_gradient[tile])
                if scales is not None:
                    hidden_gradient[tile] /= scales[:, None]
            if any(trained[1:]):
                _add_head_gradients(*head_gradients, gradient, tile_hidden, scales)
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        divergence = sums[TOKEN_METRICS.index("divergence")]
        cross_entropy = sums[TOKEN_METRICS.index("cross_entropy")]
        loss, sums = objective.total(divergence, cross_entropy).to(exact), sums.to(exact)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_output, _):
        # With `out`, the product is formed in float32 and rounded once, without a copy of a head.
        scaled = [
            None
            if gradient is None
            else torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, *[None] * 6)
