"""Bytes that a process sends in a step: counted in real runs beside the formula, and the formula at scale.

python benchmarks/scale.py --json benchmarks/results/scale.json

Counted: every collective of torch.distributed in one optimizer step (the third) of small models on 1,
2 and 4 CPU processes, DeepSpeed and Trainer as they are; each weighed as on a ring, where an
all-reduce of n bytes sends 2 (N - 1) / N n and a gather or a reduce-scatter half of that. DeepSpeed's
stage3_max_reuse_distance and the teacher's persistence threshold are scaled down with the models, so
that as little of them stays gathered as of large ones. The formula is kd.models.throughput.sent_bytes.

Modelled, not measured: seconds at 8, 64 and 1 024 GPUs for every recipe, of full rows at the recipe's
global batch; where that has fewer rows than there are GPUs, each has one and the batch grows. A ring
runs at its slowest link, computation at --efficiency of --tflops, and nothing overlaps: a ratio
below 1 says that communication could hide behind computation, not that it does. No latency: that
of many small gathers on a thousand GPUs comes on top. Not counted: what an on-policy student writes;
whether it fits (train/plan.py). Configurations come from the hub, or from folders named in --models.
"""

import json
import os
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState, GradientState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kd.data.masks import EncodedRow
from kd.data.packing import Collator
from kd.losses.objective import Objective
from kd.models.layout import Layout
from kd.models.load import load_trained
from kd.models.throughput import Rates, duration, sent_bytes
from kd.models.tokenizer import load_tokenizer
from kd.recipe import parse, setting
from kd.settings import ModelSettings, TeacherSettings
from kd.teachers.live import LiveTeacher
from kd.training.checkpoint import commit
from kd.training.exit import leave
from kd.training.settings import TrainingSettings
from kd.training.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]
SHIPPED = "data/quickstart/teacher"  # its tokenizer
WIDTHS = {"student": (128, 12), "teacher": (192, 8)}  # hidden, blocks
REUSE = 700_000  # numbers: a sixth of the student, as 1e9 is of a 14B in four bits
STEPS, COUNTED = 3, 2
LENGTH = 16
MICRO = 4  # rows at a time at most, at scale


@dataclass
class BenchmarkSettings:
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "processes"})
    layouts: list[str] = field(
        default_factory=lambda: list(CELLS), metadata={"help": "names of layouts to count"}
    )
    recipes: list[str] = field(
        default_factory=lambda: recipes_with_models(), metadata={"help": "files to carry on"}
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER of configurations, for want of a hub"}
    )
    gpus: list[int] = field(default_factory=lambda: [8, 64, 1024], metadata={"help": "of a run"})
    machine_gpus: int = setting(8, "GPUs of one machine")
    fabrics: list[str] = field(
        default_factory=lambda: [
            "NVLink + 8 InfiniBand=450,400",
            "NVLink + 1 InfiniBand=450,50",
            "PCIe + Ethernet=25,12.5",
        ],
        metadata={"help": "NAME=GB/s a GPU sends inside of a machine, GB/s a machine to others"},
    )
    tflops: float = setting(989.0, "matrix rate of a GPU; the vendor's figure of an H100, bfloat16")
    memory_gb_s: float = setting(3350.0, "memory rate of a GPU; the vendor's figure of an H100")
    efficiency: float = setting(0.5, "share of the matrix rate that a step reaches (assumed)")
    json: str | None = setting(None, "file for the figures")
    worker: str | None = setting(None, "internal: be one rank, as this JSON says")


