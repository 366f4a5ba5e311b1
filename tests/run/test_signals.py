"""DataLoader workers survive signals to the whole job; Ctrl-C saves, and a second one ends it."""

import json
import os
import re
import signal

import numpy as np
import psutil
import pytest
import torch
from accelerate import skip_first_batches
from scripts import run_main
from small import small_model, small_rows

from kd.data.encoding import EncodedRow
from kd.recipe import as_flags
from kd.run.outcome import Stopped
from kd.settings.distillation import Objective
from kd.settings.training_arguments import training_arguments
from kd.training.trainer import DistillationTrainer


@pytest.mark.parametrize("resumed", [False, True])
def test_workers_survive_sigterm(tokenizer, tmp_path, resumed):
    """Accelerate iterates over the loader that it wraps, and copies the wrapper on a resume."""
    settings = training_arguments(
        output_dir=str(tmp_path),
        global_batch_size=2,
        use_cpu=True,
        report_to=["none"],
        dataloader_num_workers=2,
    )
    trainer = DistillationTrainer(
        model=small_model(tokenizer),
        args=settings,
        train_dataset=[[EncodedRow(np.array([i]), np.ones(1, bool))] for i in range(40)],
        data_collator=lambda rows: torch.tensor([documents[0].input_ids[0] for documents in rows]),
        objective=Objective(soft_weight=0.0),
        vocab_size=len(tokenizer),
    )
    loader = trainer.get_train_dataloader()
    batches = iter(skip_first_batches(loader, 3) if resumed else loader)
    before = set(psutil.Process().children())
    first = next(batches)
    workers = [p for p in psutil.Process().children() if p not in before]
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
    assert len(first) + sum(map(len, batches)) == (34 if resumed else 40)


@pytest.fixture
def interrupted(models, tmp_path, monkeypatch):
    """Train in this process, with Ctrl-C `times` times during the second step; the output folder.

    Training replaces the handler of SIGINT, and a run that ends at once does not restore it.
    """

    def train(times: int):
        monkeypatch.setattr(DistillationTrainer, "training_step", step_with(times))
        run_main("train/sft.py", *as_flags(flags))

    def step_with(times: int):
        def step(self, *args, **kw):
            if self.state.global_step == 1:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
            return training_step(self, *args, **kw)

        return step

    training_step = DistillationTrainer.training_step
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in small_rows(16)))
    flags = {
        "model": models / "student",
        "data": json.dumps([{"path": str(rows)}]),
        "global_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "use_cpu": "true",
        "output_dir": tmp_path / "run",
    }
    yield train
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_saves_after_the_step_and_a_log_is_a_readable_line(interrupted, tmp_path, capfd):
    with pytest.raises(Stopped, match="stopped by SIGINT after step 2 of 4; run the same command"):
        interrupted(1)
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    told = capfd.readouterr()
    assert "SIGINT: saving after this step" in told.err
    line = r"^step \d of 4: loss \d\.\d+, learning rate \S+, [\d,]+ tokens/s, [\d.]+ GiB$"
    assert len(re.findall(line, told.out, re.MULTILINE)) == 2, told.out
    assert re.search(r"^trained to step 2 of 4 in [\d.]+ s$", told.out, re.MULTILINE), told.out
    assert "'loss'" not in told.out


def test_a_second_ctrl_c_ends_the_training_at_once(interrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(2)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
