"""Train many small configurations through the real Trainer and save their losses and gradients.

torchrun --nproc-per-node 2 tests/jobs/gradients.py WORK

WORK/cells.json is a list of `Cell` objects. Writes WORK/<name>.pt for every cell and, with two
ranks, WORK/logits-<rank>.json, which compares the sharded with the whole teacher.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from deepspeed.utils import safe_get_full_grad
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from kd.data.encoding import IGNORE_INDEX, EncodedRow, encode_rows
from kd.data.packing import Collator, pack
from kd.data.tokenizer import load_tokenizer
from kd.distributed import rank, world_size
from kd.losses.hidden import HiddenObjective, add_projections
from kd.models.heads import causal_lm
from kd.models.load import load_trained
from kd.run.exit import leave
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import OWN_BASE, TeacherSettings
from kd.settings.training_arguments import RunArguments, training_arguments
from kd.teachers.live import LiveTeacher
from kd.training.non_finite import non_finite_weight, own_part
from kd.training.trainer import DistillationTrainer
from tests.small import small_rows

ROWS, TEACHER_WIDTH = 8, 48
LEARNING_RATE = 0.05
OBJECTIVE = {"soft_weight": 0.5, "temperature": 2.0, "temperature_squared": True}
TEACHER_CONFIGS = {
    "sharded": "ds_configs/teacher_zero3.json",
    "offloaded": "ds_configs/teacher_zero3_offload.json",
}


@dataclass
class Cell:
    """One configuration of a short training."""

    name: str
    engine: str = "ddp"  # or the path of a DeepSpeed config
    micro: int = 8
    accumulation: int = 1
    padding: int = 8
    mode: str = "full"  # or lora, qlora
    packed: bool = False
    student: str = "student"  # folder in WORK
    teacher: str = "whole"  # or sharded, offloaded, self
    workspace: int = 2**30  # of the teacher, in bytes
    checkpointing: bool = False
    steps: int = 1
    blank: bool = False  # add as many rows without targets, so that some micro-batches have none
    hidden: str = ""  # cosine or mse: add this hidden-state loss, through projections
    rows: int = ROWS
    epochs: int = 0  # instead of `steps`
    strategy: str = "random"


class Rows(list):
    """Rows of one document each."""

    @property
    def lengths(self) -> list[int]:
        return [len(row) for (row,) in self]


class Recorder(DistillationTrainer):
    """Record the gradient of every trained tensor before clipping and the update.

    For every step it also records the bytes of each DeepSpeed gather before the update, and the
    number of micro-batches in each pass of the teacher.
    """

    current: "Recorder | None" = None

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.found: list[dict[str, torch.Tensor]] = []  # one per step
        self.gathers: list[list[int]] = []
        self.passes: list[list[int]] = []  # micro-batches per pass
        states = self.teacher.states

        def recording_states(batches, layers):
            self.passes[-1].append(len(batches))
            return states(batches, layers)

        self.teacher.states = recording_states

    def get_batch_samples(self, *args):
        Recorder.current = self
        self.gathers.append([])
        self.passes.append([])
        return super().get_batch_samples(*args)

    def training_step(self, model, *args, **kw):
        if self.is_deepspeed_enabled and not hasattr(model, "recorded"):
            model.recorded, step = True, model.step

            def recording_step(*a, **k):
                if model.is_gradient_accumulation_boundary():
                    self.record(safe_get_full_grad)
                return step(*a, **k)

            model.step = recording_step
        loss = super().training_step(model, *args, **kw)
        if not self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.record(lambda parameter: parameter.grad)
        return loss

    def record(self, gradient_of):
        Recorder.current = None  # later gathers belong to the optimizer
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.found.append({n: gradient_of(p).detach().clone() for n, p in trained.items()})


def load_student(work: Path, cell: Cell, tokenizer):
    """Load the student of a cell; the plain loop of the test loads the same one."""
    settings = ModelSettings(
        dtype="float32",
        lora_rank=0 if cell.mode == "full" else 4,
        quantization="nf4" if cell.mode == "qlora" else "none",
    )
    torch.manual_seed(0)
    model = load_trained(str(work / cell.student), settings, tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # it starts at 0, which makes the gradient of A 0
            torch.nn.init.normal_(parameter, std=0.1)
    if cell.hidden:
        add_projections(causal_lm(model), hidden_objective(cell), TEACHER_WIDTH)
    return model


def hidden_objective(cell: Cell) -> HiddenObjective | None:
    return HiddenObjective(0.7, cell.hidden, ((0, 0), (1, 1), (2, 2))) if cell.hidden else None


def teacher_config(work: Path, kind: str) -> str | None:
    """Copy the shipped config, but gather small tensors at every use, like large ones."""
    if kind not in TEACHER_CONFIGS:
        return None
    settings = json.loads(Path(TEACHER_CONFIGS[kind]).read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = work / f"{kind}-{dist.get_rank()}.json"
    file.write_text(json.dumps(settings))
    return str(file)


def make_teacher(work: Path, cell: Cell, device: torch.device, student) -> LiveTeacher:
    settings = TeacherSettings(
        teacher=OWN_BASE if cell.teacher == "self" else str(work / "teacher"),
        teacher_dtype="float32",
        teacher_deepspeed=teacher_config(work, cell.teacher) or "none",
    )
    teacher = LiveTeacher(settings, ModelSettings(), device, student)
    teacher.workspace = cell.workspace
    if cell.teacher == "self":  # it shares all weights with the student
        students = {id(parameter) for parameter in student.parameters()}
        assert students.issuperset(map(id, teacher.module.parameters()))
    return teacher


def training_settings(work: Path, cell: Cell) -> RunArguments:
    return training_arguments(
        output_dir=str(work / "out"),
        per_device_train_batch_size=cell.micro,
        gradient_accumulation_steps=cell.accumulation,
        use_cpu=True,
        optim="sgd",  # does not amplify rounding errors in later steps
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=-1 if cell.epochs else cell.steps,
        num_train_epochs=cell.epochs or 1,
        train_sampling_strategy=cell.strategy,
        logging_steps=1,
        report_to=["none"],
        save_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        gradient_checkpointing=cell.checkpointing,
        deepspeed="none" if cell.engine == "ddp" else cell.engine,
    )


def gradients(work: Path, cell: Cell) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # that of the cell before
    tokenizer = load_tokenizer(str(work / "student"))
    rows, _ = encode_rows(small_rows(cell.rows), tokenizer, 512)
    if cell.blank:
        rows += [EncodedRow(row.input_ids, np.zeros_like(row.target_mask)) for row in rows]
    args = training_settings(work, cell)
    student = load_student(work, cell, tokenizer)
    trainer = Recorder(
        model=student,
        args=args,
        train_dataset=pack(rows, 200) if cell.packed else Rows([row] for row in rows),
        data_collator=Collator(tokenizer.pad_token_id, pad_to_multiple_of=cell.padding),
        processing_class=tokenizer,
        objective=Objective(**OBJECTIVE),
        vocab_size=len(tokenizer),
        teacher=make_teacher(work, cell, args.device, student),
        hidden=hidden_objective(cell),
    )
    trainer.train()
    Recorder.current = None
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    weights = [torch.zeros(0) if "zero3" in cell.engine else p.flatten() for p in trained]
    digest = hashlib.sha256(torch.cat(weights).numpy().tobytes()).hexdigest()
    digests = [digest] * args.world_size
    if dist.is_initialized():
        dist.all_gather_object(digests, digest)
    return {
        "gradients": trainer.found,
        "losses": logged,
        "weights": torch.cat(weights),
        "weights of ranks": digests,
        "gathers": trainer.gathers,
        "passes": trainer.passes,
        "non-finite": [non_finite_weight(trainer.model), *spoil_a_weight(trainer.model)],
        "teacher's bytes": sum(
            getattr(p, "ds_numel", 0) * p.itemsize for p in trainer.teacher.module.parameters()
        ),
    }


def spoil_a_weight(model: torch.nn.Module) -> tuple[str, str | None]:
    """Write an infinity to the last value of a weight, on the last rank that holds some of it.

    Returns the name of the weight, and what rank 0 then finds.
    """
    name, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    part = own_part(weight)
    counts = [len(part)] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(counts, len(part))
    if rank() == max(i for i, count in enumerate(counts) if count):
        part[-1] = torch.inf
    return name, non_finite_weight(model)


def count_gathers() -> None:
    """Record the bytes of every DeepSpeed all-gather in the list of the current step."""
    backend = deepspeed.comm.comm.cdb
    gather = backend.all_gather_into_tensor

    def counting(output_tensor, *args, **kw):
        if Recorder.current:
            Recorder.current.gathers[-1].append(output_tensor.nbytes)
        return gather(output_tensor, *args, **kw)

    backend.all_gather_into_tensor = counting


@torch.no_grad()
def sharded_logits(work: Path) -> dict:
    """Return the largest difference between logits of sharded and whole teachers."""
    differences, held = {}, {}
    for name in ("teacher", "student"):  # an untied head and a tied one
        for dtype in ("float32", "bfloat16"):
            settings = {"teacher": str(work / name), "teacher_dtype": dtype}
            whole = LiveTeacher(TeacherSettings(**settings), ModelSettings(), torch.device("cpu"))
            sharded = LiveTeacher(
                TeacherSettings(**settings, teacher_deepspeed=teacher_config(work, "sharded")),
                ModelSettings(),
                torch.device("cpu"),
            )
            worst = 0.0
            for length in (9 + 8 * dist.get_rank(), 24, 3):  # lengths differ between ranks
                ids = torch.arange(3, 3 + length)[None]
                labels = torch.full_like(ids, IGNORE_INDEX)
                if length != 9:  # rank 0 has no targets in its first forward
                    labels[:, 1:] = ids[:, 1:]
                batch = {
                    "input_ids": ids,
                    "position_ids": torch.arange(length)[None],
                    "labels": labels,
                }
                with (
                    sharded.batch_outputs(batch) as (ours, _),
                    whole.batch_outputs(batch) as (truth, _),
                ):
                    assert ours.hidden.shape == truth.hidden.shape
                    logits = ours.head.logits(ours.hidden, 300)
                    difference = logits - truth.head.logits(truth.hidden, 300)
                    worst = max([worst, *difference.abs().flatten().tolist()])
            differences[f"{name} {dtype}"] = worst
            shards = [p.ds_tensor.numel() for p in sharded.module.parameters()]
            held[f"{name} {dtype}"] = sum(shards) / sum(
                p.numel() for p in whole.module.parameters()
            )
    return {"differences": differences, "held": held}


def main() -> None:
    work = Path(sys.argv[1])
    alone = int(os.environ["WORLD_SIZE"]) == 1
    logits = {}
    if not alone:
        deepspeed.init_distributed("gloo")
        count_gathers()
        logits["first"] = sharded_logits(work)
    for cell in json.loads((work / "cells.json").read_text()):
        found = gradients(work, Cell(**cell))
        if int(os.environ["RANK"]) == 0:
            torch.save(found, work / f"{cell['name']}.pt")
    if not alone:  # again, with Transformers configured for a student under ZeRO-3
        student_config = HfDeepSpeedConfig("ds_configs/student_zero3.json")
        logits["with a ZeRO-3 student"] = sharded_logits(work)
        assert student_config.is_zero3()
        (work / f"logits-{dist.get_rank()}.json").write_text(json.dumps(logits))


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()
    leave(0)
