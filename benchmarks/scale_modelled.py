"""Model the seconds of computation and communication of benchmarks/scale.py on many GPUs."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kd.planning.communication import communication_seconds, traffic
from kd.planning.device_rates import Rates
from kd.planning.layout import Layout
from kd.planning.throughput import duration
from kd.recipe import setting
from kd.settings.distillation import ModelSettings
from kd.settings.teacher import TEACHER_WORKSPACE

ROOT = Path(__file__).parents[1]
MICRO = 4  # maximum rows per micro-batch
TEACHERS = ["whole", "sharded", "sharded per node"]
DS_JSON = {  # of the student, by layout
    "DDP": None,
    "ZeRO-2": "ds_configs/student_zero2.json",
    "ZeRO-3": "ds_configs/student_zero3.json",
}


def recipes_with_models() -> list[str]:
    """The training recipes of the published experiments."""
    files = sorted((ROOT / "recipes").glob("[a-z]_*/*.yaml"))
    keys = {file: yaml.safe_load(file.read_text()) for file in files}
    trained = [f for f in files if {"model", "student"} & keys[f].keys() and "data" in keys[f]]
    return [str(file.relative_to(ROOT)) for file in trained]


@dataclass
class ModelledSettings:
    recipes: list[str] = setting([], "Recipe files; by default those of the published experiments.")
    models: list[str] = setting(
        [], "NAME=FOLDER of model configurations, where no hub can be reached."
    )
    gpus: list[int] = setting([8, 64, 1024], "Numbers of GPUs.")
    machine_gpus: int = setting(8, "GPUs per machine.")
    fabrics: list[str] = setting(
        [
            "NVLink + 8 InfiniBand=450,400,1.9,4",
            "NVLink + 1 InfiniBand=450,50,1.9,4",
            "PCIe + Ethernet=25,12.5,5.7,14",
        ],
        "NAME=GB/s per GPU within a machine,GB/s per machine to others, and the latency of a hop "
        "within and between machines in microseconds; default: as in launch/machines/.",
    )
    tflops: float = setting(989.0, "Matrix rate of a GPU; default: H100 bfloat16 data sheet.")
    memory_gb_s: float = setting(3350.0, "Memory rate of a GPU; default: H100 data sheet.")
    efficiency: float = setting(0.5, "Assumed share of the matrix rate that a step reaches.")

    def __post_init__(self) -> None:
        self.recipes = self.recipes or recipes_with_models()


def at_scale(recipe: str, settings: ModelledSettings) -> list[dict[str, Any]]:
    """Seconds of computation and communication, for every layout and number of GPUs."""
    rows = []
    shards = json.loads((ROOT / "ds_configs/teacher_zero3.json").read_text())
    distilled = "teacher" in yaml.safe_load((ROOT / recipe).read_text())
    for name, file in DS_JSON.items():
        for teacher in TEACHERS if distilled else ["whole"]:
            zero = json.loads((ROOT / file).read_text()) if file else None
            layout = f"{name}, teacher {teacher}" if distilled else name
            row: dict[str, Any] = {"recipe": recipe, "layout": layout}
            options = {
                "zero": zero,
                "shards": None if teacher == "whole" else shards,
                "per_node": teacher == "sharded per node",
                "settings": settings,
            }
            for gpus in settings.gpus:
                found = seconds(layout_of(recipe, gpus, **options), settings)
                row |= {f"{key}, {gpus} GPUs": value for key, value in found.items()}
            runs = {2**i: layout_of(recipe, 2**i, **options) for i in range(1, 11)}
            for fabric in settings.fabrics:
                slower = (gpus for gpus, run in runs.items() if overtakes(run, fabric, settings))
                row[f"overtakes: {fabric.split('=')[0]}"] = next(slower, None)
            rows.append(row)
    return rows


def layout_of(
    recipe: str,
    gpus: int,
    zero: dict | None,
    shards: dict | None,
    per_node: bool,
    settings: ModelledSettings,
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
        teacher_workspace=2**20 * TEACHER_WORKSPACE,
        zero=zero,
        half="bfloat16",
        checkpointing=True,
        per_machine=settings.machine_gpus,
        teacher_processes=min(gpus, settings.machine_gpus) if per_node else None,
    )


def seconds(layout: Layout, settings: ModelledSettings) -> dict[str, float]:
    found = {
        "rows a GPU": layout.micro * layout.accumulation,
        "GB sent": sum(part.sent for part in traffic(layout).values()) / 1e9,
        "rounds": sum(part.rounds for part in traffic(layout).values()),
        "computation s": computation(layout, settings),
    }
    for fabric in settings.fabrics:
        sending, latency = communication(layout, fabric, settings)
        name = fabric.split("=")[0]
        found |= {f"{name} s": sending + latency, f"{name} latency s": latency}
    return found


def computation(layout: Layout, settings: ModelledSettings) -> float:
    rates = Rates(
        settings.tflops, settings.memory_gb_s, float("inf"), efficiency=settings.efficiency
    )
    return duration(layout, rates).step


def communication(layout: Layout, fabric: str, settings: ModelledSettings) -> tuple[float, float]:
    """(seconds to send, seconds of latency)."""
    inside, between, *latencies = (float(word) for word in fabric.rsplit("=", 1)[1].split(","))
    links = (inside, between / settings.machine_gpus, *latencies)
    return communication_seconds(layout, Rates(settings.tflops, settings.memory_gb_s, *links))


def overtakes(layout: Layout, fabric: str, settings: ModelledSettings) -> bool:
    return sum(communication(layout, fabric, settings)) > computation(layout, settings)
