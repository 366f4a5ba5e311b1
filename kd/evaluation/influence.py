"""Measure how much each layer of a model does to text, to choose the layers a student inherits.

L layers, N target tokens, H hidden. There are two measures:

angular distance  the angle between the hidden states before and after a run of layers, in half
                  turns: arccos(cos) / pi (Gromov et al. 2024, arXiv 2403.17887, section 3)
perplexity        without the layer. Layers are removed greedily, and the rest is measured again
                  after each removal, because a layer may matter only once another is gone.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.data.encoding import IGNORE_INDEX, EncodedRow, encode_rows
from kd.data.packing import Collator
from kd.data.sources import load_rows
from kd.evaluation.likelihood import Batch, as_backbone, exact_head, target_hidden, token_metrics

# angular removes the layers with the smallest distances, angular_run the run of layers with the
# smallest distance, perplexity the layers that perplexity needs least.
ENCODED_ROWS = 32  # rows that are encoded at once


def text_batches(
    sources: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tokens: int,
    batch_size: int,
    seed: int = 0,
) -> list[Batch]:
    """Batches of rows drawn from all sources, with at most `tokens` tokens in total.

    Raises ValueError if the first row is longer than that.
    """
    rows: list[EncodedRow] = []
    for row in shuffled_rows(sources, tokenizer, max_length, seed):
        if len(row) > tokens - sum(map(len, rows)):
            break
        rows.append(row)
    if not rows:
        raise ValueError(
            f"tokens: {tokens}, but the first row alone has more; wanted 20000, for example"
        )
    rows.sort(key=len, reverse=True)
    collate = Collator(tokenizer.pad_token_id)
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [Batch([], collate([[row] for row in group])) for group in groups]


def shuffled_rows(
    sources: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> Iterator[EncodedRow]:
    """The rows of all sources in random order, encoded on demand."""
    raw = load_rows(sources, seed)
    random.Random(seed).shuffle(raw)
    for start in range(0, len(raw), ENCODED_ROWS):
        rows = raw[start : start + ENCODED_ROWS]
        yield from encode_rows(rows, tokenizer, max_length)[0]


def angle(first: Tensor, second: Tensor) -> Tensor:
    """The angles, (N,), between (N, H) and (N, H) vectors in half turns: 1 for opposite ones.

    Computed from the diagonals of the rhombus, because arccos loses all digits near equality.
    """
    first, second = normalize(first.float(), dim=-1), normalize(second.float(), dim=-1)
    across, along = (first - second).norm(dim=-1), (first + second).norm(dim=-1)
    return 2 * torch.atan2(across, along) / math.pi


@torch.no_grad()
def angular_distances(model: PreTrainedModel, batches: list[Batch], run: int = 1) -> list[float]:
    """The mean distance per target token of every run of `run` consecutive layers, L + 1 - run.

    The first token of a row is not a target: many models keep a huge, meaningless state there.
    """
    modules = [*model.base_model.layers, model.base_model.norm]
    states: list[Tensor] = []  # (N, H) before each layer and before the final norm
    sums = torch.zeros(len(modules) - run, dtype=torch.float64)
    count = 0
    for batch in tqdm(batches, desc="angular distance", unit="batch"):
        targets = batch.inputs["labels"].to(model.device) != IGNORE_INDEX  # (B, T)
        states.clear()
        with observed_inputs(modules, lambda state, at=targets: states.append(state[at])):
            target_hidden_states(model, batch)
        pairs = zip(states[:-run], states[run:], strict=True)
        sums += torch.stack([angle(a, b).double().sum() for a, b in pairs]).cpu()
        count += int(targets.sum())
    return (sums / count).tolist()


@contextlib.contextmanager
def observed_inputs(
    modules: list[torch.nn.Module], observe: Callable[[Tensor], None]
) -> Iterator[None]:
    """Inside, `observe` is called with the input states, (B, T, H), of each of the modules."""

    def hook(_, inputs, kwargs):
        observe(inputs[0] if inputs else kwargs["hidden_states"])

    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def target_hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states that predict targets, (N, H), and the targets, (N,)."""
    with as_backbone(model):
        return target_hidden(model, batch)[:2]


@contextlib.contextmanager
def without_layers(model: PreTrainedModel, removed: Iterable[int]) -> Iterator[None]:
    """Inside, the removed layers return their input."""
    layers = [model.base_model.layers[n] for n in removed]
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def perplexity_without(
    model: PreTrainedModel, batches: list[Batch], vocab_size: int, removed: Iterable[int] = ()
) -> float:
    """The perplexity of the target tokens without the removed layers."""
    head, nats, count = exact_head(model, vocab_size), 0.0, 0
    with without_layers(model, removed):
        for batch in batches:
            hidden, labels = target_hidden_states(model, batch)
            nats += token_metrics(hidden, labels, head, vocab_size, None).sum().item()
            count += len(labels)
    return math.exp(nats / count)


def greedy_removal(
    model: PreTrainedModel, batches: list[Batch], vocab_size: int, drop: int
) -> dict[int, float]:
    """Remove `drop` layers, each time the one that raises the perplexity least.

    Returns:
        {layer: perplexity after its removal} in the order of removal.
    """
    depth = len(model.base_model.layers)
    removed: dict[int, float] = {}
    passes = sum(depth - n for n in range(drop))
    with tqdm(total=passes, desc="layers removed", unit="pass") as bar:
        for _ in range(drop):
            costs = {}
            for layer in (n for n in range(depth) if n not in removed):
                costs[layer] = perplexity_without(model, batches, vocab_size, [*removed, layer])
                bar.update()
            best = min(costs, key=costs.__getitem__)
            removed[best] = costs[best]
    return removed


def choose_by_influence(
    choice: str, model: PreTrainedModel, batches: list[Batch], vocab_size: int, keep: int
) -> tuple[list[int], dict]:
    """Choose the `keep` layers with the most influence.

    `choice` is angular, angular_run or perplexity.

    Returns:
        The layers in increasing order, and the measurements that chose them.
    """
    depth = len(model.base_model.layers)
    drop = depth - keep
    if not drop:
        return list(range(depth)), {}
    if choice == "perplexity":
        removed = greedy_removal(model, batches, vocab_size, drop)
        whole = perplexity_without(model, batches, vocab_size)
        measured = {"perplexity": whole, "perplexity_without": removed}
        return [n for n in range(depth) if n not in removed], measured
    distances = angular_distances(model, batches, drop if choice == "angular_run" else 1)
    order = sorted(range(len(distances)), key=distances.__getitem__)
    least = range(order[0], order[0] + drop) if choice == "angular_run" else order[:drop]
    return [n for n in range(depth) if n not in least], {"angular_distances": distances}
