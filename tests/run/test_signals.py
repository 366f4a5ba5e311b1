"""DataLoader workers survive signals to the whole job, from the moment they start."""

import psutil
import pytest
import torch
from accelerate import skip_first_batches
from small import small_model

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
        train_dataset=list(range(40)),
        data_collator=torch.tensor,
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
