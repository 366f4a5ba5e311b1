"""Gradients are exact, and do not depend on how rows are split over ranks and steps."""

import contextlib
import dataclasses
import itertools
import json

import pytest
import torch
from jobs.gradients import LEARNING_RATE, OBJECTIVE, ROWS, Cell, hidden_objective, load_student
from processes import start
from small import save_small, small_rows
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from kd.data.encoding import IGNORE_INDEX, encode_rows
from kd.data.tokenizer import load_tokenizer
from kd.models.heads import causal_lm

ZERO2, ZERO3 = "ds_configs/student_zero2.json", "ds_configs/student_zero3.json"
SPLITS = {
    1: [
        Cell("1x8x1"),
        Cell("1x1x8", micro=1, accumulation=8),
        Cell("1x8x1 padded to 64", padding=64),
        Cell("1x8x1 packed", packed=True),
        Cell("1x8x1 lora", mode="lora"),
        Cell("1x1x8 lora", micro=1, accumulation=8, mode="lora"),
    ],
    2: [
        Cell("2x4x1", micro=4),
        Cell("2x2x2 lora", micro=2, accumulation=2, mode="lora"),
        Cell("2x4x1 zero2", ZERO2, 4),
        Cell("2x2x2 zero2, sharded teacher", ZERO2, 2, 2, teacher="sharded"),
        Cell("2x2x2 zero2 padded lora", ZERO2, 2, 2, 64, mode="lora"),
        Cell("2x2x2 zero3", ZERO3, 2, 2),
        Cell("2x1x8 blank rows", "ddp", 1, 8, blank=True),
        Cell("2x1x8 zero2 blank rows, sharded teacher", ZERO2, 1, 8, blank=True, teacher="sharded"),
        Cell("2x2x2 zero3 lora, sharded teacher", ZERO3, 2, 2, mode="lora", teacher="sharded"),
    ],
}
EPOCHS = {  # the rows of an epoch divide neither by the global batch nor by a round of the ranks
    1: [
        Cell("31 rows, 1x4x2", micro=4, accumulation=2, rows=31, epochs=2),
        Cell("25 rows, 1x4x2", micro=4, accumulation=2, rows=25, epochs=2),
        Cell("25 grouped rows, 1x4x2", "ddp", 4, 2, rows=25, epochs=2, strategy="group_by_length"),
    ],
    2: [
        Cell("31 rows, 2x2x2", micro=2, accumulation=2, rows=31, epochs=2),
        Cell("25 rows, 2x2x2", micro=2, accumulation=2, rows=25, epochs=2),
        Cell("25 rows, 2x2x2 zero2", ZERO2, 2, 2, rows=25, epochs=2, teacher="sharded"),
        Cell("25 rows, 2x2x2 zero3", ZERO3, 2, 2, rows=25, epochs=2, teacher="sharded"),
        Cell("25 grouped rows, 2x2x2", "ddp", 2, 2, rows=25, epochs=2, strategy="group_by_length"),
    ],
}
STEPS = 3  # the last one follows two updates
PRODUCT = [
    Cell(
        f"{engine[-10:-5] or engine} {mode} {student} checkpointing={checkpointing}",
        engine,
        4,
        mode=mode,
        student=student,
        checkpointing=checkpointing,
        steps=STEPS,
    )
    for engine, mode, student, checkpointing in itertools.product(
        ("ddp", ZERO2, ZERO3), ("full", "lora", "qlora"), ("student", "untied"), (False, True)
    )
]
# Every pair of two choices occurs in one of these; tests/run.sh --all runs the whole product.
PAIRS = [PRODUCT[n] for n in (0, 7, 10, 13, 18, 23, 27, 28, 33)]
LAYOUTS = [
    Cell("hidden cosine zero2", ZERO2, 4, steps=STEPS, hidden="cosine"),
    Cell("hidden mse lora", "ddp", 4, mode="lora", checkpointing=True, steps=STEPS, hidden="mse"),
    Cell("hidden mse qlora zero2", ZERO2, 4, mode="qlora", steps=STEPS, hidden="mse"),
    Cell("hidden cosine lora zero3", ZERO3, 4, mode="lora", steps=STEPS, hidden="cosine"),
    Cell("hidden, sharded", ZERO3, 4, mode="lora", teacher="sharded", steps=STEPS, hidden="cosine"),
]


