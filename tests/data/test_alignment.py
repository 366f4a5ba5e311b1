"""Alignment of two tokenizations: every byte of a target is in one segment, equal on both sides.

KD_REAL_TOKENIZERS names a folder of real tokenizers, as in test_families.py. Without it the tests
with real vocabularies (smollm2, qwen2_5, llama3_2, llama2, gemma3, gpt2) are skipped.
"""

import itertools
import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small import CHATML, TEXT, small_rows, small_tokenizer
from small_tokenizers import TOKENIZERS, permuted
from tokenizers import normalizers
from transformers import AutoTokenizer

from kd.data import alignment
from kd.data.alignment import NO_SEGMENT, AlignedCollator, AlignedEncoder, AlignedRow
from kd.data.encoding import IGNORE_INDEX, Encoder
from kd.data.packing import Collator, FilledUp
from kd.data.row_cache import RowSettings, tokenised_rows
from kd.data.tokenised_rows import AlignedRows
from kd.data.vocabularies import shared_vocabulary

TEMPLATES = list(itertools.permutations(["headers", "brackets", "thinking"], 2))
TEMPLATES += [("headers", "no special token"), ("no special token", "brackets")]
PAIRS = list(itertools.permutations(TOKENIZERS, 2))
WORDS = " ".join(TEXT).split(" ")
FAMILY = "\U0001f642\U0001f468\u200d\U0001f469"
# SentencePiece reads the character U+2581 as a blank, so its bytes do not survive.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXTS = st.lists(
    st.sampled_from(WORDS)
    | st.text(CHARACTERS, max_size=6)
    | st.sampled_from(["\n", "  ", "\t", "caf\u00e9", "\u4e2d\u6587", FAMILY, "e\u0301", "<0x41>"]),
    min_size=1,
    max_size=12,
).map(" ".join)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def encoder_of(student, teacher, max_length: int = 10**6, **options) -> AlignedEncoder:
    encoders = [Encoder(tokenizer, max_length, **options) for tokenizer in (student, teacher)]
    return AlignedEncoder(*encoders, shared_vocabulary(student, teacher))


def chat(answer: str) -> dict:
    question = {"role": "user", "content": "What is it?"}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def segment_bytes(encoder: AlignedEncoder, row, side: int) -> list[bytes]:
    """The bytes of every segment on one side, without special tokens."""
    ids, segments = ((row.input_ids, row.segments), (row.teacher_ids, row.teacher_segments))[side]
    found = [b""] * (int(segments.max(initial=-1)) + 1)
    for i, segment in zip(ids.tolist(), segments.tolist(), strict=True):
        if segment != NO_SEGMENT and i not in encoder.special[side]:
            found[segment] += encoder.pieces[side][i]
    return found


def boundaries(encoder: AlignedEncoder, row, side: int) -> set[int]:
    """Byte position after each token of the answer, in plain Python."""
    tokenizer = (encoder.student, encoder.teacher)[side].tokenizer
    whole = (encoder.student, encoder.teacher)[side].encode_uncut([("", row)])[0]
    (first, end), ids = whole.spans[0], whole.ids.tolist()
    at, found = 0, set()
    for i in ids[first : end - 1]:
        token = tokenizer.convert_ids_to_tokens(i)
        if "\u2581" in str(tokenizer.backend_tokenizer.decoder):
            size = (
                1
                if token.startswith("<0x") and len(token) == 6
                else len(token.replace("\u2581", " ").encode())
            )
        else:
            size = len(token)  # one character per byte
        at += size
        found.add(at)
    return found


