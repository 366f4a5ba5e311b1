"""FlashAttention gets the documents of a flat batch from the collator, not from the device.

The package is not installed here; `flash` stands in for its kernel, below Transformers' code.
"""

import itertools

import pytest
import torch
import transformers.modeling_flash_attention_utils as theirs
from small import save_small, small_model, small_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kd.data.alignment import AlignedCollator
from kd.data.encoding import EncodedRow, encode_rows
from kd.data.packing import BOUNDS, Collator, bounds_of, pack
from kd.models.heads import LossInputs, return_loss
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.live import LiveTeacher

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2")
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1,
}  # fmt: skip
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default"}  # what needs values here


class Ops(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note an operation and run it."""
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def flash(monkeypatch) -> list[dict]:
    """FlashAttention's function for documents in a row, in PyTorch; the list of its calls."""
    calls = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        with _disable_current_modes():
            assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
            assert type(max_seqlen_q) is type(max_seqlen_k) is int
            bounds = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32 and bounds[-1] == len(q)
        calls.append({"bounds": bounds, "longest": max_seqlen_q})
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return torch.cat(
            [
                attend(q[a:b], k[a:b], v[a:b], softmax_scale, softcap)
                for a, b in itertools.pairwise(bounds)
            ]
        )

    monkeypatch.setattr(theirs, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(theirs, "_flash_varlen_fn", varlen)
    monkeypatch.setattr(theirs, "_flash_fn", None)
    monkeypatch.setattr(
        theirs, "_process_flash_kwargs_fn", theirs._lazy_define_process_function(varlen)
    )
    return calls


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    """Causal attention of one document, (tokens, heads, width) each."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    unseen = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def with_flash(model):
    """The model as if it had been loaded with flash_attention_2, which needs the package."""
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def flat_batch(tokenizer, first: int = 0) -> tuple[dict, list[EncodedRow]]:
    rows = encode_rows(small_rows(8), tokenizer, 200)[0][first:]
    bins = pack(rows, 200)
    return Collator(0, flat=True)(bins), [row for bin_ in bins for row in bin_]


def expected_call(batch: dict, documents: list[EncodedRow]) -> dict:
    """The oracle: from the documents' lengths alone; the last has the padding."""
    lengths = [len(document) for document in documents]
    lengths[-1] += batch["input_ids"].numel() - sum(lengths)
    return {"bounds": [0, *itertools.accumulate(lengths)], "longest": max(lengths)}


def test_the_bounds_of_a_flat_batch_are_those_that_transformers_finds_in_its_positions(tokenizer):
    batch, documents = flat_batch(tokenizer)
    assert len(documents) == 8 and batch["input_ids"].numel() > batch["tokens"].sum()
    (query, key), (longest, longest_key) = theirs.prepare_fa_kwargs_from_position_ids(
        batch["position_ids"]
    )
    found = bounds_of(batch)
    assert torch.equal(found["cu_seq_lens_q"], query) and torch.equal(found["cu_seq_lens_k"], key)
    assert found["max_length_q"] == longest and found["max_length_k"] == longest_key
    assert query.tolist() == expected_call(batch, documents)["bounds"]
    assert not bounds_of(Collator(0)([documents]))


def student(name: str, layers: int, sdpa: bool = False):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**SIZES, num_hidden_layers=layers)
    attention = "eager" if name == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return_loss(model if sdpa else with_flash(model))
    return model


def loss_of(model, batch: dict, tokenizer) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")} | bounds_of(batch)
    loss_inputs = LossInputs(batch["labels"], Objective(soft_weight=0.0), len(tokenizer))
    return model(**inputs, loss_inputs=loss_inputs)["loss"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_gets_the_bounds_and_none_waits_for_the_device(flash, tokenizer, name):
    batch, documents = flat_batch(tokenizer)
    waits = []
    for layers in (2, 5):
        flash.clear()
        model = student(name, layers)
        with Ops() as ops:
            loss = loss_of(model, batch, tokenizer)
        assert flash == layers * [expected_call(batch, documents)]
        waits.append(sum(operation in WAITS for operation in ops.names))
    assert waits[0] == waits[1]
    wanted = loss_of(student(name, 5, sdpa=True), batch, tokenizer)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_flat_batch_has_the_gradients_of_its_documents_alone(flash, tokenizer, checkpointing):
    batch, documents = flat_batch(tokenizer)
    gradients = []
    for batches in ([batch], [Collator(0)([[document]]) for document in documents]):
        model = small_model(tokenizer).double().train()
        if len(batches) == 1:
            with_flash(model)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return_loss(model)
        for each in batches:
            loss_of(model, each, tokenizer).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(flash) == 2 * (1 + checkpointing)
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_a_teacher_that_runs_once_over_micro_batches_gets_the_bounds_of_each(
    flash, tokenizer, tmp_path
):
    save_small(tmp_path, tokenizer)
    settings = TeacherSettings(teacher=str(tmp_path), teacher_dtype="float32")
    teacher = LiveTeacher(settings, ModelSettings(), torch.device("cpu"))
    pairs = [flat_batch(tokenizer), flat_batch(tokenizer, first=3)]
    batches = [batch for batch, _ in pairs]
    wanted = [teacher.states([batch], [1])[0] for batch in batches]  # by a mask
    with_flash(teacher.module)
    calls = [expected_call(*pair) for pair in pairs]
    alone = [teacher.states([batch], [1])[0] for batch in batches]
    assert flash == [calls[0], calls[0], calls[1], calls[1]]
    flash.clear()
    together = teacher.states(batches, [1])
    assert flash == [*calls, *calls]
    for (a, layers_a), (b, layers_b), (c, layers_c) in zip(together, alone, wanted, strict=True):
        assert torch.equal(a, b) and torch.equal(layers_a[0], layers_b[0])
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layers_a[0], layers_c[0], rtol=1e-5, atol=1e-5)


def test_both_tokenizations_of_an_aligned_batch_have_their_bounds(tokenizer):
    blank = EncodedRow.from_labels([5, 6, 7], [-100] * 3)  # one padding token for the teacher
    batch = AlignedCollator(Collator(0, flat=True), 0)([[blank, blank], [blank]])
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 6, 16]
    assert batch["teacher_cu_seq_lens_q"].tolist() == [0, 1, 2, 8]
    assert {f"teacher_{name}" for name in BOUNDS} < batch.keys()