MATRIX = [
    Cell(
        f"{engine[-10:-5] or engine} x {teacher}",
        engine,
        2,
        2,
        8,
        "lora",
        teacher=teacher,
        steps=STEPS,
    )
    for engine in ("ddp", ZERO2, ZERO3)
    for teacher in ("whole", "sharded", "offloaded")
]
PASSES = [
    Cell(
        f"hidden, workspace={workspace}",
        micro=1,
        accumulation=4,
        mode="lora",
        teacher="sharded",
        steps=STEPS,
        hidden="cosine",
        workspace=workspace,
    )
    for workspace in (2**30, 300_000, 0)
]
SELF_DISTILLATION = [
    Cell(
        f"self {mode} {engine[-10:-5] or engine}",
        engine,
        2,
        2,
        mode=mode,
        teacher="self",
        steps=STEPS,
    )
    for mode in ("lora", "qlora")
    for engine in ("ddp", ZERO2)
]
SELF_DISTILLATION.append(
    Cell(
        "self checkpointing", "ddp", 4, mode="lora", teacher="self", checkpointing=True, steps=STEPS
    )
)
LAYOUTS += PAIRS + MATRIX + PASSES + SELF_DISTILLATION
REST = [cell for cell in PRODUCT if cell not in PAIRS]
ALL = LAYOUTS + [pytest.param(cell, marks=pytest.mark.slow) for cell in REST]


@pytest.fixture(scope="module")
def work(models, request):
    """Run the cells of the tier, on one rank and on two; return the folder with their results."""
    save_small(models / "untied", tie_word_embeddings=False)
    rest = [] if request.config.option.markexpr == "not slow" else REST
    for ranks, cells in ((1, SPLITS[1] + EPOCHS[1]), (2, SPLITS[2] + EPOCHS[2] + LAYOUTS + rest)):
        (models / "cells.json").write_text(json.dumps([dataclasses.asdict(c) for c in cells]))
        job = start("torchrun", "--nproc-per-node", ranks, "tests/jobs/gradients.py", models)
        assert all((models / f"{c.name}.pt").exists() for c in cells), job.stdout[-6000:]
    return models


def true_loss(student, teacher, tokenizer, hidden=None) -> torch.Tensor:
    """Compute the mean loss over target tokens from whole logits, row by row.

    Without a teacher, the student with its adapters disabled takes its place.
    """
    maps = getattr(causal_lm(student), "hidden_projections", None)
    rows, _ = encode_rows(small_rows(ROWS), tokenizer, 512)
    real, temperature = len(tokenizer), OBJECTIVE["temperature"]
    weight, total = OBJECTIVE["soft_weight"], 0.0
    for row in rows:
        ids, labels = torch.tensor(row.input_ids)[None], torch.tensor(row.labels[1:])
        mask = labels != IGNORE_INDEX
        outputs = student(input_ids=ids, output_hidden_states=True)
        with torch.no_grad():
            off = contextlib.nullcontext() if teacher else student.disable_adapter()
            with off:
                expected = (teacher or student)(input_ids=ids, output_hidden_states=True)
        ours, theirs = (x.logits[0, :-1, :real][mask] for x in (outputs, expected))
        p, q = log_softmax(theirs / temperature, -1), log_softmax(ours / temperature, -1)
        soft = temperature**2 * kl_div(q, p, reduction="sum", log_target=True)
        hard = cross_entropy(ours, labels[mask], reduction="sum")
        total = total + weight * soft + (1 - weight) * hard
        for i, (n, m) in enumerate(hidden.layers if hidden else ()):
            a = maps[i](outputs.hidden_states[n][0, :-1][mask])
            b = expected.hidden_states[m][0, :-1][mask]
            cosine = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            apart = cosine if hidden.loss == "cosine" else ((a - b) ** 2).mean(-1)
            total = total + hidden.weight * apart.sum() / len(hidden.layers)
    return total / sum(row.targets for row in rows)


def plain_steps(student, work, steps: int, hidden=None, own_base: bool = False) -> dict:
    """Run plain gradient descent; return {"losses": [...], "gradients": [{...}, ...]}."""
    tokenizer = load_tokenizer(str(work / "student"))
    dtype = next(student.parameters()).dtype
    teacher = None
    if not own_base:
        teacher = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=dtype)
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    found = {"losses": [], "gradients": []}
    for _ in range(steps):
        loss = true_loss(student, teacher, tokenizer, hidden)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        found["losses"].append(loss.item())
        found["gradients"].append(dict(zip(trained, gradients, strict=True)))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= LEARNING_RATE * gradient
    return found


