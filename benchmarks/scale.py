"""Bytes and collectives per step: counted in real runs, computed by the formula, and at scale.

python benchmarks/scale.py --json benchmarks/results/scale.json

Counted: every collective of torch.distributed in one optimizer step (the third) of small models on
1, 2 and 4 CPU processes, with unmodified DeepSpeed and Trainer. Bytes are those of a ring: an
all-reduce of n bytes sends 2 (N - 1) / N n in two rounds of the ring, a gather or reduce-scatter
half of that in one. Rounds do not include collectives of a few numbers. DeepSpeed's
stage3_max_reuse_distance and the teacher's thresholds are scaled down with the models, so that the
same share of them stays gathered. The formula is kd.planning.communication.traffic.

Modelled, not measured: seconds on 8, 64 and 1 024 GPUs for every recipe, with full rows and the
recipe's global batch; if that has fewer rows than there are GPUs, each GPU gets one row. A ring
runs at the speed of its slowest link, and every round takes the latency of its hops. Computation
runs at --efficiency of --tflops, and nothing overlaps. A ratio below 1 means that computation could
hide communication, not that it does. NCCL reduces small buckets on trees, which takes less latency.
Not included: on-policy generation, and whether the run fits (see train/plan.py). Configurations
come from the hub, or from the folders given in --models.
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
from scale_counted import CountedSettings, make_models, run_rank
from scale_modelled import ModelledSettings, at_scale

from kd.recipe import parse, setting
from kd.run.run_record import commit

ROOT = Path(__file__).parents[1]
RATIOS = ("formula_over_counted", "rounds_over_counted")


@dataclass
class BenchmarkSettings:
    json: str | None = setting(None, "Output file.")
    worker: str | None = setting(None, "Internal: run one rank, as described by this JSON.")


def main() -> None:
    counted, modelled, settings = parse(
        CountedSettings, ModelledSettings, BenchmarkSettings, description=__doc__
    )
    if settings.worker:
        run_rank(**json.loads(settings.worker))
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
        except ValueError as error:  # the configurations of its models are not available
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
                sent, rounds = (row[key] or 1.0 for key in RATIOS)
                print(f"{ranks} ranks, {row['layout']}: formula / counted {sent:.3f}, {rounds:.2f}")
    return rows


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Communication between processes", "", "    " + report["command"], ""]
    lines += [
        "Counted in one optimizer step of small models, and computed by kd.planning.communication:",
        "",
    ]
    heads = ["layout", "ranks", "MB sent per rank", "formula / counted"]
    heads += ["rounds of the ring", "formula / counted"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in report["counted"]:
        sent, rounds = ("-" if row[key] is None else f"{row[key]:.3f}" for key in RATIOS)
        cells = [row["layout"], row["ranks"], f"{row['counted_bytes'] / 1e6:.2f}", sent]
        cells += [row["counted_rounds"], rounds]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    about = report["assumed"]
    gpus = ", ".join(str(count) for count in about["gpus"])
    most = f"{about['gpus'][-1]:,}".replace(",", " ")
    lines += [
        "",
        "Modelled for GPUs, not measured: a step with activation checkpointing, full rows and the",
        f"recipe's global batch (at least one row per GPU) on {gpus} GPUs. The table shows the",
        "time of communication, with latency, divided by the time of computation: a ring at the",
        f"speed of its slowest link, and {about['tflops']:.0f} TFLOP/s x {about['efficiency']},",
        "without overlap. Below 1, computation could hide communication. GB/s per GPU within a",
        f"machine of {about['machine_gpus']}, GB/s per machine to others, and the latency of a hop",
        "within and between machines in microseconds (those of NCCL 2.20's src/graph/tuning.cc:",
        "LL128 over NVLink and InfiniBand, Simple over PCIe and Ethernet):",
        f"{'; '.join(about['fabrics'])}.",
        f"`rounds` and `latency`: rounds of the ring in a step on {most} GPUs, and the seconds of",
        "their hops on each of these fabrics. A teacher that is sharded per node is gathered "
        "within",
        "each machine. `slower from`: the smallest number of GPUs (a power of two up to 1 024) at",
        "which communication takes longer than computation.",
        "",
    ]
    if report["modelled"]:
        lines += modelled_table(report["modelled"], about["fabrics"])
    lines += [f"\nLeft out: {recipe}: {why}" for recipe, why in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def modelled_table(rows: list[dict[str, Any]], fabrics: list[str]) -> list[str]:
    names = [fabric.split("=")[0] for fabric in fabrics]
    gpus = [key.split(", ")[1] for key in rows[0] if key.startswith("rows a GPU")]
    heads = ["recipe", "layout", "GB sent per GPU", *names, "rounds", "latency, s"]
    heads += [f"slower from: {n}" for n in names]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["recipe"].removeprefix("recipes/").removesuffix(".yaml"), row["layout"]]
        cells.append(", ".join(f"{row[f'GB sent, {n}']:.2g}" for n in gpus))
        for name in names:
            ratios = (row[f"{name} s, {n}"] / row[f"computation s, {n}"] for n in gpus)
            cells.append(", ".join(f"{ratio:.2g}" for ratio in ratios))
        cells.append(f"{row[f'rounds, {gpus[-1]}']:.0f}")
        cells.append(", ".join(f"{row[f'{name} latency s, {gpus[-1]}']:.2g}" for name in names))
        cells += [str(row[f"overtakes: {name}"] or "-") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