@dataclass(frozen=True)
class Cell:
    stage: int = 0  # of ZeRO; 0: DDP
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
DS_JSON = {  # of the student at scale
    "DDP": None,
    "ZeRO-2": "ds_configs/student_zero2.json",
    "ZeRO-3": "ds_configs/student_zero3.json",
}


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    if settings.worker:
        be_a_rank(**json.loads(settings.worker))
        return
    report: dict[str, Any] = {
        "command": "python benchmarks/scale.py --json benchmarks/results/scale.json",
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores for all processes, gloo",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "configurations_from_folders": [pair.split("=")[0] for pair in settings.models],
        "counted": counted_rows(settings),
        "assumed": {
            name: getattr(settings, name)
            for name in ("tflops", "memory_gb_s", "efficiency", "machine_gpus", "gpus", "fabrics")
        },
    }
    report |= {"modelled": [], "left_out": {}}
    for recipe in settings.recipes:
        try:
            report["modelled"] += at_scale(recipe, settings)
        except ValueError as error:  # no configuration of its models is at hand
            report["left_out"][recipe] = str(error)
    text = markdown(report)
    print(text)
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")
        Path(settings.json).with_suffix(".md").write_text(text)


def counted_rows(settings: BenchmarkSettings) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for ranks in settings.ranks:
            work = json.dumps({"folder": folder, "layouts": settings.layouts})
            command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), __file__]
            done = subprocess.run(
                [*command, "--worker", work],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            file = Path(folder) / f"{ranks}.json"
            if not file.exists():
                raise RuntimeError(done.stdout[-6000:])
            rows += json.loads(file.read_text())
            for row in rows[-len(settings.layouts) :]:
                ratio = row["formula_over_counted"] or 1.0
                print(f"{ranks} ranks, {row['layout']}: formula / counted {ratio:.3f}", flush=True)
    return rows


def make_models(work: Path) -> None:
    tokenizer = load_tokenizer(str(ROOT / SHIPPED))
    for name, (width, blocks) in WIDTHS.items():
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
        Qwen2ForCausalLM(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def be_a_rank(folder: str, layouts: list[str]) -> None:
    deepspeed.init_distributed("gloo")
    rows = [count(Path(folder), name, CELLS[name]) for name in layouts]
    if dist.get_rank() == 0:
        (Path(folder) / f"{dist.get_world_size()}.json").write_text(json.dumps(rows))
    dist.barrier()
    leave(0)


def count(work: Path, name: str, cell: Cell) -> dict[str, Any]:
    """What a step sends, by torch.distributed's calls and by the formula."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # of the layout before this one
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    student_json, teacher_json = json_files(work, cell)
    training = TrainingSettings(
        output_dir=str(work / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=cell.accumulation,
        gradient_checkpointing=cell.checkpointing,
        deepspeed=student_json,
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
            teacher_deepspeed=teacher_json,
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
        teacher_shards={} if teacher else None,
        teacher_workspace=2**20 * cell.workspace_mb,
        zero=json.loads(Path(student_json).read_text()) if student_json else None,
        checkpointing=cell.checkpointing,
        device="cpu",
    )
    formula = sum(sent_bytes(layout).values())
    return {
        "layout": name,
        "ranks": layout.processes,
        "counted_bytes": sum(sent.values()),
        "formula_bytes": formula,
        "formula_over_counted": formula / sum(sent.values()) if layout.processes > 1 else None,
        "calls": sent,
        "parts": sent_bytes(layout),
    }


def json_files(work: Path, cell: Cell) -> tuple[str | None, str]:
    """The shipped JSON of student and teacher, with thresholds as small as these models are."""
    stage3 = {"stage3_max_reuse_distance": cell.reuse, "stage3_max_live_parameters": cell.reuse}
    changes = {"student_zero2": {}, "student_zero3": stage3}
    changes["teacher_zero3"] = {"stage3_param_persistence_threshold": 1000}
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
    training: TrainingSettings,
    model: ModelSettings,
    teacher: TeacherSettings | None,
    calls: "Collectives",
) -> DistillationTrainer:
    tokenizer = load_tokenizer(str(work / "student"))
    ids = torch.randint(300, len(tokenizer), (64, LENGTH)).tolist()
    trainer = DistillationTrainer(
        model=load_trained(str(work / "student"), model, tokenizer),
        args=training,
        train_dataset=[[EncodedRow(row, list(row))] for row in ids],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        objective=Objective(soft_weight=0.5 if teacher else 0.0),
        vocabulary=len(tokenizer),
        teacher=teacher and LiveTeacher(teacher, model, training.device),
    )
    samples = trainer.get_batch_samples

    def new_step(*args):
        calls.steps.append(Counter())
        return samples(*args)

    trainer.get_batch_samples = new_step
    return trainer


class Collectives(TorchDispatchMode):
    """Bytes of every collective, step by step: DDP, DeepSpeed and kd all come through c10d."""

    def __init__(self):
        super().__init__()
        self.steps: list[Counter] = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call.namespace == "c10d" and self.steps:
            name = call._schema.name.removeprefix("c10d::")
            # The larger side: what is gathered, what is scattered.
            sides = [sum(t.nbytes for t in tensors(side)) for side in args[:2]]
            self.steps[-1][name] += max(sides)
        return call(*args, **(kwargs or {}))

    def sent(self, step: int) -> dict[str, float]:
        """By a rank, on a ring."""
        ranks = dist.get_world_size()
        times = {name: 2 if name == "allreduce_" else 1 for name in self.steps[step]}
        return {
            name: times[name] * (ranks - 1) / ranks * size
            for name, size in self.steps[step].items()
        }


def tensors(argument: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor)]


def recipes_with_models() -> list[str]:
    """Trainings of the published experiments."""
    files = sorted((ROOT / "recipes").glob("[a-z]_*/*.yaml"))
    keys = {file: yaml.safe_load(file.read_text()) for file in files}
    trained = [f for f in files if {"model", "student"} & keys[f].keys() and "data" in keys[f]]
    return [str(file.relative_to(ROOT)) for file in trained]


def at_scale(recipe: str, settings: BenchmarkSettings) -> list[dict[str, Any]]:
    """Seconds of computation and of communication, for every layout and number of GPUs."""
    rows = []
    shards = json.loads((ROOT / "ds_configs/teacher_zero3.json").read_text())
    distilled = "teacher" in yaml.safe_load((ROOT / recipe).read_text())
    for name, file in DS_JSON.items():
        for sharded in (False, True) if distilled else (False,):
            zero = json.loads((ROOT / file).read_text()) if file else None
            layout = f"{name}, teacher {'sharded' if sharded else 'whole'}" if distilled else name
            row: dict[str, Any] = {"recipe": recipe, "layout": layout}
            for gpus in settings.gpus:
                run = layout_of(recipe, gpus, zero, shards if sharded else None, settings)
                found = seconds(run, settings)
                row |= {f"{key}, {gpus} GPUs": value for key, value in found.items()}
            for fabric in settings.fabrics:
                row[f"overtakes: {fabric.split('=')[0]}"] = next(
                    (
                        gpus
                        for gpus in (2**i for i in range(1, 11))
                        if overtakes(
                            layout_of(recipe, gpus, zero, shards if sharded else None, settings),
                            fabric,
                            settings,
                        )
                    ),
                    None,
                )
            rows.append(row)
    return rows


def layout_of(
    recipe: str, gpus: int, zero: dict | None, shards: dict | None, settings: BenchmarkSettings
) -> Layout:
    keys = yaml.safe_load((ROOT / recipe).read_text())
    folders = dict(pair.split("=", 1) for pair in settings.models)
    own = {f.name: keys[f.name] for f in fields(ModelSettings) if f.name in keys}
    rows = max(1, keys["global_batch_size"] // gpus)
    micro = max(n for n in range(1, MICRO + 1) if rows % n == 0)
    name, teacher = keys.get("student") or keys["model"], keys.get("teacher")
    return Layout(
        student=folders.get(name, name),
        model=ModelSettings(**own | {"dtype": "bfloat16"}),
        micro=micro,
        accumulation=rows // micro,
        max_length=keys["max_length"],
        processes=gpus,
        memory=0.0,
        teacher=folders.get(teacher, teacher),
        teacher_shards=shards,
        teacher_workspace=2**20 * TeacherSettings.teacher_workspace_mb,
        zero=zero,
        half="bfloat16",
        checkpointing=True,
    )


def seconds(layout: Layout, settings: BenchmarkSettings) -> dict[str, float]:
    found = {
        "rows a GPU": layout.micro * layout.accumulation,
        "GB sent": sum(sent_bytes(layout).values()) / 1e9,
        "computation s": computation(layout, settings),
    }
    for fabric in settings.fabrics:
        found[f"{fabric.split('=')[0]} s"] = communication(layout, fabric, settings)
    return found


def computation(layout: Layout, settings: BenchmarkSettings) -> float:
    rates = Rates(settings.tflops, settings.memory_gb_s, float("inf"), settings.efficiency)
    return duration(layout, rates).step


def communication(layout: Layout, fabric: str, settings: BenchmarkSettings) -> float:
    inside, between = (float(rate) for rate in fabric.rsplit("=", 1)[1].split(","))
    rate = inside if layout.processes <= settings.machine_gpus else min(inside, between)
    return sum(sent_bytes(layout).values()) / (1e9 * rate)


def overtakes(layout: Layout, fabric: str, settings: BenchmarkSettings) -> bool:
    return communication(layout, fabric, settings) > computation(layout, settings)


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Bytes between processes", "", "    " + report["command"], ""]
    lines += ["Counted in one optimizer step of small models, beside kd.models.throughput:", ""]
    lines += ["| layout | ranks | MB sent by a rank | formula / counted |", "|---|---|---|---|"]
    for row in report["counted"]:
        ratio = row["formula_over_counted"]
        shown = "-" if ratio is None else f"{ratio:.3f}"
        size = f"{row['counted_bytes'] / 1e6:.2f}"
        lines.append(f"| {row['layout']} | {row['ranks']} | {size} | {shown} |")
    about = report["assumed"]
    gpus = ", ".join(str(count) for count in about["gpus"])
    lines += [
        "",
        "Modelled for GPUs, not measured: a step with checkpointing, full rows and the recipe's global batch (at least one",
        f"row a GPU) on {gpus} GPUs. Communication over computation: a ring at its slowest link, and {about['tflops']:.0f}",
        f"TFLOP/s x {about['efficiency']}. Below 1 it could hide behind computation. No overlap, no latency. GB/s of a GPU inside of a",
        f"machine of {about['machine_gpus']}, and of a machine to others: {'; '.join(about['fabrics'])}.",
        "`overtakes`: the least number of GPUs, a power of two up to 1 024, at which communication takes longer.",
        "",
    ]
    if report["modelled"]:
        lines += modelled_table(report["modelled"], about["fabrics"])
    lines += [f"\nLeft out: {recipe}: {why}" for recipe, why in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def modelled_table(rows: list[dict[str, Any]], fabrics: list[str]) -> list[str]:
    names = [fabric.split("=")[0] for fabric in fabrics]
    gpus = [key.split(", ")[1] for key in rows[0] if key.startswith("rows a GPU")]
    heads = ["recipe", "layout", "GB a GPU sends", *names, *(f"overtakes: {n}" for n in names)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["recipe"].removeprefix("recipes/").removesuffix(".yaml"), row["layout"]]
        cells.append(", ".join(f"{row[f'GB sent, {n}']:.2g}" for n in gpus))
        for name in names:
            ratios = (row[f"{name} s, {n}"] / row[f"computation s, {n}"] for n in gpus)
            cells.append(", ".join(f"{ratio:.2g}" for ratio in ratios))
        cells += [str(row[f"overtakes: {name}"] or "-") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
