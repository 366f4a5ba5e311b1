"""Count the bytes that small models send in real runs, and compare them with the formula."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from random_checkpoint import qwen_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2ForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.data.tokenizer import load_tokenizer
from kd.models.load import load_trained
from kd.planning.communication import sent_bytes, traffic
from kd.planning.layout import Layout
from kd.recipe import NONE, setting
from kd.run.exit import leave
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.settings.training_arguments import RunArguments, training_arguments
from kd.teachers.live import LiveTeacher
from kd.training.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]
SHIPPED = "data/quickstart/teacher"  # its tokenizer is used
WIDTHS = {"student": (128, 12), "teacher": (192, 8)}  # hidden, blocks
REUSE = 700_000  # parameters: a sixth of the student, like 1e9 of a 4-bit 14B model
PREFETCH = 350_000  # parameters: four fifths of a teacher's block, like 5e7 of a 4-bit 32B model
STEPS, COUNTED = 3, 2
LENGTH = 16
SCALARS = 128  # bytes: smaller collectives are counters, norms and flags


@dataclass(frozen=True)
class Cell:
    stage: int = 0  # ZeRO stage; 0: DDP
    lora: bool = False
    sharded_teacher: bool = False
    checkpointing: bool = False
    reuse: int = REUSE
    workspace_mb: int = 1024
    accumulation: int = 2


CELLS = {
    "full, DDP": Cell(),
    "LoRA, DDP, sharded teacher": Cell(lora=True, sharded_teacher=True),
    "full, ZeRO-2": Cell(2),
    "LoRA, ZeRO-2, sharded teacher": Cell(2, True, True),
    "LoRA, ZeRO-2, sharded teacher, no workspace": Cell(2, True, True, workspace_mb=0),
    "full, ZeRO-3": Cell(3),
    "full, ZeRO-3, all of it reused": Cell(3, reuse=10**9),
    "LoRA, ZeRO-3": Cell(3, True),
    "full, ZeRO-3, checkpointing": Cell(3, checkpointing=True),
    "full, ZeRO-3, checkpointing, sharded teacher": Cell(3, False, True, True),
    "LoRA, ZeRO-3, checkpointing, sharded teacher": Cell(3, True, True, True),
}


@dataclass
class CountedSettings:
    ranks: list[int] = setting([1, 2, 4], "Numbers of processes.")
    layouts: list[str] = setting(list(CELLS), "Names of layouts to count.")


def make_models(work: Path) -> None:
    tokenizer = load_tokenizer(str(ROOT / SHIPPED))
    for name, (width, blocks) in WIDTHS.items():
        shape = (width, 3 * width, blocks, width // 64, 1, len(tokenizer))
        config = qwen_config(*shape, dtype="float32")
        Qwen2ForCausalLM(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def run_rank(folder: str, layouts: list[str]) -> None:
    deepspeed.init_distributed("gloo")
    rows = [count(Path(folder), name, CELLS[name]) for name in layouts]
    if dist.get_rank() == 0:
        (Path(folder) / f"{dist.get_world_size()}.json").write_text(json.dumps(rows))
    dist.barrier()
    leave(0)


def count(work: Path, name: str, cell: Cell) -> dict[str, Any]:
    """Bytes sent in a step, by torch.distributed's calls and by the formula."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # left by the previous layout
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    student_json, teacher_json = json_files(work, cell)
    training = training_arguments(
        output_dir=str(work / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=cell.accumulation,
        gradient_checkpointing=cell.checkpointing,
        deepspeed=student_json or NONE,
        max_steps=STEPS,
        logging_steps=1000,
        use_cpu=True,
        report_to=["none"],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = ModelSettings(dtype="float32", lora_rank=8 if cell.lora else 0)
    teacher = None
    if cell.sharded_teacher:
        teacher = TeacherSettings(
            teacher=str(work / "teacher"),
            teacher_dtype="float32",
            teacher_deepspeed=teacher_json or NONE,
            teacher_workspace_mb=cell.workspace_mb,
        )
    calls = Collectives()
    trainer = make_trainer(work, training, model, teacher, calls)
    with calls:
        trainer.train()
    sent = calls.sent(COUNTED)
    layout = Layout(
        student=str(work / "student"),
        model=model,
        micro=2,
        accumulation=cell.accumulation,
        max_length=LENGTH,
        processes=dist.get_world_size(),
        memory=0.0,
        teacher=teacher and teacher.teacher,
        teacher_dtype="float32",
        teacher_shards=json.loads(Path(teacher_json).read_text()) if teacher else None,
        teacher_workspace=2**20 * cell.workspace_mb,
        zero=json.loads(Path(student_json).read_text()) if student_json else None,
        checkpointing=cell.checkpointing,
        device="cpu",
    )
    formula = sum(sent_bytes(layout).values())
    rounds = sum(part.rounds for part in traffic(layout).values())
    counted_rounds = sum(calls.rounds[COUNTED].values())
    several = layout.processes > 1
    return {
        "layout": name,
        "ranks": layout.processes,
        "counted_bytes": sum(sent.values()),
        "formula_bytes": formula,
        "formula_over_counted": formula / sum(sent.values()) if several else None,
        "counted_rounds": counted_rounds,
        "formula_rounds": rounds,
        "rounds_over_counted": rounds / counted_rounds if several else None,
        "calls": sent,
        "parts": sent_bytes(layout),
    }


def json_files(work: Path, cell: Cell) -> tuple[str | None, str]:
    """The shipped JSON files of student and teacher, with thresholds scaled to these models."""
    stage3 = {"stage3_max_reuse_distance": cell.reuse, "stage3_max_live_parameters": cell.reuse}
    changes = {"student_zero2": {}, "student_zero3": stage3}
    # A prefetch bucket is smaller than a block, as for experiment D's teacher.
    changes["teacher_zero3"] = {
        "stage3_param_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": PREFETCH,
        "stage3_max_live_parameters": 10 * PREFETCH,
    }
    files = {}
    for name, change in changes.items():
        settings = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        settings["zero_optimization"] |= change
        files[name] = work / f"{name}-{dist.get_rank()}.json"
        files[name].write_text(json.dumps(settings))
    student = str(files[f"student_zero{cell.stage}"]) if cell.stage else None
    return student, str(files["teacher_zero3"])


def make_trainer(
    work: Path,
    training: RunArguments,
    model: ModelSettings,
    teacher: TeacherSettings | None,
    calls: "Collectives",
) -> DistillationTrainer:
    tokenizer = load_tokenizer(str(work / "student"))
    ids = torch.randint(300, len(tokenizer), (64, LENGTH)).tolist()
    trainer = DistillationTrainer(
        model=load_trained(str(work / "student"), model, tokenizer),
        args=training,
        train_dataset=[[EncodedRow.from_labels(row, list(row))] for row in ids],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        objective=Objective(soft_weight=0.5 if teacher else 0.0),
        vocab_size=len(tokenizer),
        teacher=teacher and LiveTeacher(teacher, model, training.device),
    )
    samples = trainer.get_batch_samples

    def new_step(*args):
        calls.steps.append(Counter())
        calls.rounds.append(Counter())
        return samples(*args)

    trainer.get_batch_samples = new_step
    return trainer


class Collectives(TorchDispatchMode):
    """Bytes and rounds of every collective per step: DDP, DeepSpeed and kd all call c10d."""

    def __init__(self):
        super().__init__()
        self.steps: list[Counter] = []  # bytes, by kind of collective
        self.rounds: list[Counter] = []  # of the ring, without those of a few numbers

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call.namespace == "c10d" and self.steps:
            name = call._schema.name.removeprefix("c10d::")
            # The larger side: the result of a gather, the input of a scatter.
            sides = [sum(t.nbytes for t in tensors(side)) for side in args[:2]]
            self.steps[-1][name] += max(sides)
            if max(sides) > SCALARS:
                self.rounds[-1][name] += times(name)
        return call(*args, **(kwargs or {}))

    def sent(self, step: int) -> dict[str, float]:
        """Bytes that one rank sends on a ring, by kind of collective."""
        ranks = dist.get_world_size()
        return {
            name: times(name) * (ranks - 1) / ranks * size
            for name, size in self.steps[step].items()
        }


def times(name: str) -> int:
    """Rounds of the ring that a kind of collective takes."""
    return 2 if name == "allreduce_" else 1


def tensors(argument: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor)]
