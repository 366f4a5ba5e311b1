"""The same rows give the same gradients however they are split, and those are the true ones."""

import json

import pytest
import torch
from conftest import start
from small import small_rows
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from kd.data.masks import IGNORED, encode_rows

ZERO2, ZERO3 = "ds_configs/student_zero2.json", "ds_configs/student_zero3.json"


def cell(engine, ranks, micro, accumulation, padding=8, mode="full", teacher="whole"):
    stage = engine if engine == "ddp" else engine[-10:-5]
    name = f"{mode}-{stage}-{ranks}x{micro}x{accumulation}-{padding}-{teacher}"
    keys = ("name", "engine", "micro", "accumulation", "padding", "mode", "teacher")
    return dict(zip(keys, (name, engine, micro, accumulation, padding, mode, teacher), strict=True))


CELLS = {
    1: [
        cell("ddp", 1, 8, 1),
        cell("ddp", 1, 1, 8),
        cell("ddp", 1, 8, 1, padding=64),
        cell("ddp", 1, 8, 1, mode="packed"),
        cell("ddp", 1, 8, 1, mode="lora"),
        cell("ddp", 1, 1, 8, mode="lora"),
    ],
    2: [
        cell("ddp", 2, 4, 1),
        cell("ddp", 2, 2, 2, mode="lora"),
        cell("ddp", 2, 4, 1, mode="lora_checkpointing"),
        cell(ZERO2, 2, 4, 1),
        cell(ZERO2, 2, 2, 2, teacher="sharded"),
        cell(ZERO2, 2, 2, 2, padding=64, mode="lora"),
        cell(ZERO3, 2, 2, 2),
        cell(ZERO3, 2, 2, 2, mode="lora", teacher="sharded"),
    ],
}


@pytest.fixture(scope="module")
def work(models):
    for ranks, cells in CELLS.items():
        (models / "cells.json").write_text(json.dumps(cells))
        job = start("torchrun", "--nproc-per-node", ranks, "tests/jobs/gradients.py", models)
        assert all((models / f"{c['name']}.pt").exists() for c in cells), job.stdout[-6000:]
    return models


def oracle(models) -> dict[str, torch.Tensor]:
    """The gradients from whole logits of one row after the other, in float64."""
    student = AutoModelForCausalLM.from_pretrained(models / "student").double()
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").double()
    from kd.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(models / "student"))
    rows, _ = encode_rows(small_rows(8), tokenizer, 512, progress=False)
    real, temperature, total = len(tokenizer), 2.0, 0.0
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        mask = labels != IGNORED
        ours = student(input_ids=ids).logits[0, :-1, :real][mask]
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0, :-1, :real][mask]
        p, q = log_softmax(theirs / temperature, -1), log_softmax(ours / temperature, -1)
        soft = temperature**2 * kl_div(q, p, reduction="sum", log_target=True)
        total = total + 0.5 * soft + 0.5 * cross_entropy(ours, labels[mask], reduction="sum")
    (total / sum(row.targets for row in rows)).backward()
    return {name: p.grad for name, p in student.named_parameters()}


def check_equal(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def test_gradients_are_those_of_whole_logits_in_float64(work):
    """So no factor of ranks or accumulation, no shift of the mask and no padding is in them."""
    found = torch.load(work / f"{CELLS[1][0]['name']}.pt")
    check_equal(found, oracle(work), 2e-6)  # float32 rounding of a whole model against float64


@pytest.mark.parametrize("c", CELLS[1] + CELLS[2], ids=lambda c: c["name"])
def test_split_over_accumulation_ranks_padding_and_packing_changes_no_gradient(work, c):
    lora = c["mode"].startswith("lora")
    reference = next(r for r in CELLS[1] if (r["mode"] == "lora") == lora)
    check_equal(
        torch.load(work / f"{c['name']}.pt"), torch.load(work / f"{reference['name']}.pt"), 1e-6
    )


def test_sharded_teacher_gives_the_logits_of_the_whole_one_to_the_last_bit(work):
    for rank in range(2):
        results = json.loads((work / f"logits-{rank}.json").read_text())
        assert list(results) == ["first", "beside a ZeRO-3 student"]
        for result in results.values():
            assert set(result["differences"].values()) == {0.0}, results
            assert all(share < 0.55 for share in result["held"].values()), results
