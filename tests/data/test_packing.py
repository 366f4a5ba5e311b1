"""Packed documents do not see each other, padding is seen by none, and nothing is lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import small_model

from kd.data.masks import IGNORED, EncodedRow
from kd.data.packing import Collator, pack, padding_share


def document(length: int, start: int = 5) -> EncodedRow:
    ids = [start + (i * 7) % 200 for i in range(length)]
    return EncodedRow(ids, [IGNORED, *ids[1:]])


@given(st.lists(st.integers(2, 50), min_size=1, max_size=60))
@settings(deadline=None, max_examples=50)
def test_packing_keeps_every_row_and_no_bin_overflows(lengths):
    rows = [document(length, 5 + i) for i, length in enumerate(lengths)]
    bins = pack(rows, 50)
    assert sorted(map(id, rows)) == sorted(id(row) for documents in bins for row in documents)
    assert all(sum(map(len, documents)) <= 50 for documents in bins)
    assert len(bins) <= len(rows)


def test_first_token_of_every_packed_document_is_no_target():
    batch = Collator(0)([[document(6), document(7)]])
    assert batch["labels"][0, 0] == IGNORED and batch["labels"][0, 6] == IGNORED
    assert batch["position_ids"][0, :13].tolist() == [*range(6), *range(7)]


def test_changing_one_document_leaves_the_other_unchanged_to_the_bit(tokenizer):
    model = small_model(tokenizer).eval()
    one = Collator(0)([[document(9, 5), document(12, 9)]])
    two = Collator(0)([[document(9, 50), document(12, 9)]])
    keys = ("input_ids", "position_ids")
    with torch.no_grad():  # with a cache Transformers would not look at position_ids
        a, b = (model(**{k: x[k] for k in keys}, use_cache=False).logits for x in (one, two))
    assert torch.equal(a[0, 9:21], b[0, 9:21]) and not torch.equal(a[0, :9], b[0, :9])


def test_padding_share_counts_what_is_thrown_away():
    lengths = [10, 4, 5, 4]  # (4, 4) and (5, 10) side by side
    assert padding_share(lengths, 2, grouped=True) == 1 - 23 / 28