@pytest.mark.parametrize("names", PAIRS, ids=" to ".join)
def test_segments_hold_every_byte_once_and_end_where_tokens_of_both_sides_end(names):
    encoder = encoder_of(*(TOKENIZERS[name] for name in names))

    @MANY
    @given(TEXTS)
    def compare(text):
        assume("unigram" not in names or "<0x" not in text)  # the library reads this as a byte
        row, whole = chat(text), text.encode()
        with patch.object(alignment, "MAX_SEGMENT_TOKENS", 10**6):
            (found,) = encoder([("", row)])
        targets = found.segments[found.target_mask]
        assert (targets >= 0).all() and (found.segments[~found.target_mask] < 0).all()
        assert (np.diff(targets) >= 0).all() and set(np.diff(targets)) <= {0, 1}
        ours, theirs = (segment_bytes(encoder, found, side) for side in (0, 1))
        assert ours == theirs and b"".join(ours) == whole
        assert ours[-1] == b"" and (ours[:-1] == [] or b"" not in ours[:-1])  # the end of the turn
        common = set.intersection(*(boundaries(encoder, row, side) for side in (0, 1)))
        assert set(np.cumsum([len(piece) for piece in ours[:-1]]).tolist()) == common
        ids, labels = found.teacher_ids, found.teacher.labels.tolist()
        assert [i for i in labels if i != IGNORE_INDEX] == ids[found.teacher_segments >= 0].tolist()

    compare()


@pytest.mark.parametrize("names", PAIRS, ids=" to ".join)
def test_plain_text_is_aligned_from_its_second_token_to_its_end(names):
    """A blank that a tokenizer prepends belongs to the first segment."""
    encoder = encoder_of(*(TOKENIZERS[name] for name in names))

    @MANY
    @given(TEXTS)
    def compare(text):
        assume("unigram" not in names or "<0x" not in text)
        with patch.object(alignment, "MAX_SEGMENT_TOKENS", 10**6):
            (found,) = encoder([("", {"text": text})])
        if not hasattr(found, "segments"):
            return
        behind = np.flatnonzero(found.segments >= 0)
        ours, theirs = (segment_bytes(encoder, found, side) for side in (0, 1))
        different_blank = len(ours) > 0 and ours[0].lstrip(b" ") == theirs[0].lstrip(b" ")
        assert ours == theirs or different_blank and ours[1:] == theirs[1:]
        assert text.encode().endswith(b"".join(ours[1:]))
        assert len(behind) == 0 or behind[-1] == len(found.input_ids) - 1
        assert (np.diff(behind) == 1).all()

    compare()


@pytest.mark.parametrize("names", TEMPLATES, ids=" to ".join)
def test_answers_that_the_templates_render_differently_are_aligned_where_they_are_equal(names):
    """Trimmed blanks, a leading blank or empty thought, no end-of-turn token."""
    tokenizers = [
        small_tokenizer(*size) for size in ((320,), (460, TEXT * 2 + ["the list in order"] * 9))
    ]
    for tokenizer, name in zip(tokenizers, names, strict=True):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<s>", "</s>", "<|start|>", "<|stop|>", "<|eot|>"]}
        )
        tokenizer.chat_template = FAMILIES[name].template
    encoder = encoder_of(*tokenizers)
    (found,) = encoder([("", chat(f" {TEXT[0]} {TEXT[1]}\n"))])
    ours, theirs = (segment_bytes(encoder, found, side) for side in (0, 1))
    assert [x.strip() for x in ours] == [x.strip() for x in theirs]
    middle = f"{TEXT[0][12:]} {TEXT[1][:-12]}".encode()
    assert middle in b"".join(ours) and middle in b"".join(theirs)
    assert found.one_to_one > 0


def test_text_that_one_tokenizer_normalizes_is_in_no_segment():
    student, teacher = small_tokenizer(), small_tokenizer(460, TEXT * 2)
    teacher.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen does
    encoder = encoder_of(student, teacher)
    (found,) = encoder([("", chat("A list of e\u0301t\u00e9 in order."))])
    ours, theirs = (segment_bytes(encoder, found, side) for side in (0, 1))
    assert ours == theirs
    text = b"".join(ours)
    assert text.startswith(b"A list of") and text.endswith(b"in order.")
    assert (
        b"\xcc\x81" not in text
        and len(found.input_ids[found.target_mask & (found.segments < 0)]) > 0
    )