def check_equal(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def test_gradients_equal_those_of_whole_logits_in_float64(work):
    """So they contain no factor of ranks or accumulation, no mask shift and no padding."""
    student = AutoModelForCausalLM.from_pretrained(work / "student").double()
    (expected,) = plain_steps(student, work, 1)["gradients"]
    (found,) = torch.load(work / "1x8x1.pt")["gradients"]
    check_equal(found, expected, 2e-6)  # float32 rounding of a whole model


@pytest.mark.parametrize("cell", SPLITS[1] + SPLITS[2], ids=lambda cell: cell.name)
def test_fault_1_accumulation_ranks_padding_and_packing_do_not_change_gradients(work, cell):
    reference = "1x8x1 lora" if cell.mode == "lora" else "1x8x1"
    (found,), (expected,) = (
        torch.load(work / f"{name}.pt")["gradients"] for name in (cell.name, reference)
    )
    check_equal(found, expected, 1e-6)


@pytest.mark.parametrize("cell", EPOCHS[2], ids=lambda cell: cell.name)
def test_whole_epochs_do_not_depend_on_the_ranks_although_rows_do_not_divide(work, cell):
    """The last step of an epoch has blank rows; with 25 rows, one rank has nothing else."""
    one = f"{cell.name.split(',')[0]}, 1x4x2"
    found, expected = (torch.load(work / f"{name}.pt") for name in (cell.name, one))
    assert len(found["losses"]) == len(expected["losses"]) == 8
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        check_equal(ours, theirs, 1e-5)
    if cell.engine != ZERO3:
        change = (found["weights"] - expected["weights"]).norm()
        assert change < 1e-6 * expected["weights"].norm()


@pytest.fixture(scope="module")
def truth(work):
    """Take STEPS steps of plain gradient descent for every kind of student."""
    tokenizer = load_tokenizer(str(work / "student"))
    return {
        kind: plain_steps(
            load_student(work, cell, tokenizer),
            work,
            STEPS,
            hidden_objective(cell),
            cell.teacher == "self",
        )
        for kind, cell in {kind_of(cell): cell for cell in LAYOUTS + REST}.items()
    }


def kind_of(cell: Cell) -> tuple:
    """Return what the true gradients depend on."""
    return cell.mode, cell.student, cell.hidden, cell.teacher == "self"


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_three_steps_of_every_layout_equal_a_plain_loop_over_logits(work, truth, cell):
    found, expected = torch.load(work / f"{cell.name}.pt"), truth[kind_of(cell)]
    assert len(found["gradients"]) == len(found["losses"]) == STEPS
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        check_equal(ours, theirs, 1e-5)


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_fault_2_ranks_keep_equal_weights(work, cell):
    """A loss computed from `model.module` skips DDP's hooks, so the ranks would diverge."""
    digests = torch.load(work / f"{cell.name}.pt")["weights of ranks"]
    assert len(digests) == 2 and len(set(digests)) == 1


@pytest.mark.parametrize("cell", SPLITS[1] + ALL, ids=lambda cell: cell.name)
def test_an_infinity_in_a_trained_weight_is_found_wherever_the_weight_is(work, cell):
    """On one rank, on all ranks of DDP, and in one rank's shard under ZeRO-3."""
    before, spoilt, after = torch.load(work / f"{cell.name}.pt")["non-finite"]
    assert before is None and after == spoilt


def test_the_default_tier_has_every_pair_of_choices():
    choices = [(c.engine, c.mode, c.student, c.checkpointing) for c in PRODUCT]
    pairs = {pair for four in choices for pair in itertools.combinations(enumerate(four), 2)}
    chosen = [choices[PRODUCT.index(cell)] for cell in PAIRS]
    assert pairs == {pair for four in chosen for pair in itertools.combinations(enumerate(four), 2)}


def check_same_run(found: dict, expected: dict) -> None:
    """Compare losses and gradients of all steps bit for bit."""
    assert found["losses"] == expected["losses"] and len(found["losses"]) == STEPS
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "cell", [cell for cell in MATRIX if cell.teacher != "whole"], ids=lambda cell: cell.name
)
def test_sharded_and_offloaded_teachers_train_bit_for_bit_like_a_whole_one(work, cell):
    whole = f"{cell.name.split(' x ')[0]} x whole"
    found, expected = (torch.load(work / f"{name}.pt") for name in (cell.name, whole))
    check_same_run(found, expected)
    assert found["passes"] == [[2]] * STEPS and expected["passes"] == [[1, 1]] * STEPS


def test_the_number_of_teacher_passes_does_not_change_the_training(work):
    once, some, each = (torch.load(work / f"{cell.name}.pt") for cell in PASSES)
    check_same_run(some, once)
    check_same_run(each, once)
    assert once["passes"] == [[4]] * STEPS and each["passes"] == [[1] * 4] * STEPS
    assert all(sum(passes) == 4 for passes in some["passes"])
    assert STEPS < sum(len(passes) for passes in some["passes"]) < 4 * STEPS


def test_fault_11_a_sharded_teacher_is_gathered_once_per_step(work):
    """That includes its head. Without workspace, it is gathered once per micro-batch."""
    once, _, each = (torch.load(work / f"{cell.name}.pt") for cell in PASSES)
    for step in range(STEPS):
        assert sum(once["gathers"][step]) == once["teacher's bytes"]
        assert sum(each["gathers"][step]) == 4 * each["teacher's bytes"]
    assert 4 * len(once["gathers"][-1]) <= len(each["gathers"][-1])


def test_a_sharded_teacher_gives_the_logits_of_a_whole_one_bit_for_bit(work):
    for rank in range(2):
        results = json.loads((work / f"logits-{rank}.json").read_text())
        assert list(results) == ["first", "with a ZeRO-3 student"]
        for result in results.values():
            assert set(result["differences"].values()) == {0.0}, results
            assert all(share < 0.55 for share in result["held"].values()), results
