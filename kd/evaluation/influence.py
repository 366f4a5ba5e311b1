"""How much every block of a model does to text: what a student of its blocks can do without.

L blocks, N target tokens, H hidden. Two measures:
angular distance  the angle between the states that go into a run of blocks and those that come out,
                  in half turns: arccos(cos) / pi (Gromov et al. 2024, arXiv 2403.17887, section 3)
perplexity        with the block left out; the least missed one is left out for good, and the
                  others are measured anew, for two blocks may each be missed only with the other
"""

import contextlib
import math
import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.data.encoding import IGNORE_INDEX, EncodedRow, encode_rows
from kd.data.packing import Collator
from kd.data.sources import load_rows
from kd.evaluation.likelihood import Batch, as_backbone, exact_head, target_hidden, token_figures

# The choices of blocks that are left once others are taken away: those that turn the hidden states
# least, the run of blocks that together does, or those that are missed least, one after the other.
MEASURED = ("angular", "angular_run", "perplexity")
CHUNK = 32  # rows that are encoded at once


def text_batches(
    sources: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tokens: int,
    batch_size: int,
    seed: int = 0,
) -> list[Batch]:
    """Batches of rows drawn from all sources, `tokens` together at most.

    Raises ValueError where the first row drawn is longer than that.
    """
    rows: list[EncodedRow] = []
    for row in drawn_rows(sources, tokenizer, max_length, seed):
        if len(row) > tokens - sum(map(len, rows)):
            break
        rows.append(row)
    if not rows:
        raise ValueError(f"tokens: {tokens}, and the first row alone has more; wanted 20000, say")
    rows.sort(key=len, reverse=True)
    collate = Collator(tokenizer.pad_token_id)
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [Batch([], collate([[row] for row in group])) for group in groups]


def drawn_rows(
    sources: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> Iterator[EncodedRow]:
    """Rows of all sources in an order drawn by the seed, encoded as they are asked for."""
    raw = load_rows(sources, seed)
    random.Random(seed).shuffle(raw)
    for start in range(0, len(raw), CHUNK):
        chunk = raw[start : start + CHUNK]
        yield from encode_rows(chunk, tokenizer, max_length, progress=False)[0]


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in half turns of (N, H) and (N, H), (N,): 0 one direction, 1 opposite ones.

    By the two diagonals of the rhombus, since arccos has no digits left near equality.
    """
    first, second = normalize(first.float(), dim=-1), normalize(second.float(), dim=-1)
    across, along = (first - second).norm(dim=-1), (first + second).norm(dim=-1)
    return 2 * torch.atan2(across, along) / math.pi


@torch.no_grad()
def angular_distances(
    model: PreTrainedModel, batches: list[Batch], run: int = 1, progress: bool = True
) -> list[float]:
    """Of every run of `run` blocks in turn, L + 1 - run of them: mean distance a target token.

    The first token of a row is none: many models keep there a huge state that means nothing.
    """
    modules = [*model.base_model.layers, model.base_model.norm]
    states: list[Tensor] = []  # (N, H) before each block, and before the final norm
    sums = torch.zeros(len(modules) - run, dtype=torch.float64)
    count = 0
    for batch in tqdm(batches, desc="angular distance", unit="batch", disable=not progress):
        targets = batch.inputs["labels"].to(model.device) != IGNORE_INDEX
        states.clear()
        with before(modules, lambda state, targets=targets: states.append(state[targets])):
            target_hidden_states(model, batch)
        pairs = zip(states[:-run], states[run:], strict=True)
        sums += torch.stack([angle(a, b).double().sum() for a, b in pairs]).cpu()
        count += int(targets.sum())
    return (sums / count).tolist()


@contextlib.contextmanager
def before(modules: list[torch.nn.Module], keep) -> Iterator[None]:
    """Inside, `keep` is given the (B, T, H) states that go into every one of the modules."""

    def hook(_, inputs, kwargs):
        keep(inputs[0] if inputs else kwargs["hidden_states"])

    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def target_hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """((N, H), (N,)): states that predict targets, and the targets."""
    with as_backbone(model):
        return target_hidden(model, batch)[:2]


@contextlib.contextmanager
def without_blocks(model: PreTrainedModel, left_out: Iterable[int]) -> Iterator[None]:
    """Inside, these blocks pass on what they are given."""
    blocks = [model.base_model.layers[n] for n in left_out]
    for block in blocks:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@torch.no_grad()
def perplexity_without(
    model: PreTrainedModel, batches: list[Batch], vocabulary: int, left_out: Iterable[int] = ()
) -> float:
    """Perplexity of the target tokens, with these blocks left out."""
    head, nats, count = exact_head(model, vocabulary), 0.0, 0
    with without_blocks(model, left_out):
        for batch in batches:
            hidden, labels = target_hidden_states(model, batch)
            nats += token_figures(hidden, labels, head, vocabulary, None).sum().item()
            count += len(labels)
    return math.exp(nats / count)


def least_missed(
    model: PreTrainedModel,
    batches: list[Batch],
    vocabulary: int,
    drop: int,
    progress: bool = True,
) -> dict[int, float]:
    """{block: perplexity once it is left out too}, of `drop` blocks in the order of leaving."""
    depth = len(model.base_model.layers)
    left: dict[int, float] = {}
    passes = sum(depth - n for n in range(drop))
    with tqdm(total=passes, desc="blocks left out", unit="pass", disable=not progress) as bar:
        for _ in range(drop):
            costs = {}
            for block in (n for n in range(depth) if n not in left):
                costs[block] = perplexity_without(model, batches, vocabulary, [*left, block])
                bar.update()
            best = min(costs, key=costs.__getitem__)
            left[best] = costs[best]
    return left


def measured_layers(
    choice: str,
    model: PreTrainedModel,
    batches: list[Batch],
    vocabulary: int,
    keep: int,
    progress: bool = True,
) -> tuple[list[int], dict]:
    """(the blocks to keep, the figures that chose them). Choices: MEASURED."""
    depth = len(model.base_model.layers)
    drop = depth - keep
    if not drop:
        return list(range(depth)), {}
    if choice == "perplexity":
        left = least_missed(model, batches, vocabulary, drop, progress)
        whole = perplexity_without(model, batches, vocabulary)
        figures = {"perplexity": whole, "perplexity_without": left}
        return [n for n in range(depth) if n not in left], figures
    distances = angular_distances(model, batches, drop if choice == "angular_run" else 1, progress)
    order = sorted(range(len(distances)), key=distances.__getitem__)
    least = range(order[0], order[0] + drop) if choice == "angular_run" else order[:drop]
    return [n for n in range(depth) if n not in least], {"angular_distances": distances}
