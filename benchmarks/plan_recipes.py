"""Planned memory and time of published experiments on GPUs, by train/plan.py. Nothing is measured.

python benchmarks/plan_recipes.py --json benchmarks/results/plan_recipes.json

Configurations come from the hub, or from the folders given in --models.
"""

import json
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd.recipe import parse, setting
from kd.run.run_record import commit

ROOT = Path(__file__).parents[1]
A = "--config recipes/a_qwen2.5_1.5b_to_0.5b/1_teacher.yaml"
D = "--config recipes/d_qwen1.5_32b_to_14b/distill.yaml --rows 207865"
E = "--config recipes/e_llama3_8b_gpt4o/2_student.yaml --rows 10000"
PLANS = {
    "d_2xa100_40gb": f"--machine a100 --num_processes 2 --gpu_memory_gb 39.4 {D}",
    "d_2xa100_80gb": f"--machine a100 --num_processes 2 {D}",
    "d_h100": f"--machine h100 {D}",
    "d_2x8xh100": f"--machine h100 --num_processes 16 --num_machines 2 {D}",
    "d_2x24gb": f"--machine a100 --num_processes 2 --gpu_memory_gb 23.6 {D}",
    "e_2xa100": f"--machine a100 --num_processes 2 {E}",
    "e_8xh100": f"--machine h100 --num_processes 8 {E}",
    "a_teacher_2xt4": f"--machine t4 --num_processes 2 {A}",
}


@dataclass
class PlansSettings:
    json: str | None = setting(None, "Output file.")
    plans: list[str] = setting(list(PLANS), "Names of plans.")
    models: list[str] = setting(
        [], "NAME=FOLDER of model configurations, where no hub can be reached."
    )


def main() -> None:
    (settings,) = parse(PlansSettings, description=__doc__)
    folders = dict(pair.split("=", 1) for pair in settings.models)
    report = {
        "command": "python benchmarks/plan_recipes.py --json benchmarks/results/plan_recipes.json",
        "commit": commit(),
        "configurations_from_folders": list(folders),
        "plans": {name: planned(PLANS[name], folders) for name in settings.plans},
    }
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")


def planned(flags: str, folders: dict[str, str]) -> dict[str, Any]:
    """The plan of a command line, with its command."""
    words = ["python", "train/plan.py", *shlex.split(flags)]
    keys = yaml.safe_load((ROOT / words[words.index("--config") + 1]).read_text())
    own = [("--" + key, folders.get(keys.get(key))) for key in ("model", "student", "teacher")]
    local = [word for pair in own if pair[1] for word in pair]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        subprocess.run([*words, *local, "--json", str(file)], cwd=ROOT, check=True)
        plan = json.loads(file.read_text())
    return {"command": shlex.join(words), **plan, "step_s": sum(plan["seconds a step"].values())}


if __name__ == "__main__":
    main()
