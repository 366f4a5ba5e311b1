"""On-policy rows: which rows are chosen, what is generated, and how they count in the loss."""

import dataclasses
import json
import math

import pytest
import torch
from jobs.gradients import OBJECTIVE, Cell, hidden_objective, load_student
from jobs.on_policy import FRACTION, LENGTHS
from processes import ROOT, start
from small import save_small, small_rows
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from kd.data.encoding import IGNORE_INDEX, EncodedRow, encode_rows
from kd.data.packing import ON_POLICY, Collator
from kd.data.tokenizer import load_tokenizer
from kd.models.generation_mode import SCORE_BYTES, row_bytes
from kd.models.heads import causal_lm
from kd.planning.communication import sent_bytes
from kd.planning.device_rates import Rates
from kd.planning.layout import Layout
from kd.planning.memory import plan_training
from kd.planning.throughput import duration
from kd.settings.distillation import ModelSettings, Objective, OnPolicySettings
from kd.settings.teacher import TeacherSettings
from kd.settings.training_arguments import training_arguments
from kd.teachers.live import LiveTeacher
from kd.training.on_policy import OnPolicyRows, answer_starts, choose_rows, split_documents
from kd.training.rollouts import RolloutGenerator
from kd.training.step_metrics import reproducible
from kd.training.trainer import DistillationTrainer

ZERO2, ZERO3 = "ds_configs/student_zero2.json", "ds_configs/student_zero3.json"
ALONE = [Cell("on-policy 1x8x1")]
TWO = [
    Cell("on-policy 2x4x1 ddp", micro=4),
    Cell("on-policy ddp", micro=2, accumulation=2, steps=2),
    Cell("on-policy zero3", ZERO3, 2, 2, steps=2),
    Cell("on-policy ddp lora checkpointing", "ddp", 2, 2, mode="lora", checkpointing=True),
    Cell("on-policy zero2 qlora", ZERO2, 2, 2, mode="qlora", student="untied", steps=2),
    Cell("on-policy zero3 lora", ZERO3, 2, 2, mode="lora", teacher="sharded", steps=2),
    Cell("on-policy zero3 qlora", ZERO3, 2, 2, mode="qlora", steps=2),
    Cell("on-policy zero3 untied", ZERO3, 4, student="untied", checkpointing=True, steps=2),
    Cell("on-policy self", "ddp", 4, mode="lora", teacher="self", steps=2),
    Cell("on-policy hidden", ZERO2, 4, hidden="cosine", steps=2),
    Cell("on-policy zero3 continuous", ZERO3, 2, 2, steps=2),
]


@pytest.fixture(scope="module")
def work(models):
    """The folder with the result of every cell, from one start with one rank and one with two."""
    save_small(models / "untied", tie_word_embeddings=False)
    for ranks, cells in ((1, ALONE), (2, TWO)):
        (models / "on_policy.json").write_text(json.dumps([dataclasses.asdict(c) for c in cells]))
        job = start("torchrun", "--nproc-per-node", ranks, "tests/jobs/on_policy.py", models)
        assert all((models / f"{c.name}.pt").exists() for c in cells), job.stdout[-6000:]
    return models


def rows_of(step: list[dict]) -> list[tuple[EncodedRow, bool]]:
    """The rows of a step's micro-batches in order, each with whether it is on-policy."""
    found = []
    for batch in step:
        on_policy = (
            batch[ON_POLICY].any(-1).tolist()
            if ON_POLICY in batch
            else [False] * len(batch["labels"])
        )
        found += zip(split_documents(batch), on_policy, strict=True)
    return found


def completions_of(step: list[dict]) -> list[list[int]]:
    return [
        [x for x in row.labels if x != IGNORE_INDEX]
        for row, on_policy in rows_of(step)
        if on_policy
    ]


def true_loss(student, teacher, real: int, step: list[dict], hidden=None) -> torch.Tensor:
    """From full logits, row by row: the mean over target tokens of each token's loss."""
    weight, temperature = OBJECTIVE["soft_weight"], OBJECTIVE["temperature"]
    maps = getattr(causal_lm(student), "hidden_projections", None)
    total, tokens = 0.0, 0
    for row, on_policy in rows_of(step):
        ids, labels = torch.tensor(row.input_ids)[None], torch.tensor(row.labels[1:])
        mask = labels != IGNORE_INDEX
        outputs = student(input_ids=ids, output_hidden_states=True)
        with torch.no_grad():
            if teacher:
                expected = teacher(input_ids=ids, output_hidden_states=True)
            else:
                with student.disable_adapter():
                    expected = student(input_ids=ids)
        ours, theirs = (x.logits[0, :-1, :real][mask] for x in (outputs, expected))
        p, q = log_softmax(theirs / temperature, -1), log_softmax(ours / temperature, -1)
        soft = temperature**2 * kl_div(q, p, reduction="sum", log_target=True)
        hard = cross_entropy(ours, labels[mask], reduction="sum")
        total = total + (soft if on_policy else weight * soft + (1 - weight) * hard)
        for i, (n, m) in enumerate(hidden.layers if hidden else ()):
            a = maps[i](outputs.hidden_states[n][0, :-1][mask])
            b = expected.hidden_states[m][0, :-1][mask]
            cosine = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            total = total + hidden.weight * cosine.sum() / len(hidden.layers)
        tokens += int(mask.sum())
    return total / tokens