@pytest.mark.parametrize("on_long_row", ["cut", "cut_left"])
def test_a_cut_row_keeps_the_segments_that_are_whole_on_both_sides(on_long_row):
    tokenizers = TOKENIZERS["byte-level"], TOKENIZERS["larger byte-level"]
    row = chat(" ".join(TEXT))
    (whole,) = encoder_of(*tokenizers)([("", row)])
    everything = segment_bytes(encoder_of(*tokenizers), whole, 0)
    seen = set()
    for length in range(20, len(whole.input_ids) + 3, 3):
        encoder = encoder_of(*tokenizers, length, on_long_row=on_long_row)
        (found,) = encoder([("", row)])
        assert len(found.input_ids) <= length and len(found.teacher_ids) <= length
        ours, theirs = (segment_bytes(encoder, found, side) for side in (0, 1))
        assert ours == theirs and len(ours) <= len(everything)
        part = everything[: len(ours)] if on_long_row == "cut" else everything[-len(ours) :]
        assert ours == part or not ours
        assert found.segments[0] == found.teacher_segments[0] == NO_SEGMENT
        seen.add(len(ours))
    assert max(seen) == len(everything) and len(seen) > 5


def test_segments_of_too_many_tokens_are_left_out():
    encoder = encoder_of(TOKENIZERS["byte-level"], TOKENIZERS["larger byte-level"])
    with patch.object(alignment, "MAX_SEGMENT_TOKENS", 1):
        (found,) = encoder([("", chat(TEXT[0]))])
    assert (np.bincount(found.segments[found.segments >= 0]) == 1).all()
    assert (found.segments[found.target_mask] < 0).any() and found.segments.max() > 3


def test_equal_tokenizers_give_segments_of_one_token_whatever_the_ids():
    tokenizer = TOKENIZERS["byte-level"]
    for other in (tokenizer, permuted(tokenizer)):
        vocabulary = shared_vocabulary(tokenizer, other)
        assert len(vocabulary.student.main) == len(tokenizer)
        names = [x.convert_ids_to_tokens(range(len(x))) for x in (tokenizer, other)]
        twins = [names[1][i] for i in vocabulary.twin]
        assert twins == names[0]
        (found,) = encoder_of(tokenizer, other)([("", chat(TEXT[2]))])
        assert found.one_to_one == found.target_mask.sum() == found.segments.max() + 1


@pytest.mark.parametrize("names", PAIRS, ids=" to ".join)
def test_tokens_without_a_partner_are_in_the_class_of_their_first_token(names):
    student, teacher = (TOKENIZERS[name] for name in names)
    vocabulary = shared_vocabulary(student, teacher)
    assert (vocabulary.student.main >= 0).all() and len(set(vocabulary.twin)) > 200
    for side, tokenizer in ((vocabulary.student, student), (vocabulary.teacher, teacher)):
        assert sorted(side.class_of[side.main]) == list(range(len(side.main)))
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        for i, piece in enumerate(side.pieces):
            main = side.main[side.class_of[i]]
            if main == i:
                continue
            if i in special:
                assert side.class_of[i] == 0
            else:
                assert piece.startswith(side.pieces[main])
    ends = [side.main[0] for side in (vocabulary.student, vocabulary.teacher)]
    turn = [tokenizer.convert_tokens_to_ids("<|im_end|>") for tokenizer in (student, teacher)]
    assert ends == turn


def test_cached_rows_equal_those_of_the_encoder_and_depend_on_the_teachers_tokenizer(tmp_path):
    student, teacher = TOKENIZERS["byte-level"], TOKENIZERS["Gemma's"]
    rows = small_rows(7)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [{"path": str(tmp_path / "rows.jsonl")}]
    cached = tokenised_rows(sources, RowSettings(90), student, str(tmp_path), 1, False, teacher)
    assert isinstance(cached, AlignedRows)
    found = encoder_of(student, teacher, 90)([("", row) for row in rows])
    by_text = {tuple(row.input_ids): row for row in found}
    assert len(cached) == 7
    for (document,) in cached:
        assert document == by_text[tuple(document.input_ids.tolist())] and isinstance(
            document, AlignedRow
        )
    report = cached.report
    assert report.aligned == sum(int((row.segments >= 0).sum()) for row in found) > 0
    assert report.one_to_one == sum(row.one_to_one for row in found) > 0
    assert cached.longest == max(len(x) for row in found for x in (row.input_ids, row.teacher_ids))
    packed = cached.packed(300)
    assert isinstance(packed, AlignedRows) and sum(map(len, packed)) == 7 > len(packed)
    folders = {
        tokenised_rows(sources, RowSettings(90), student, str(tmp_path), 1, False, other).folder
        for other in (None, teacher, TOKENIZERS["larger byte-level"])
    }
    assert len(folders) == 3


