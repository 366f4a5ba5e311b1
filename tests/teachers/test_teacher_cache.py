"""The files of a teacher cache: packing, document keys, manifests and damage."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.data.packing import Collator, pack_lengths
from kd.losses.head import Head, TeacherOutputs
from kd.models.heads import target_positions
from kd.settings.distillation import Objective
from kd.teachers.cache_error import CacheError, UntrainedStudent
from kd.teachers.cache_files import (
    FORMAT,
    CacheWriter,
    DamagedCache,
    TeacherCache,
    check_manifest,
    document_key,
    pack_ids,
    record_type,
    remove_torn_shards,
    unpack_ids,
    write_manifest,
)
from kd.teachers.cached import CachedCollator, CachedTeacher
from kd.teachers.scoring import score

MANIFEST = {"format": FORMAT, "vocabulary": 300, "top_k": 8, "dtype": "float32", "temperature": 1.0}


@given(
    vocab_size=st.sampled_from([5, 65_536, 65_537, 131_072, 131_073, 151_936, 262_144, 2**20]),
    k=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_unpacking_restores_packed_ids(vocab_size, k, seed):
    ids = np.random.default_rng(seed).integers(0, vocab_size, (7, k))
    ids[0], ids[1] = vocab_size - 1, 0
    manifest = MANIFEST | {"vocabulary": vocab_size, "top_k": k}
    records = np.empty(7, record_type(manifest))
    pack_ids(ids, records, vocab_size)
    assert (unpack_ids(records, vocab_size) == ids).all()


@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("k", [8, 64, 256])
def test_a_record_has_at_most_five_bytes_per_id_with_all_scalars_counted(vocab_size, k):
    manifest = MANIFEST | {"vocabulary": vocab_size, "top_k": k, "dtype": "float16"}
    assert record_type(manifest).itemsize <= 5 * k


def document(seed: int, length: int = 12) -> EncodedRow:
    random = np.random.default_rng(seed)
    ids = random.integers(0, 300, length).tolist()
    labels = [i if random.random() < 0.5 else IGNORE_INDEX for i in ids]
    return EncodedRow.from_labels(ids, [IGNORE_INDEX, *labels[1:-1], ids[-1]])


def test_a_document_key_depends_on_ids_and_on_targets():
    row = document(0)
    other = EncodedRow.from_labels(row.input_ids, [IGNORE_INDEX] * 11 + [int(row.input_ids[-1])])
    assert document_key(row) == document_key(
        EncodedRow.from_labels(list(row.input_ids), list(row.labels))
    )
    assert len({document_key(r) for r in (row, other, document(1))}) == 3


def scored(row: EncodedRow, manifest: dict = MANIFEST) -> np.ndarray:
    """The records of a random teacher that is seeded by the document's ids."""
    generator = torch.Generator().manual_seed(int(row.input_ids.sum()))
    hidden = torch.randn(row.targets, 6, generator=generator)
    weight = torch.randn(310, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([label for label in row.labels if label != IGNORE_INDEX])
    return score(TeacherOutputs(hidden, Head(weight)), labels, manifest)


@pytest.fixture
def folder(tmp_path):
    """A cache of twelve documents in several shards of two processes."""
    write_manifest(tmp_path, MANIFEST)
    for rank in (0, 1):
        writer = CacheWriter(tmp_path, MANIFEST, rank, shard_bytes=2000)
        for seed in range(rank, 12, 2):
            row = document(seed, 5 + seed)
            writer.add(document_key(row), scored(row))
            writer.flush_if_full()
        writer.close()
    return tmp_path


def documents() -> list[EncodedRow]:
    return [document(seed, 5 + seed) for seed in range(12)]


def test_records_hold_the_top_k_of_the_softmax_and_the_tail_mass():
    manifest = MANIFEST | {"temperature": 2.0}
    row = document(3)
    records = scored(row, manifest)
    generator = torch.Generator().manual_seed(int(row.input_ids.sum()))
    hidden = torch.randn(row.targets, 6, generator=generator).double()
    weight = torch.randn(310, 6, generator=torch.Generator().manual_seed(0)).double()
    logits = (hidden @ weight.T)[:, :300]  # the last ten ids are padding of the head
    p, warm = logits.softmax(-1), (logits / 2).softmax(-1)
    top, ids = warm.topk(8)
    assert (unpack_ids(records, 300) == ids.numpy()).all()
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(np.exp(records["log_probabilities"]), top, **close)
    labels = torch.tensor([label for label in row.labels if label != IGNORE_INDEX])
    tail, label, entropy = records["scalars"].T
    np.testing.assert_allclose(np.exp(tail), 1 - top.sum(-1), **close)
    np.testing.assert_allclose(np.exp(label), p.gather(-1, labels[:, None])[:, 0], **close)
    np.testing.assert_allclose(entropy, -(p * p.log()).sum(-1), **close)


def by_position(batch: dict, outputs) -> dict:
    """{(ids of the document up to a target, the target): the teacher outputs there}."""
    positions, labels = target_positions(batch["labels"])
    found = {}
    for n, (row, place) in enumerate(positions.nonzero().tolist()):
        start = place - batch["position_ids"][row, place].item()
        seen = tuple(batch["input_ids"][row, start : place + 1].tolist())
        found[seen, labels[n].item()] = (outputs.ids[n].tolist(), outputs.classes[n].tolist())
    return found


@pytest.mark.parametrize("flat", [False, True])
def test_the_same_text_gets_the_same_outputs_however_it_is_shuffled_and_packed(folder, flat):
    cache = TeacherCache(folder)
    rows = documents()
    teacher = CachedTeacher(cache, torch.device("cpu"))
    blank = EncodedRow.from_labels(
        rows[0].input_ids, [IGNORE_INDEX] * len(rows[0])
    )  # fills up a held-out batch
    expected: dict = {}
    for row in rows:
        batch = CachedCollator(Collator(0), cache)([[row]])
        with teacher.batch_outputs(batch) as (outputs, _):
            expected |= by_position(batch, outputs)
    assert len(expected) == sum(row.targets for row in rows)
    packed = [[rows[i] for i in bin_] for bin_ in pack_lengths([len(r) for r in rows], 40)]
    assert max(map(len, packed)) > 1
    shuffled = [packed[i] for i in np.random.default_rng(0).permutation(len(packed))]
    found: dict = {}
    for micro in (shuffled[:2], [*shuffled[2:], [blank]]):
        batch = CachedCollator(Collator(0, flat=flat), cache)(micro)
        with teacher.batch_outputs(batch) as (outputs, _):
            found |= by_position(batch, outputs)
    assert found == expected


def test_a_batch_without_targets_has_no_teacher_outputs(folder):
    cache = TeacherCache(folder)
    blank = EncodedRow.from_labels([1, 2, 3], [IGNORE_INDEX] * 3)
    batch = CachedCollator(Collator(0), cache)([[blank]])
    with CachedTeacher(cache, torch.device("cpu")).batch_outputs(batch) as (outputs, _):
        assert outputs.ids.shape == (0, 8) and outputs.classes.shape == (0, 9)


def test_the_error_names_the_first_missing_document(folder):
    cache, rows = TeacherCache(folder), documents()
    cache.check(rows, "training documents", str)
    strangers = [document(77), document(78)]
    with pytest.raises(ValueError, match="lacks 2 of 14 training documents.*number 3") as error:
        cache.check([*rows[:2], *strangers, *rows[2:]], "training documents", str)
    assert str(strangers[0].input_ids[:5].tolist())[:-1] in str(error.value)


@pytest.mark.parametrize("torn", ["records without index", "half a temporary file"])
def test_unfinished_files_are_removed_and_their_documents_are_missing(folder, torn):
    before = len(TeacherCache(folder).places)
    lost = 0
    if torn == "records without index":
        index = sorted(folder.glob("*.index.npy"))[0]
        lost = len(np.load(index))
        index.unlink()
    else:
        (folder / "000-000099.records.tmp").write_bytes(b"half")
    assert remove_torn_shards(folder) == 1 and remove_torn_shards(folder) == 0
    assert len(TeacherCache(folder).places) == before - lost


def test_the_error_names_a_damaged_shard(folder):
    records = sorted(folder.glob("*.records.npy"))[0]
    records.write_bytes(records.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{records.name}.*Remove it"):
        TeacherCache(folder)


def read_one_by_one(folder) -> list:
    """The records of every document, or the error that refused them."""
    try:
        cache = TeacherCache(folder)
    except ValueError as error:
        return [error] * len(documents())
    found = []
    for row in documents():
        try:
            found.append(cache.records([row]).tobytes())
        except (ValueError, KeyError) as error:  # KeyError: a document that `check` reports
            found.append(error)
    return found


def test_no_record_of_a_corrupted_file_is_ever_loaded(folder):
    """One byte at a time, in every file; a change that nothing reads may go unnoticed."""
    written, random = read_one_by_one(folder), np.random.default_rng(0)
    changed, refused = 0, {}
    for file in sorted(folder.iterdir()):
        intact = file.read_bytes()
        for place in random.choice(len(intact), min(len(intact), 60), replace=False):
            damage = bytearray(intact)
            damage[place] ^= random.integers(1, 256)
            file.write_bytes(damage)
            for found, expected in zip(read_one_by_one(folder), written, strict=True):
                if isinstance(found, bytes):
                    changed += found != expected
                elif isinstance(found, ValueError):
                    refused[file.name] = refused.get(file.name, 0) + 1
                    assert "\n" not in str(found) and str(folder) in str(found)
            file.write_bytes(intact)
    assert changed == 0
    assert {file.name for file in folder.iterdir()} == set(refused)


def test_a_worker_reports_a_damaged_record_in_one_line(folder):
    file = sorted(folder.glob("*.records.npy"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    collator = CachedCollator(Collator(0), TeacherCache(folder))
    loader = DataLoader([[row] for row in documents()], collate_fn=collator, num_workers=1)
    with pytest.raises(DamagedCache) as error:
        list(loader)
    assert str(error.value).startswith(f"teacher_cache: {file} is damaged")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"format": 1, "top_k": 8}', "format 1, this version reads 2"),
        ("{", "has changed since it was written"),
        ("[]", "has changed since it was written"),
        ('{"format": 2, "top_k": 8}', "has changed since it was written"),
    ],
)
def test_an_old_or_damaged_manifest_is_refused_in_one_line(folder, manifest, message):
    (folder / "cache.json").write_text(manifest)
    for read in (TeacherCache, lambda path: write_manifest(path, MANIFEST)):
        with pytest.raises(ValueError, match=message) as error:
            read(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_different_manifest_is_refused_and_the_difference_named(folder, tmp_path):
    write_manifest(folder, MANIFEST)
    for key, value in {"top_k": 9, "temperature": 2.0, "teacher": "other"}.items():
        with pytest.raises(ValueError, match=f"a different {key}"):
            write_manifest(folder, MANIFEST | {key: value})
    with pytest.raises(ValueError, match="a different vocabulary: 300, but this run has 301"):
        check_manifest("cache", MANIFEST, {"vocabulary": 301})
    with pytest.raises(ValueError, match="run train/cache_teacher.py"):
        TeacherCache(tmp_path / "nowhere")


def test_the_error_of_a_cache_is_printed_for_a_student_that_equals_its_teacher():
    class Equal(UntrainedStudent):
        def __init__(self):
            pass

        def states(self, row):
            return torch.zeros(12, 4), torch.zeros(12)

        def loss_and_gradient(self, *arguments):
            return 0.0, torch.zeros(12, 4)

    error = Equal().error(Objective(1.0), [(document(0), None, None)])
    assert "12 tokens" in str(error) and "0.000000 live; gradients differ by 0.000%" in str(error)
    half = CacheError("forward_kl", 12, cached=0.3, live=0.2, gradient=0.5)
    assert "0.200000 live (+50.000%); gradients differ by 50.000%" in str(half)