@pytest.mark.parametrize("cell", ALONE + TWO, ids=lambda cell: cell.name)
def test_the_first_step_equals_full_logits_on_the_same_answers(work, cell):
    """Loss and gradient of every trained tensor, normalised by the tokens after generation."""
    found = torch.load(work / f"{cell.name}.pt")
    tokenizer = load_tokenizer(str(work / "student"))
    exact = torch.float32 if cell.mode == "qlora" else torch.float64
    student = load_student(work, cell, tokenizer).eval()
    student = student if cell.mode == "qlora" else student.double()
    teacher = None
    if cell.teacher != "self":
        teacher = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=exact)
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    step = found["filled"][0]
    loss = true_loss(student, teacher, len(tokenizer), step, hidden_objective(cell))
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    tolerance = 2e-6 if cell in ALONE else 1e-5  # float32 rounding, as in test_gradients.py
    assert math.isclose(found["logged"][0]["loss"], loss.item(), rel_tol=2e-6)
    assert found["gradients"][0].keys() == expected.keys()
    for name, gradient in expected.items():
        apart = (found["gradients"][0][name].double() - gradient.double()).norm()
        assert apart / gradient.double().norm() < tolerance, name


def test_the_same_half_of_the_rows_is_on_policy_for_any_number_of_ranks(work):
    steps = [torch.load(work / f"{cell.name}.pt")["filled"][0] for cell in ALONE + TWO]
    chosen = []
    for step in steps:
        rows = rows_of(step)
        chosen.append([i for i, (_, on_policy) in enumerate(rows) if on_policy])
        assert len(rows) == 8 and len(chosen[-1]) == FRACTION * 8
    assert all(places == chosen[0] for places in chosen)
    prompts = [
        [
            [x for x, y in zip(r.input_ids, r.labels, strict=True) if y == IGNORE_INDEX]
            for r, on_policy in s
            if on_policy
        ]
        for s in map(rows_of, steps)
    ]
    assert all(found == prompts[0] for found in prompts)


def test_ranks_with_very_different_lengths_generate_what_they_would_alone(work):
    """DDP and ZeRO-3 with the current weights, before and after the first update."""
    ddp, zero3 = (torch.load(work / f"on-policy {name}.pt")["filled"] for name in ("ddp", "zero3"))
    for n in range(2):
        answers = completions_of(ddp[n])
        assert answers == completions_of(zero3[n])
        longest = max(map(len, answers))
        assert LENGTHS[1] < longest <= LENGTHS[0] and min(map(len, answers)) <= LENGTHS[1]


def test_metrics_of_on_policy_rows_are_separate(work):
    """Cross-entropy and the label's probability under the teacher cover the data rows only."""
    tokenizer = load_tokenizer(str(work / "student"))
    found = torch.load(work / "on-policy ddp.pt")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(work / name).double()
        for name in ("student", "teacher")
    )
    hard, entropy, tokens, answers = 0.0, 0.0, [0, 0], completions_of(found["filled"][0])
    for row, on_policy in rows_of(found["filled"][0]):
        labels = torch.tensor(row.labels[1:])
        mask = labels != IGNORE_INDEX
        tokens[on_policy] += int(mask.sum())
        with torch.no_grad():
            ids = torch.tensor(row.input_ids)[None]
            ours, theirs = (
                m(input_ids=ids).logits[0, :-1, : len(tokenizer)][mask] for m in (student, teacher)
            )
        if on_policy:
            entropy += torch.distributions.Categorical(logits=theirs).entropy().sum().item()
        else:
            hard += cross_entropy(ours, labels[mask], reduction="sum").item()
    logged = found["logged"][0]
    assert logged["cross_entropy"] == pytest.approx(hard / tokens[0], rel=1e-5)
    assert logged["on_policy_teacher_entropy"] == pytest.approx(entropy / tokens[1], rel=1e-5)
    assert (
        "on_policy_cross_entropy" not in logged
        and "on_policy_teacher_label_probability" not in logged
    )
    assert logged["generated_length"] == pytest.approx(tokens[1] / len(answers))
    ends = set(RolloutGenerator(student, OnPolicySettings(), tokenizer).ends)
    cut = sum(answer[-1] not in ends for answer in answers) / len(answers)
    assert logged["generated_cut_share"] == pytest.approx(cut)
    assert logged["seconds_generation"] > 0


