"""Packed documents do not see each other or the padding, and no row is lost."""

import random

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model, small_rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kd.data.encoding import IGNORE_INDEX, EncodedRow, encode_rows
from kd.data.packing import (
    ON_POLICY,
    Collator,
    GroupedByLength,
    bounds_of,
    by_length,
    check_packing,
    pack,
    padding_share,
    side_by_side,
    to_device,
)
from kd.models.heads import LossInputs, return_loss
from kd.settings.distillation import Objective


def document(length: int, start: int = 5) -> EncodedRow:
    ids = [start + (i * 7) % 200 for i in range(length)]
    return EncodedRow.from_labels(ids, [IGNORE_INDEX, *ids[1:]])


@given(st.lists(st.integers(2, 50), min_size=1, max_size=60))
@settings(deadline=None, max_examples=50)
def test_packing_keeps_every_row_and_no_bin_overflows(lengths):
    rows = [document(length, 5 + i) for i, length in enumerate(lengths)]
    bins = pack(rows, 50)
    assert sorted(map(id, rows)) == sorted(id(row) for documents in bins for row in documents)
    assert all(sum(map(len, documents)) <= 50 for documents in bins)
    assert bins == slow_pack(rows, 50)


def slow_pack(rows: list[EncodedRow], space: int) -> list[list[EncodedRow]]:
    """Best-fit decreasing by its definition: the fullest bin with room, the latest among equals."""
    bins: list[list] = []  # [free, when it was last filled, rows]
    for time, row in enumerate(sorted(rows, key=len, reverse=True)):
        room = [bin_ for bin_ in bins if bin_[0] >= len(row)]
        best = min(room, key=lambda bin_: (bin_[0], -bin_[1]), default=None)
        if best is None:
            best = [space, time, []]
            bins.append(best)
        best[0], best[1] = best[0] - len(row), time
        best[2].append(row)
    return [bin_[2] for bin_ in bins]


def test_the_first_token_of_every_packed_document_is_no_target():
    batch = Collator(0)([[document(6), document(7)]])
    assert batch["labels"][0, 0] == IGNORE_INDEX and batch["labels"][0, 6] == IGNORE_INDEX
    assert batch["position_ids"][0, :13].tolist() == [*range(6), *range(7)]


def test_positions_continue_through_padding():
    """A restart would mark an unpacked row as packed and cost it the plain causal kernel."""
    one, two = (
        Collator(0)([[document(6)]]),
        Collator(0)([[document(6), document(7)], [document(9)]]),
    )
    assert one["position_ids"].tolist() == [[*range(8)]]
    assert two["position_ids"].tolist() == [[*range(6), *range(10)], [*range(16)]]
    wide = side_by_side([one, two])["position_ids"]
    assert wide.tolist() == [[*range(16)], *two["position_ids"].tolist()]


def test_padding_share_counts_the_padded_positions():
    lengths = [10, 4, 5, 4]  # (4, 4) and (5, 10) side by side
    assert padding_share(lengths, 2, grouped=True) == 1 - 23 / 28


def micro_batches(lengths: list[int], size: int) -> list[dict]:
    rows = [[document(length, 5 + i)] for i, length in enumerate(lengths)]
    return [Collator(0)(rows[i : i + size]) for i in range(0, len(rows), size)]


def rows_of(batches: list[dict]) -> list[tuple]:
    """Ids, labels and positions of every row without its padding, sorted."""
    keys = ("input_ids", "labels", "position_ids")
    return sorted(
        tuple(tuple(batch[key][i, :length].tolist()) for key in keys)
        for batch in batches
        for i, length in enumerate(batch["tokens"].tolist())
    )  # fmt: skip


