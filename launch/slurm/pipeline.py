"""Submit an experiment as SLURM jobs, one stage after the other; if a job fails, the rest are cancelled.

python launch/slurm/pipeline.py recipes/a_qwen2.5_1.5b_to_0.5b '[{"path": "heldout.jsonl"}]' --partition=gpu --gpus-per-node=2

The folder holds recipes. The number in front of a file's name is its stage; the recipes of a stage run side by side, as
a job array. An adapter that a later recipe reads as OUTPUT_DIR-merged is merged in between. Then perplexity, agreement
with the teacher (if it can be loaded and has the students' tokenizer) and a report. The second argument is held-out rows
for eval/, as JSON; all others are flags of sbatch. Jobs without a model get none of the GPUs.

All recipes are checked before the first job is submitted. Run it again to resume: finished steps are skipped.
"""  # noqa: E501

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

BATCH = "launch/slurm/train.sbatch"
GPU_FLAGS = re.compile(r"--(gpus|gres|cpus-per-gpu|mem-per-gpu|exclusive)\b.*|-G.*")
# A recipe is for the first script one of whose keys it has.
SCRIPTS = {"prompts": "generate", "parent": "inherit", "teacher": "distill", "data": "sft"}
INPUTS = ("model", "student", "teacher", "parent", "teacher_cache")


class Recipe:
    """A recipe file: its stage, its script, what it reads and what it writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.keys = path, yaml.safe_load(path.read_text())
        number, _, name = path.stem.partition("_")
        self.stage, self.name = (int(number), name) if number.isdigit() else (1, path.stem)
        self.script = next(f"train/{s}.py" for key, s in SCRIPTS.items() if key in self.keys)
        self.output = self.keys["output_dir"]

    @property
    def inputs(self) -> list[str]:
        """The models that it reads."""
        return [self.keys[key] for key in INPUTS if self.keys.get(key)]

    @property
    def command(self) -> list[str]:
        """The script with its flags."""
        return [self.script, "--config", str(self.path)]


class Jobs:
    """Submits jobs; each waits for the ones before."""

    def __init__(self, flags: list[str]) -> None:
        self.flags, self.after = flags, ""

    def submit(self, name: str, words: list[str], *own: str, gpus: bool = True) -> None:
        """Submit one job after those submitted before, and print its name and number."""
        flags = [flag for flag in self.flags if gpus or not GPU_FLAGS.fullmatch(flag)]
        log = "%A_%a" if any("--array" in flag for flag in own) else "%j"
        wait = ["--dependency", f"afterok:{self.after}", "--kill-on-invalid-dep=yes"]
        command = ["sbatch", "--parsable", "--job-name", name, f"--output=runs/slurm/%x-{log}.out"]
        command += [*flags, *(wait if self.after else []), *own, BATCH, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        self.after = done.stdout.strip().split(";")[0]
        print(name, self.after, flush=True)


def main(folder: Path, heldout: str, flags: list[str]) -> None:
    """Check all recipes, then submit them stage by stage, and the evaluation after them."""
    recipes = sorted((Recipe(path) for path in folder.glob("*.yaml")), key=lambda r: r.stage)
    merged = merges(recipes)
    check(folder, recipes, merged, heldout)
    Path("runs/slurm").mkdir(
        parents=True, exist_ok=True
    )  # a job without its log folder fails silently
    jobs = Jobs(flags)
    for stage in sorted({recipe.stage for recipe in recipes}):
        submit_stage(jobs, [r for r in recipes if r.stage == stage], folder.name)
        for adapter in [r.output for r in recipes if r.stage == stage and r.output in merged]:
            words = ["train/merge.py", "--adapter", adapter, "--output_dir", merged[adapter]]
            jobs.submit("merge", words, "--nodes=1", gpus=False)
    evaluate(jobs, recipes, heldout)


def merges(recipes: list[Recipe]) -> dict[str, str]:
    """{adapter: merged model} for the merged models that a recipe reads."""
    read = {name for recipe in recipes for name in recipe.inputs}
    wanted = {recipe.output: f"{recipe.output}-merged" for recipe in recipes}
    return {adapter: name for adapter, name in wanted.items() if name in read}


def check(folder: Path, recipes: list[Recipe], merged: dict[str, str], heldout: str) -> None:
    """Exit with code 2 if a recipe has a mistake, or if the held-out rows are no JSON."""
    if not recipes:
        refuse(f"no recipe in {folder}; wanted a folder such as recipes/a_qwen2.5_1.5b_to_0.5b")
    try:
        json.loads(heldout)
    except ValueError as error:
        refuse(f"held-out rows: found {heldout}, which is not JSON ({error})")
    written = ":".join([*(recipe.output for recipe in recipes), *merged.values()])
    for recipe in recipes:
        done = subprocess.run(
            [sys.executable, *recipe.command],
            env=os.environ | {"KD_PARSE_ONLY": written, "PYTHONPATH": os.getcwd()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            refuse(f"{recipe.path}: {done.stderr.strip().split('error: ')[-1]}")


def submit_stage(jobs: Jobs, recipes: list[Recipe], experiment: str) -> None:
    """Submit the recipes of a stage: a job, or an array whose elements read a line of a file."""
    if len(recipes) == 1:
        jobs.submit(recipes[0].name, recipes[0].command)
        return
    lines = Path(f"runs/slurm/{experiment}.stage{recipes[0].stage}")
    lines.write_text("".join(" ".join(recipe.command) + "\n" for recipe in recipes))
    jobs.submit(f"stage{recipes[0].stage}", [f"@{lines}"], f"--array=1-{len(recipes)}")


def evaluate(jobs: Jobs, recipes: list[Recipe], heldout: str) -> None:
    """Measure the students of the last stage beside their teacher, and write the report."""
    students = [recipe for recipe in recipes if recipe.stage == recipes[-1].stage]
    results = str(Path(students[0].output).parent / "results")
    named = [f"{Path(recipe.output).name}={recipe.output}" for recipe in students]
    taught = [recipe for recipe in recipes if recipe.script.endswith(("distill.py", "generate.py"))]
    teachers = [r.keys.get("teacher") or r.keys["model"] for r in taught if "server" not in r.keys]
    common = ["--data", heldout, "--out_dir", results]
    models = [f"teacher={teachers[-1]}" for _ in teachers[:1]] + named
    jobs.submit("perplexity", ["eval/perplexity.py", "--models", *models, *common], "--nodes=1")
    if teachers and not any(recipe.keys.get("align_tokenizers") for recipe in recipes):
        words = ["eval/agreement.py", "--teacher", teachers[-1], "--models", *named, *common]
        jobs.submit("agreement", words, "--nodes=1")
    words = ["eval/report.py", "--results", results, "--out", f"{results}/report.md"]
    words += ["--runs", *(recipe.output for recipe in students)]
    jobs.submit("report", words, "--nodes=1", gpus=False)


def refuse(text: str) -> None:
    """Exit as for a user's mistake."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    if not Path(BATCH).is_file():
        refuse(f"call it from the root of the repository; found {os.getcwd()}")
    if len(sys.argv) < 3:
        refuse(f"wanted a folder of recipes and held-out rows:\n{__doc__.splitlines()[2]}")
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