@pytest.mark.slow
def test_without_a_share_the_run_is_the_off_policy_one_to_the_last_bit(models, tmp_path):
    """By the real command line; with a share the run differs and logs more metrics."""
    (models / "rows_on_policy.jsonl").write_text("\n".join(map(json.dumps, small_rows(24))))
    data = json.dumps([{"path": str(models / "rows_on_policy.jsonl")}])
    found, curves = {}, {}
    for name, flags in {"off": [], "none": ["0"], "some": ["0.4"]}.items():
        job = start(
            *("python", "train/distill.py", "--student", models / "student"),
            *("--teacher", models / "teacher", "--data", data, "--soft_weight", "0.5"),
            *("--lora_rank", "4", "--lora_dropout", "0.2", "--learning_rate", "1e-2"),
            *("--global_batch_size", "8", "--max_per_device_train_batch_size", "4"),
            *("--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no"),
            *("--use_cpu", "true", "--report_to", "none", "--output_dir", tmp_path / name),
            *(["--student_fraction", *flags, "--max_new_tokens", "9"] if flags else []),
        )
        assert (tmp_path / name / "done.json").exists(), job.stdout[-4000:]
        found[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        curves[name] = [reproducible(entry) for entry in history if "loss" in entry]
        assert ("on-policy: the student answers 40% of the rows" in job.stdout) == (name == "some")
    assert found["off"] == found["none"] != found["some"] and curves["off"] == curves["none"]
    on_policy = {
        "on_policy_divergence",
        "on_policy_top1_agreement",
        "generated_length",
        "generated_cut_share",
    }
    assert on_policy <= curves["some"][0].keys() and not on_policy & curves["off"][0].keys()


def trainer_of(student, teacher, tokenizer, rows, folder, settings, **objective):
    collator = Collator(tokenizer.pad_token_id)
    live = LiveTeacher(
        TeacherSettings(teacher=str(teacher), teacher_dtype="float32"),
        ModelSettings(),
        torch.device("cpu"),
    )
    return DistillationTrainer(
        model=student,
        args=training_arguments(
            output_dir=str(folder), global_batch_size=len(rows), use_cpu=True, report_to=["none"]
        ),
        train_dataset=[[row] for row in rows],
        data_collator=collator,
        processing_class=tokenizer,
        objective=Objective(**objective),
        vocab_size=len(tokenizer),
        teacher=live,
        on_policy_rows=OnPolicyRows(
            settings, RolloutGenerator(student, settings, tokenizer), collator, 512
        ),
    )


def test_the_loss_does_not_scale_with_the_generated_length(tokenizer, tmp_path):
    """Models with the same distribution at every token have the same divergence at every token."""
    for name, seed in (("student", 0), ("teacher", 1)):
        save_small(tmp_path / name, tokenizer, seed=seed, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[0]
        model.lm_head.weight.data[tokenizer.eos_token_id] = 0
        model.save_pretrained(tmp_path / name)
    rows, _ = encode_rows(small_rows(4), tokenizer, 512)
    found = {}
    for length in (2, 40):
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        settings = OnPolicySettings(1.0, length)
        trainer = trainer_of(student, tmp_path / "teacher", tokenizer, rows, tmp_path, settings)
        trainer.objective = Objective(1.0, "reverse_kl")
        batch = trainer.data_collator([[row] for row in rows])
        (batch,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        loss = trainer.compute_loss(student, batch, num_items_in_batch=items)
        loss.backward()
        found[length] = loss.item(), student.lm_head.weight.grad.clone(), int(items)
    assert found[40][2] > 4 * found[2][2]
    assert found[40][0] == pytest.approx(found[2][0], rel=1e-5) and found[2][0] > 0.1
    apart = (found[40][1] - found[2][1]).norm() / found[2][1].norm()
    assert apart < 1e-5


def test_an_empty_answer_is_an_end_token_that_is_trained_on(models, tokenizer, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    rows, _ = encode_rows(small_rows(4), tokenizer, 512)
    trainer = trainer_of(
        student,
        models / "teacher",
        tokenizer,
        rows,
        tmp_path,
        OnPolicySettings(1.0),
        soft_weight=0.5,
    )
    end = tokenizer.eos_token_id
    trainer.on_policy_rows.generator.generate = lambda prompts, device: [[end] for _ in prompts]
    batch = trainer.data_collator([[row] for row in rows])
    (batch,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert int(items) == 4 and trainer.metrics.completions == [4, 4, 0]
    outputs = trainer.compute_loss(student, batch, True, num_items_in_batch=items)
    assert math.isfinite(outputs[0].item()) and outputs[0].item() > 0
    metrics = trainer.metrics.read()
    assert "cross_entropy" not in metrics and metrics["on_policy_divergence"] > 0


def test_a_completion_replaces_one_of_a_rows_answers_within_max_length():
    row = EncodedRow.from_labels(
        list(range(10, 22)), [IGNORE_INDEX] * 3 + [13, 14] + [IGNORE_INDEX] * 4 + [19, 20, 21]
    )
    assert answer_starts(row) == [3, 9]
    text = EncodedRow.from_labels(list(range(12)), [IGNORE_INDEX, *range(1, 12)])
    assert answer_starts(text) == [6]
    assert answer_starts(EncodedRow.from_labels([5, 6], [IGNORE_INDEX, 6])) == [1]
    rows = OnPolicyRows(OnPolicySettings(0.5, 256), None, Collator(0), 12)
    found = {(len(p.ids), p.limit) for p in (rows.make_prompt(row, str(i)) for i in range(20))}
    assert found == {(3, 9), (9, 3)}


def test_rows_are_chosen_by_seed_and_step_with_the_right_share_on_average():
    draws = [choose_rows(0.3, 8, 0, step) for step in range(400)]
    assert sum(map(len, draws)) / 3200 == pytest.approx(0.3, abs=0.02)
    assert {len(places) for places in draws} == {2, 3}
    counts = [sum(place in places for places in draws) for place in range(8)]
    assert min(counts) > 80 and max(counts) < 160
    assert draws[:5] == [choose_rows(0.3, 8, 0, step) for step in range(5)]
    assert draws[:5] != [choose_rows(0.3, 8, 1, step) for step in range(5)]
    assert choose_rows(1.0, 8, 0, 3) == set(range(8))


def test_documents_of_a_flat_batch_are_those_of_a_padded_one(tokenizer):
    """Batches for FlashAttention hold all documents in one row."""
    rows, _ = encode_rows(small_rows(5), tokenizer, 512)
    for flat in (False, True):
        on_policy_rows = OnPolicyRows(OnPolicySettings(0.5), None, Collator(0, flat=flat), 512)
        batch = on_policy_rows.collate(rows, [1, 4], torch.device("cpu"))
        assert split_documents(batch) == rows
        on_policy = batch[ON_POLICY] & (batch["labels"] != IGNORE_INDEX)
        expected = [x for i in (1, 4) for x in rows[i].labels if x != IGNORE_INDEX]
        assert batch["labels"][on_policy].tolist() == expected


def test_the_plan_counts_the_key_value_cache_and_the_weights_that_zero3_gathers(models, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(models / "student").eval()
    out = model.generate(
        torch.ones(3, 9, dtype=torch.long), max_new_tokens=7, return_dict_in_generate=True
    )
    held = sum(x.nbytes for layer in out.past_key_values.layers for x in (layer.keys, layer.values))
    length = out.past_key_values.get_seq_length()
    scores = SCORE_BYTES * model.config.vocab_size
    assert held == 3 * (row_bytes(model.config, length, 4) - scores)

    layout = Layout(
        student=str(models / "student"),
        model=ModelSettings(dtype="float32"),
        micro=4,
        accumulation=2,
        max_length=64,
        processes=2,
        memory=2**40,
        zero=json.loads((ROOT / ZERO3).read_text()),
        device="cpu",
    )
    assert "the student's generation" not in plan_training(layout).phases
    on_policy = dataclasses.replace(layout, on_policy=OnPolicySettings(0.25))
    phase = plan_training(on_policy).phases["the student's generation"]
    assert phase["keys, values and scores of generated answers"] == 4 * row_bytes(
        model.config, 64, 4
    )
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert phase["student gathered for generation"] == weights
    # Four rows of a process at once, 256 tokens at most and here 64: so often all weights are read.
    rates = Rates(tflops=1, memory_gb_s=1, link_gb_s=1)
    (written,) = duration(on_policy, rates).seconds.keys() - duration(layout, rates).seconds.keys()
    assert "the student's generation" in written
    assert duration(on_policy, rates).seconds[written] == pytest.approx(64 * weights / 1e9)
    assert sent_bytes(on_policy)["student gathered for generation"] == weights / 2
