"""Likelihood and agreement equal the models' own loss and torch's kl_div, in float64."""

import gc
import json
import math
import weakref

import pytest
import torch
from held_out import MAX_LENGTH, TEXTS, command, inside, sources
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from processes import start
from scripts import run_main
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.data.encoding import IGNORE_INDEX
from kd.evaluation.agreement import agreement_result
from kd.evaluation.answers import sample_answers
from kd.evaluation.likelihood import (
    AGREEMENT,
    make_batches,
    row_sums,
    teacher_states,
    token_metrics,
)
from kd.evaluation.models import load_model
from kd.evaluation.results import likelihood_result
from kd.evaluation.rows import encode_heldout, load_sources
from kd.losses.head import Head, TeacherOutputs


@pytest.fixture(scope="module")
def tokenizer(house):
    return AutoTokenizer.from_pretrained(house / "student")


@pytest.fixture(scope="module")
def rows(house, tokenizer):
    return encode_heldout(load_sources(sources(house), 0), tokenizer, MAX_LENGTH)


def model(house, name, dtype="float64"):
    return load_model(str(house / name), dtype, "sdpa", "cpu")


def summed(found, rows, tokenizer, size=3, teacher=None):
    batches = make_batches(rows, tokenizer.pad_token_id, size)
    states = teacher and teacher_states(teacher, batches, len(tokenizer))
    return row_sums(found, batches, len(tokenizer), states)


def measured(*arguments, **keywords):
    """(R, M): the sums of every row."""
    return summed(*arguments, **keywords).rows


def on_policy_loss(found, row):
    """The model's own summed loss of one row without padding."""
    ids, labels = (torch.tensor(x)[None] for x in (row.windows[0].input_ids, row.windows[0].labels))
    with torch.no_grad():
        return float(found(input_ids=ids, labels=labels).loss.double()) * row.windows[0].targets


def target_logits(found, row, vocab_size):
    """(N, V) logits at the positions that predict targets, from the whole (1, T, V)."""
    labels = torch.tensor(row.windows[0].labels)
    with torch.no_grad():
        logits = found(input_ids=torch.tensor(row.windows[0].input_ids)[None]).logits[0]
    return logits[:-1][labels[1:] != IGNORE_INDEX][:, :vocab_size].double()


def test_row_sums_equal_the_models_own_loss(house, rows, tokenizer):
    expected = [on_policy_loss(model(house, "student"), row) for row in rows]
    found = measured(model(house, "student"), rows, tokenizer)[:, 0]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["adapter", "adapter_tokens"])
def test_an_adapter_is_measured_with_everything_it_trained(house, rows, tokenizer, name):
    base = AutoModelForCausalLM.from_pretrained(house / "student", dtype=torch.float64)
    adapted = PeftModel.from_pretrained(base, house / name).eval()
    expected = torch.tensor([on_policy_loss(adapted, row) for row in rows]).double()
    found = measured(model(house, name), rows, tokenizer)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = measured(model(house, "student"), rows, tokenizer)[:, 0]
    assert ((found - plain).abs() > 0.01).all()


