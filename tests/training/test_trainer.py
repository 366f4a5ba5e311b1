"""Held-out metrics, the best checkpoint, early stopping, and a broken model reported at once."""

import json
import math

import pytest
import torch
from processes import start
from scripts import run_main
from small import small_rows
from transformers import AutoModelForCausalLM

from kd.data.encoding import encode_rows
from kd.data.packing import Collator
from kd.data.tokenizer import load_tokenizer
from kd.losses.divergences import forward_kl
from kd.recipe import as_flags
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.settings.training_arguments import training_arguments
from kd.teachers.live import LiveTeacher
from kd.training.trainer import DistillationTrainer


def flags(models, output, **changes) -> list:
    for name, rows in (("rows", small_rows(24)), ("heldout", small_rows(7))):
        (models / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "student": models / "student",
        "teacher": models / "teacher",
        "teacher_dtype": "float32",
        "data": json.dumps([{"path": str(models / "rows.jsonl")}]),
        "eval_data": json.dumps([{"path": str(models / "heldout.jsonl")}]),
        "soft_weight": 0.25,
        "global_batch_size": 4,
        "max_per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "output_dir": output,
    } | changes
    return as_flags(settings)


def log_history(output) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@torch.no_grad()
def heldout_metrics(student_folder, models) -> dict[str, float]:
    """Means over all held-out target tokens, from full logits of one row at a time."""
    tokenizer = load_tokenizer(str(models / "student"))
    rows, _ = encode_rows(small_rows(7), tokenizer, 1024)
    student = AutoModelForCausalLM.from_pretrained(student_folder)
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    hard = soft = 0.0
    for row in rows:
        ids, labels = torch.tensor(row.input_ids)[None], torch.tensor(row.labels[1:])
        ours, theirs = (
            m(input_ids=ids).logits[0, :-1, : len(tokenizer)][labels != -100]
            for m in (student, teacher)
        )
        target = labels[labels != -100]
        hard += torch.nn.functional.cross_entropy(ours, target, reduction="sum").item()
        soft += forward_kl(theirs, ours).sum().item()
    tokens = sum(row.targets for row in rows)
    return {"cross_entropy": hard / tokens, "divergence": soft / tokens}


@pytest.mark.parametrize("launcher", [["python"], ["torchrun", "--nproc-per-node", "2"]])
def test_heldout_metrics_are_means_over_tokens_with_each_row_once(models, tmp_path, launcher):
    """Two ranks do not divide seven rows: no row may count twice."""
    cpu = {"use_cpu": "true"} | ({"ddp_backend": "gloo"} if len(launcher) > 1 else {})
    job = start(*launcher, "train/distill.py", *flags(models, tmp_path / "run", max_steps=2, **cpu))
    assert (tmp_path / "run" / "done.json").exists(), job.stdout[-4000:]
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    expected = heldout_metrics(tmp_path / "run", models)
    for name, value in expected.items():
        assert math.isclose(done[f"eval_{name}"], value, rel_tol=1e-4), (name, done, expected)
    loss = 0.25 * expected["divergence"] + 0.75 * expected["cross_entropy"]
    assert math.isclose(done["eval_loss"], loss, rel_tol=1e-4)


def test_best_checkpoint_by_divergence_and_early_stop(models, tmp_path):
    """A learning rate that ruins the student: the first evaluation stays the best."""
    output = tmp_path / "run"
    changes = {
        "learning_rate": 3.0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 5,
        "load_best_model_at_end": "true",
        "metric_for_best_model": "eval_divergence",
        "greater_is_better": "false",
        "early_stopping_patience": 2,
        "use_cpu": "true",
    }
    run_main("train/distill.py", *flags(models, output, **changes))
    assert (output / "done.json").exists()
    found = [
        entry["eval_divergence"] for entry in log_history(output) if "eval_divergence" in entry
    ]
    best = min(found[:-1])  # the last one evaluates the model that was kept
    assert len(found) - 1 < 15 and math.isclose(found[-1], best, rel_tol=1e-4)


def test_a_broken_teacher_ends_the_run_at_its_first_batch(models, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    teacher.model.norm.weight.data[:] = math.inf
    teacher.save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(models / "teacher")).save_pretrained(tmp_path / "teacher")
    changed = flags(models, tmp_path / "run", teacher=tmp_path / "teacher", use_cpu="true")
    with pytest.raises(ValueError, match="check the teacher"):
        run_main("train/distill.py", *changed)


def test_no_value_is_read_from_the_device_between_two_logs(models, monkeypatch):
    """Reads wait for the device. After the first batch, micro-steps read nothing (fault 13)."""
    tokenizer = load_tokenizer(str(models / "student"))
    rows, _ = encode_rows(small_rows(4), tokenizer, 256)
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    device = torch.device("cpu")
    teacher = LiveTeacher(
        TeacherSettings(teacher=str(models / "teacher"), teacher_dtype="float32"),
        ModelSettings(),
        device,
    )
    trainer = DistillationTrainer(
        model=student,
        args=training_arguments(
            output_dir=str(models / "out"), global_batch_size=4, use_cpu=True, report_to=["none"]
        ),
        train_dataset=[[row] for row in rows],
        data_collator=Collator(tokenizer.pad_token_id),
        objective=Objective(0.5),
        vocab_size=len(tokenizer),
        teacher=teacher,
    )
    batch = trainer.data_collator([[row] for row in rows])
    (first, second), items = trainer.get_batch_samples(iter([batch, batch]), 2, device)
    trainer.compute_loss(student, first, num_items_in_batch=items).backward()
    reads = []
    # Not __bool__: Transformers itself checks in every forward whether the rows are packed.
    for name in ("item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: reads.append(name))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reads.append("empty_cache"))
    trainer.compute_loss(student, second, num_items_in_batch=items).backward()
    monkeypatch.undo()
    assert not reads
