"""Bytes that a process sends in a step: counted in real runs beside the formula, and the formula at scale.

python benchmarks/scale.py --json benchmarks/results/scale.json

Counted: every collective of torch.distributed in one optimizer step (the third) of small models on 1,
2 and 4 CPU processes, DeepSpeed and Trainer as they are; each weighed as on a ring, where an
all-reduce of n bytes sends 2 (N - 1) / N n and a gather or a reduce-scatter half of that. DeepSpeed's
stage3_max_reuse_distance and the teacher's persistence threshold are scaled down with the models, so
that as little of them stays gathered as of large ones. The formula is kd.planning.throughput.sent_bytes.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from scale_counted import CountedSettings, be_a_rank, make_models
from scale_modelled import ModelledSettings, at_scale

from kd.recipe import parse, setting
from kd.run.run_record import commit

ROOT = Path(__file__).parents[1]


@dataclass
class BenchmarkSettings:
    json: str | None = setting(None, "file for the figures")
    worker: str | None = setting(None, "internal: be one rank, as this JSON says")


def main() -> None:
    counted, modelled, settings = parse(
        CountedSettings, ModelledSettings, BenchmarkSettings, description=__doc__
    )
    if settings.worker:
        be_a_rank(**json.loads(settings.worker))
        return
    report: dict[str, Any] = {
        "command": "python benchmarks/scale.py --json benchmarks/results/scale.json",
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores for all processes, gloo",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "configurations_from_folders": [pair.split("=")[0] for pair in modelled.models],
        "counted": counted_rows(counted),
        "assumed": {
            name: getattr(modelled, name)
            for name in ("tflops", "memory_gb_s", "efficiency", "machine_gpus", "gpus", "fabrics")
        },
    }
    report |= {"modelled": [], "left_out": {}}
    for recipe in modelled.recipes:
        try:
            report["modelled"] += at_scale(recipe, modelled)
        except ValueError as error:  # no configuration of its models is at hand
            report["left_out"][recipe] = str(error)
    text = markdown(report)
    print(text)
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")
        Path(settings.json).with_suffix(".md").write_text(text)


def counted_rows(settings: CountedSettings) -> list[dict[str, Any]]:
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


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Bytes between processes", "", "    " + report["command"], ""]
    lines += ["Counted in one optimizer step of small models, beside kd.planning.throughput:", ""]
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