def test_batch_size_and_padding_do_not_change_the_sums(house, rows, tokenizer):
    for names in (("student", None), ("student", "teacher")):
        student, teacher = (name and model(house, name) for name in names)
        single, several, whole = (
            measured(student, rows, tokenizer, size, teacher) for size in (1, 3, 100)
        )
        torch.testing.assert_close(single, several, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(single, whole, rtol=1e-6, atol=1e-6)


def test_rows_keep_their_index_when_others_are_dropped(rows):
    assert [(row.source, row.index) for row in rows] == [
        *(("text", i) for i in range(4)),
        *(("chat", i) for i in (0, 1, 3)),
    ]


def test_bytes_count_the_target_text_only(rows, tokenizer):
    for row, text in zip(rows[:3], TEXTS, strict=False):
        first = tokenizer.decode(row.windows[0].input_ids[:1])
        assert row.bytes == len(text.encode()) - len(first.encode())
    cut = rows[3]  # truncated at max_length, so that no end-of-sequence token is left
    assert len(cut.windows[0]) == MAX_LENGTH
    assert row_text(cut, tokenizer) == TEXTS[3][: len(row_text(cut, tokenizer))]
    assert cut.bytes == len(tokenizer.decode(cut.windows[0].input_ids[1:]).encode())
    assert all(row.bytes is None for row in rows[4:])


def row_text(row, tokenizer):
    return tokenizer.decode(row.windows[0].input_ids)


def test_bits_per_byte_and_perplexity_follow_from_the_rows(house, rows, tokenizer):
    nats = [on_policy_loss(model(house, "student"), row) for row in rows]
    result = likelihood_result(rows, measured(model(house, "student"), rows, tokenizer)[:, 0])
    size = sum(row.bytes for row in rows[:4])
    bits = sum(nats[:4]) / math.log(2) / size
    targets = [row.windows[0].targets for row in rows]
    assert result["sources"]["text"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert result["overall"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert result["kinds"]["chat"]["bits_per_byte"] is None
    for means, part in (
        (result["sources"]["text"], slice(0, 4)),
        (result["kinds"]["chat"], slice(4, None)),
        (result["overall"], slice(None)),
    ):
        wanted = math.exp(sum(nats[part]) / sum(targets[part]))
        assert means["tokens"] == sum(targets[part])
        assert means["perplexity"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_agrees_with_itself(house, rows, tokenizer, dtype):
    teacher, same = (model(house, "teacher", dtype) for _ in range(2))
    sums = summed(same, rows, tokenizer, 2, teacher)
    overall = agreement_result(rows, sums)["overall"]
    assert overall["forward_kl"] == overall["reverse_kl"] == 0.0
    assert overall["top1_agreement"] == overall["top5_overlap"] == 1.0
    assert overall["cross_entropy"] == overall["teacher_cross_entropy"]


def test_agreement_equals_kl_div_of_full_logits(house, rows, tokenizer):
    student, teacher = model(house, "student"), model(house, "teacher")
    found = measured(student, rows, tokenizer, teacher=teacher).tolist()
    for row, sums in zip(rows, found, strict=True):
        q, p = (log_softmax(target_logits(m, row, len(tokenizer)), -1) for m in (student, teacher))
        labels = torch.tensor([label for label in row.windows[0].labels if label != IGNORE_INDEX])
        best = p.argmax(-1)
        wanted = {
            "cross_entropy": -q.gather(-1, labels[:, None]).sum(),
            "teacher_cross_entropy": -p.gather(-1, labels[:, None]).sum(),
            "forward_kl": kl_div(q, p, reduction="sum", log_target=True),
            "reverse_kl": kl_div(p, q, reduction="sum", log_target=True),
            "top1_agreement": (q.argmax(-1) == best).sum(),
            "top5_overlap": (q.topk(5, -1).indices == best[:, None]).any(-1).sum(),
        }
        assert dict(zip(AGREEMENT, sums, strict=True)) == pytest.approx(
            {key: float(value) for key, value in wanted.items()}, rel=1e-6
        )


def test_a_measured_model_is_freed_before_the_next_is_loaded(house, rows, tokenizer):
    gc.disable()
    found = model(house, "student")
    measured(found, rows, tokenizer)
    alive = weakref.ref(found.model.layers[0].mlp.up_proj)
    del found
    try:
        assert alive() is None
    finally:
        gc.enable()


def test_answers_are_greedy_until_the_models_own_end_token(house, tokenizer):
    messages = [{"role": "user", "content": "What is it?"}]
    found = model(house, "student")
    (answer,) = sample_answers(found, tokenizer, [messages], max_new_tokens=12)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    new = []
    while len(new) < 12 and found.generation_config.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(found(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_scripts_write_what_the_library_measures(house, rows, tokenizer, tmp_path):
    names = ["teacher", "student", "adapter"]
    models = [f"{name}={house / name}" for name in names]
    common = ["--data", json.dumps(sources(house)), "--max_length", MAX_LENGTH, "--dtype"]
    common += ["float32", "--out_dir", tmp_path, "--models"]
    ran = command("perplexity.py", *common, *models)
    assert ran.returncode == 0, ran.stderr
    config = tmp_path / "agreement.yaml"
    config.write_text(f"teacher: {house / 'teacher'}\ndata: {json.dumps(sources(house))}\n")
    inside("agreement.py", "--config", config, *common[2:], *models[1:])
    sums = measured(
        model(house, "student", "float32"), rows, tokenizer, 8, model(house, "teacher", "float32")
    )
    likelihood = json.loads((tmp_path / "perplexity" / "student.json").read_text())
    agreement = json.loads((tmp_path / "agreement" / "student.json").read_text())
    for written, key, column in (
        (likelihood, "nats", 0),
        (agreement, "cross_entropy", 0),
        (agreement, "teacher_cross_entropy", 1),
        (agreement, "forward_kl", 2),
    ):
        found = [row[key] for row in written["rows"]]
        assert found == pytest.approx(sums[:, column].tolist(), rel=1e-5)
        assert [row["index"] for row in written["rows"]] == [row.index for row in rows]
    assert likelihood["settings"]["dtype"] == "float32" and likelihood["versions"]["torch"]
    check_what_is_measured_again(house, tmp_path, common, models)


def check_what_is_measured_again(house, out, common, models):
    """A second run measures only the model whose files have changed."""
    times = {name: written(out, name) for name in ("teacher", "student")}
    config = house / "student" / "config.json"
    config.write_text(config.read_text() + "\n")
    inside("perplexity.py", *common, *models[:2])
    assert written(out, "teacher") == times["teacher"]
    assert written(out, "student") > times["student"]


def written(out, name):
    return (out / "perplexity" / f"{name}.json").stat().st_mtime_ns


def test_agreement_writes_the_files_that_perplexity_would_write(house, tmp_path):
    models = [f"student={house / 'student'}", f"adapter={house / 'adapter'}"]
    common = ["--data", json.dumps(sources(house)), "--max_length", MAX_LENGTH, "--models", *models]
    teacher = ["--teacher", house / "teacher", "--out_dir", tmp_path / "both"]
    inside("agreement.py", *common, *teacher)
    alone = [f"teacher={house / 'teacher'}", "--out_dir", tmp_path / "alone"]
    inside("perplexity.py", *common, *alone)
    for name in ("student", "adapter", "teacher"):
        both, alone = (
            json.loads((tmp_path / folder / "perplexity" / f"{name}.json").read_text())
            for folder in ("both", "alone")
        )
        assert both == alone


def test_two_processes_write_what_one_writes(house, tmp_path):
    arguments = [
        *("--teacher", house / "teacher", "--models", f"student={house / 'student'}"),
        *("--data", json.dumps(sources(house)), "--max_length", MAX_LENGTH, "--batch_size", 2),
    ]
    inside("agreement.py", *arguments, "--out_dir", tmp_path / "one")
    # gloo may abort a process that has finished, so the files are checked, not the exit code.
    printed = start("launch/cpu.sh", "eval/agreement.py", *arguments, "--out_dir", tmp_path / "two")
    assert printed.stdout.count("student, overall: KL") == 1, printed.stdout
    for part in ("perplexity/student", "perplexity/teacher", "agreement/student"):
        one, two = (json.loads((tmp_path / n / f"{part}.json").read_text()) for n in ("one", "two"))
        assert one == two


def test_position_means_and_calibration_follow_from_the_tokens(house, rows, tokenizer):
    student, teacher = model(house, "student"), model(house, "teacher")
    found = agreement_result(rows, summed(student, rows, tokenizer, teacher=teacher))
    kl, places, confidence, right = [], [], [], []
    for row in rows:
        q, p = (log_softmax(target_logits(m, row, len(tokenizer)), -1) for m in (student, teacher))
        labels = torch.tensor([label for label in row.windows[0].labels if label != IGNORE_INDEX])
        kl += kl_div(q, p, reduction="none", log_target=True).sum(-1).tolist()
        places += range(1, len(labels) + 1)
        confidence += q.exp().amax(-1).tolist()
        right += (q.argmax(-1) == labels).tolist()
    for label, means in found["places"].items():
        first, _, last = label.partition("-")
        inside = [
            k for k, n in zip(kl, places, strict=True) if int(first) <= n <= int(last or first)
        ]
        assert means["tokens"] == len(inside)
        assert means["forward_kl"] == pytest.approx(sum(inside) / len(inside), rel=1e-6)
    assert sum(means["tokens"] for means in found["places"].values()) == len(kl)
    error = 0.0
    for b in range(10):
        chosen = [i for i, c in enumerate(confidence) if b / 10 <= c < (b + 1) / 10]
        error += abs(sum(right[i] for i in chosen) - sum(confidence[i] for i in chosen)) / len(kl)
    assert found["calibration"]["expected_error"] == pytest.approx(error, rel=1e-6)
    assert sum(b["tokens"] for b in found["teacher_calibration"]["bins"]) == len(kl)


def harness_model(house, tokenizer, max_length):
    return HFLM(model(house, "student"), tokenizer=tokenizer, max_length=max_length, batch_size=3)


def requests(*arguments):
    return [Instance("loglikelihood", {}, a, 0) for a in arguments]


def test_rolling_log_likelihoods_equal_lm_evaluation_harness(house, tokenizer):
    """Long texts are split into windows, and bits per byte follow from their bytes."""
    raw = load_sources(sources(house)[:1], 0)
    rows = encode_heldout(raw, tokenizer, MAX_LENGTH, rolling=True)
    assert [len(row.windows) for row in rows][2:] == [1, 3]
    nats = measured(model(house, "student"), rows, tokenizer)[:, 0]
    harness = harness_model(house, tokenizer, MAX_LENGTH - 1)
    wanted = harness.loglikelihood_rolling(requests(*((text,) for text in TEXTS)))
    assert (-nats).tolist() == pytest.approx(wanted, rel=1e-6)
    result = likelihood_result(rows, nats)["overall"]
    size = sum(len(text.encode()) for text in TEXTS)
    assert result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(-sum(wanted) / size / math.log(2), rel=1e-6)


def test_log_likelihoods_of_answers_equal_lm_evaluation_harness(house, rows, tokenizer):
    chats = [row for row in rows if row.kind == "chat"][:2]
    pairs = []
    for row in chats:
        ids, labels = row.windows[0].input_ids.tolist(), row.windows[0].labels.tolist()
        first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        last = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        pairs.append((("", ""), ids[:first], ids[first : last + 1]))
    nats = measured(model(house, "student"), chats, tokenizer)[:, 0]
    found = harness_model(house, tokenizer, 512)._loglikelihood_tokens(pairs)
    assert (-nats).tolist() == pytest.approx([value for value, _ in found], rel=1e-6)


def test_different_tokenizers_are_refused_before_a_model_is_loaded(house, tmp_path, capsys):
    flags = [
        *("--teacher", house / "teacher", "--models", f"other={house / 'other'}"),
        *("--data", json.dumps(sources(house)), "--out_dir", tmp_path),
    ]
    with pytest.raises(ValueError, match="different tokenizers"):
        run_main("eval/agreement.py", *flags)
    assert "Loading" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_certain_model_has_its_tokens_in_the_last_confidence_bin(house, rows, tokenizer):
    """Its top probability rounds to 1.0."""
    certain = model(house, "student")
    certain.model.norm.weight.data *= 1e4
    found = agreement_result(rows, summed(certain, rows, tokenizer, teacher=certain))
    last = found["calibration"]["bins"][-1]
    assert last["tokens"] > 0.9 * sum(row.targets for row in rows)


def test_the_top_five_ends_at_the_fifth_place_and_counts_ties():
    places = torch.arange(8)
    student = -torch.arange(8.0).expand(8, 8)  # id n has rank n
    teacher = torch.eye(8) * 9.0  # row n chooses id n
    outputs = TeacherOutputs(teacher, Head(torch.eye(8)))
    found = token_metrics(student, places, Head(torch.eye(8)), 8, outputs)
    top1, top5 = (found[:, AGREEMENT.index(f"top{n}")] for n in ("1_agreement", "5_overlap"))
    assert top1.tolist() == [1, 0, 0, 0, 0, 0, 0, 0] and top5.tolist() == [1] * 5 + [0] * 3
    tied = token_metrics(torch.zeros(8, 8), places, Head(torch.eye(8)), 8, outputs)
    assert tied[:, AGREEMENT.index("top5_overlap")].tolist() == [1] * 8


def test_logits_of_a_16_bit_model_are_computed_in_32_bits(house, rows, tokenizer):
    """Only the hidden states are in 16 bits; the head loses no further precision."""
    found = model(house, "student", "bfloat16")
    sums = measured(found, rows, tokenizer, size=1)[:, 0]
    for batch in make_batches(rows, tokenizer.pad_token_id, 1):
        inputs = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            hidden = found.model(**inputs).last_hidden_state[0, :-1].double()
        logits = hidden @ found.lm_head.weight[: len(tokenizer)].detach().double().T
        labels = batch.inputs["labels"][0, 1:]
        wanted = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        assert sums[batch.rows[0]].item() == pytest.approx(wanted.item(), rel=1e-6)