@given(st.lists(st.integers(2, 60), min_size=2, max_size=24), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_rows_redistributed_by_length_are_the_same_rows_in_fewer_positions(lengths, size):
    batches = micro_batches(lengths, size)
    shared = by_length(batches)
    assert rows_of(shared) == rows_of(batches)
    assert [len(b["tokens"]) for b in shared] == [len(b["tokens"]) for b in batches]
    before, after = (sum(b["input_ids"].numel() for b in part) for part in (batches, shared))
    assert after < before or shared is batches
    for batch in shared:
        padding = torch.arange(batch["labels"].shape[1]) >= batch["tokens"][:, None]
        assert (batch["labels"][padding] == IGNORE_INDEX).all()
        assert batch["labels"].shape[1] < batch["tokens"].max() + 8


def test_redistribution_by_length_changes_neither_loss_nor_gradient(tokenizer):
    batches = micro_batches([40, 5, 9, 33, 6, 31, 12], 2)
    shared = by_length(batches)
    assert sum(b["input_ids"].numel() for b in shared) < 0.8 * sum(
        b["input_ids"].numel() for b in batches
    )
    found = []
    for part in (batches, shared):
        model, total = small_model(tokenizer), 0.0
        return_loss(model)
        for batch in part:
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            loss_inputs = LossInputs(batch["labels"], Objective(soft_weight=0.0), len(tokenizer))
            loss = model(**inputs, loss_inputs=loss_inputs)["loss"]
            loss.backward()
            total += loss.item()
        found.append((total, [parameter.grad for parameter in model.parameters()]))
    (loss, gradients), (wanted, wanted_gradients) = found
    assert loss == pytest.approx(wanted, rel=1e-6)
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        assert (gradient - other).norm() <= 1e-6 * other.norm()


def test_the_on_policy_mask_moves_with_its_rows():
    """Even if one of the batches was padded further than the others."""
    batches = [
        b | {ON_POLICY: b["input_ids"] % 3 == 1} for b in micro_batches([40, 5, 9, 33, 6, 31], 2)
    ]
    shared = by_length(batches)
    assert shared is not batches
    for batch in shared:
        told = torch.arange(batch["labels"].shape[1]) < batch["tokens"][:, None]
        assert torch.equal(batch[ON_POLICY], (batch["input_ids"] % 3 == 1) & told)
    assert by_length([*batches[:2], micro_batches([40, 5], 2)[0]])[2].keys() == batches[
        2
    ].keys() - {ON_POLICY}


def test_batches_with_other_keys_are_not_redistributed():
    """A cache's targets are in the order of the batch's rows."""
    batches = [batch | {"cached": torch.zeros(3)} for batch in micro_batches([40, 5, 9, 33], 2)]
    assert by_length(batches) is batches


def test_padding_share_is_that_of_rows_redistributed_within_a_step():
    lengths = [50, 3, 8, 41, 5, 12, 47, 9]
    shuffled = list(lengths)
    random.Random(0).shuffle(shuffled)
    shared = by_length(
        [Collator(0, 1)([[document(n)] for n in shuffled[i : i + 2]]) for i in range(0, 8, 2)], 1
    )
    positions = sum(batch["input_ids"].numel() for batch in shared)
    assert padding_share(lengths, 2, accumulation=4) == pytest.approx(1 - sum(lengths) / positions)
    assert padding_share(lengths, 2, accumulation=4) < padding_share(lengths, 2)


def test_grouping_by_length_keeps_all_rows_in_an_order_of_seed_and_epoch():
    lengths = [(7 * i) % 101 + 1 for i in range(400)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = GroupedByLength(4, lengths, seed)
        list(sampler)  # another epoch; the global generator advances
        torch.rand(3)
        loader = torch.utils.data.DataLoader(range(400), 4, sampler=sampler)
        prepare_data_loader(loader, put_on_device=False).set_epoch(epoch)
        return list(sampler)

    first = order(0, 0)
    assert sorted(first) == list(range(400)) and first == order(0, 0)
    assert len({tuple(first), tuple(order(0, 1)), tuple(order(7, 0))}) == 3
    in_order = [lengths[i] for i in first]
    assert padding_of(in_order) < 0.1 < 0.2 < padding_of(lengths)


def padding_of(lengths: list[int]) -> float:
    groups = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    return 1 - sum(lengths) / sum(4 * max(group) for group in groups)


SMALL = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def family_model(kind: str, attention: str):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SMALL | FAMILIES[kind])
    check_packing(config, kind)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    "kind, attention",
    [*((kind, "eager") for kind in FAMILIES), *((k, "sdpa") for k in FAMILIES if k != "gemma2")],
)
def test_changing_one_document_leaves_the_others_unchanged_to_the_bit(kind, attention):
    """In a batch of two packed rows, whichever document of a row is changed."""
    model = family_model(kind, attention)
    rows = [[document(9, 5), document(12, 9)], [document(11, 7), document(5, 8), document(6, 3)]]

    @torch.no_grad()  # with a KV cache Transformers ignores position_ids
    def logits(rows) -> torch.Tensor:
        batch = Collator(0)(rows)
        keys = ("input_ids", "position_ids")
        return model(**{key: batch[key] for key in keys}, use_cache=False).logits

    before = logits(rows)
    first = logits([[document(9, 50), rows[0][1]], rows[1]])
    second = logits([[rows[0][0], document(12, 50)], rows[1]])
    assert torch.equal(before[0, 9:21], first[0, 9:21])
    assert not torch.equal(before[0, :9], first[0, :9])
    assert torch.equal(before[0, :9], second[0, :9])
    assert torch.equal(before[1], first[1]) and torch.equal(before[1], second[1])