def test_a_batch_numbers_the_segments_of_its_targets_in_order():
    student, teacher = TOKENIZERS["byte-level"], TOKENIZERS["larger byte-level"]
    rows = [row for row in encoder_of(student, teacher)([("", r) for r in small_rows(5)])]
    blank = FilledUp([[rows[0]]], 2)[1]
    for flat in (False, True):
        collate = AlignedCollator(Collator(0, flat=flat), 0)
        batch = collate([[rows[0], rows[1]], blank, [rows[2]]])
        targets = [
            (batch[name][:, 1:] != IGNORE_INDEX).sum() for name in ("labels", "teacher_labels")
        ]
        assert targets == [len(batch["segments"]), len(batch["teacher_segments"])]
        used = batch["segments"][batch["segments"] >= 0]
        assert (np.diff(used) >= 0).all() and set(used) == set(range(used.max() + 1))
        assert set(batch["teacher_segments"]) == set(used)
        # The segments are the same text on both sides.
        vocabulary = shared_vocabulary(student, teacher)
        text = [b"", b""]
        for side, (name, kind) in enumerate((("labels", "student"), ("teacher_labels", "teacher"))):
            numbers = batch["segments" if side == 0 else "teacher_segments"]
            ids = batch[name][batch[name] != IGNORE_INDEX][torch.from_numpy(numbers >= 0)]
            ends = {0, 1, 2}  # special
            pieces = getattr(vocabulary, kind).pieces
            text[side] = b"".join(pieces[i] for i in ids.tolist() if i not in ends)
        assert text[0] == text[1]


REAL = [
    ("smollm2", "qwen2_5"),
    ("smollm2", "llama3_2"),
    ("qwen2_5", "llama3_2"),
    ("llama2", "qwen2_5"),
    ("gemma3", "qwen2_5"),
    ("gpt2", "gemma3"),
]


@pytest.mark.slow
@pytest.mark.parametrize("names", REAL, ids=" to ".join)
def test_real_vocabularies_align_every_byte_of_random_texts(names):
    root, tokenizers = os.environ.get("KD_REAL_TOKENIZERS"), []
    for name in names:
        found = sorted(Path(root).glob(f"{name}/**/tokenizer.json")) if root else []
        if not found:
            pytest.skip(f"no {name} in KD_REAL_TOKENIZERS")
        tokenizer = AutoTokenizer.from_pretrained(found[0].parent, local_files_only=True)
        if tokenizer.chat_template is None:
            ends = ["<|im_start|>", "<|im_end|>"]
            tokenizer.add_special_tokens({"additional_special_tokens": ends})
            tokenizer.chat_template = CHATML
        tokenizers.append(tokenizer)
    encoder = encoder_of(*tokenizers)
    (prose,) = encoder([("", chat(" ".join(TEXT)))])
    assert (prose.segments[prose.target_mask] >= 0).mean() > 0.95 and prose.one_to_one > 40

    @MANY
    @given(TEXTS)
    def compare(text):
        row = chat(text.strip() or "a")
        with patch.object(alignment, "MAX_SEGMENT_TOKENS", 10**6):
            (found,) = encoder([("", row)])
        ours, theirs = (segment_bytes(encoder, found, side) for side in (0, 1))
        assert [x.strip() for x in ours] == [x.strip() for x in theirs]

    compare()