@pytest.mark.parametrize(
    "kind, changes, why",
    [
        ("mamba", {}, "layers of linear_attention"),
        ("bloom", {}, "no rotary positions"),
        ("qwen3_next", {}, "layers of linear_attention"),
    ],
)
def test_packing_is_rejected_if_documents_would_see_each_other(kind, changes, why):
    config = CONFIG_MAPPING[kind](**changes)
    with pytest.raises(ValueError, match=f"packing: a/model .*{why}.*group_by_length"):
        check_packing(config, "a/model")


@torch.no_grad()
def test_documents_do_see_each_other_in_a_rejected_model():
    """So check_packing does not reject a model needlessly."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["bloom"](vocab_size=320, hidden_size=32, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    one, two = (Collator(0)([[document(9, n), document(7, 9)]])["input_ids"] for n in (5, 50))
    a, b = (model(input_ids=ids, use_cache=False).logits for ids in (one, two))
    assert not torch.equal(a[0, 9:16], b[0, 9:16])


def batches(tokenizer, way: str) -> list[dict]:
    rows, _ = encode_rows(small_rows(8), tokenizer, 200)
    alone, collate = [[row] for row in rows], Collator(0)
    if way == "one by one":
        return [collate([row]) for row in alone]
    if way == "padded":
        return [Collator(0, pad_to_multiple_of=64)(alone)]
    if way == "packed":
        return [collate(pack(rows, 200))]
    return [Collator(0, flat=True)(pack(rows, 200))]


def loss_and_gradients(tokenizer, way: str) -> tuple[float, dict]:
    model = small_model(tokenizer)
    return_loss(model)
    total = 0.0
    for batch in batches(tokenizer, way):
        inputs = LossInputs(
            batch.pop("labels"), Objective(soft_weight=0.0), len(tokenizer), None, None, None
        )
        loss = model(**batch, loss_inputs=inputs)["loss"]
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["padded", "packed", "flat"])
def test_padded_packed_flat_and_single_rows_give_the_same_loss_and_gradients(tokenizer, way):
    wanted, gradients = loss_and_gradients(tokenizer, "one by one")
    found, ours = loss_and_gradients(tokenizer, way)
    assert abs(found - wanted) < 1e-6 * wanted
    for name, gradient in gradients.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@torch.no_grad()
def test_packed_documents_stay_apart_on_a_gpu(tokenizer, attention):
    """To the bit; and each document has the logits that it has alone."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    model = small_model(tokenizer, hidden=64).to("cuda", torch.bfloat16).eval()
    model.set_attn_implementation(attention)
    collate = Collator(0, flat=attention == "flash_attention_2")

    def logits(*documents) -> torch.Tensor:
        batch = to_device(collate([list(documents)]), torch.device("cuda"))
        inputs = {k: batch[k] for k in ("input_ids", "position_ids")} | bounds_of(batch)
        length = sum(map(len, documents))
        return model(**inputs, use_cache=False).logits[0, :length].float()

    first, other, second = document(40, 5), document(40, 50), document(60, 9)
    packed, changed = logits(first, second), logits(other, second)
    assert torch.equal(packed[40:], changed[40:]) and not torch.equal(packed[:40], changed[:40])
    alone = logits(second)
    assert (packed[40:] - alone).norm() < 2e-2 * alone.norm()
