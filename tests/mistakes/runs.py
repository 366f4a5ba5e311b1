"""Bad surroundings of a run: output folders, earlier runs, disks, environments."""

import fcntl
import json
import os
from pathlib import Path

from mistakes.frame import Case

from kd.run.folder_lock import LOCK

DISTILL, SFT, CACHE = "train/distill.py", "train/sft.py", "train/cache_teacher.py"
FILE = {"taken": "a file, not a folder"}
HELD_OUT = {"eval_data": [{"path": "WORK/rows.jsonl"}], "eval_strategy": "epoch"}
SOURCE = "https://{}/rows.jsonl"


def finished(**recipe: object) -> dict[str, str]:
    """The files of a run of four steps that has finished, with these settings in its run.json."""
    state = {"global_step": 4, "max_steps": 4, "epoch": 1.0}
    return {
        "out/done.json": json.dumps({"train_loss": 1.0}),
        "out/trainer_state.json": json.dumps(state),
        "out/run.json": json.dumps({"recipe": {"max_steps": 4, "num_train_epochs": 3.0} | recipe}),
    }


def take_lock(here: Path) -> None:
    """Lock the output folder as another run would: this descriptor lives as long as the tests."""
    (here / "out").mkdir()
    file = os.open(here / "out" / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    owner = {"pid": 12, "host": "node7", "started": "at noon", "command": "train/sft.py --x 1"}
    os.write(file, json.dumps(owner).encode())


CASES: list[Case] = [
    Case(
        "output_dir is a file",
        DISTILL,
        "output_dir: HERE/taken is a file; wanted a folder",
        {"output_dir": "HERE/taken"},
        files=FILE,
    ),
    Case(
        "output_dir below a file",
        SFT,
        "output_dir: cannot write to HERE/taken/out (Not a directory)",
        {"output_dir": "HERE/taken/out"},
        files=FILE,
    ),
    Case(
        "folder of a running run",
        DISTILL,
        "HERE/out belongs to another run: process 12 on node7, started at noon: train/sft.py --x 1",
        prepare=take_lock,
    ),
    Case(
        "cache is a file",
        CACHE,
        "teacher_cache: HERE/taken is a file",
        {"teacher_cache": "HERE/taken"},
        files=FILE,
    ),
    Case(
        "row cache is a file",
        SFT,
        "data_cache: HERE/taken is a file",
        {"data_cache": "HERE/taken"},
        files=FILE,
    ),
    Case(
        "answers into a file",
        "train/generate.py",
        "output_dir: HERE/taken is a file",
        {"model": "WORK/teacher", "prompts": HELD_OUT["eval_data"], "output_dir": "HERE/taken"},
        files=FILE,
    ),
    Case(
        "results into a file",
        "eval/perplexity.py",
        "out_dir: HERE/taken is a file",
        {"models": "x=WORK/student", "data": HELD_OUT["eval_data"], "out_dir": "HERE/taken"},
        files=FILE,
    ),
    Case(
        "tracker not installed",
        SFT,
        "report_to: swanlab is not installed; run pip install swanlab",
        {"report_to": "swanlab"},
    ),
    Case("unknown tracker", SFT, "no tracker wandbb; did you mean wandb?", {"report_to": "wandbb"}),
    Case(
        "metric that is not logged",
        SFT,
        "does not measure eval_divergence; wanted one of eval_loss, eval_cross_entropy",
        HELD_OUT | {"metric_for_best_model": "eval_divergence"},
    ),
    Case(
        "worst instead of best",
        DISTILL,
        "greater_is_better: true by default, but of eval_divergence the lower value is better",
        HELD_OUT | {"metric_for_best_model": "eval_divergence"},
    ),
    Case(
        "evaluations without rows",
        SFT,
        "eval_strategy: epoch, but the recipe has no held-out rows",
        {"eval_strategy": "epoch"},
    ),
    Case(
        "finished with other settings",
        SFT,
        "learning_rate: found 0.5, wanted 5e-05",
        {"max_steps": 4},
        files=finished(learning_rate=0.5, seed=42),
        lines=2,
    ),
    Case(
        "finished and longer",
        SFT,
        "max_steps: found 4, wanted 3",
        {"max_steps": 3},
        files=finished(),
        lines=2,
    ),
    Case(
        "longer without a checkpoint",
        SFT,
        "has no checkpoint from which a longer one could go on",
        {"max_steps": 6},
        files=finished(),
    ),
    Case(
        "damaged run.json",
        SFT,
        "HERE/out/run.json: damaged, not JSON",
        {"max_steps": 4},
        files=finished() | {"out/run.json": '{"recipe": {'},
    ),
    Case(
        "damaged state of a run",
        SFT,
        "HERE/out/trainer_state.json: damaged, not JSON",
        {"max_steps": 6},
        files=finished() | {"out/trainer_state.json": ""},
    ),
    Case(
        "damaged record of an adapter",
        "train/merge.py",
        "HERE/adapter/run.json: found list, wanted an object",
        {"adapter": "HERE/adapter", "output_dir": "HERE/out"},
        files={
            "adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "b"}',
            "adapter/run.json": "[]",
        },
    ),
    Case(
        "damaged result",
        "eval/report.py",
        "HERE/results/perplexity/x.json: damaged, not JSON",
        {"results": "HERE/results", "out": "HERE/report.md"},
        files={"results/perplexity/x.json": '{"settings"'},
    ),
    Case("hub token", SFT, "hub_token: found a secret", {"hub_token": "a1b2c3"}),
    Case("API key", "eval/judge.py", "api_key: found a secret", tokens=("--api_key=a1b2c3",)),
    Case(
        "password in a URL",
        SFT,
        "https://***@host/rows.jsonl",
        {"data": [{"path": SOURCE.format("user:a1b2c3@host")}]},
    ),
    Case(
        "token in a recipe",
        SFT,
        "rows.jsonl?token=***",
        {"data": None},
        recipe=f"data: [{{path: '{SOURCE.format('host')}?token=a1b2c3'}}]\n",
    ),
    Case(
        "key instead of its variable",
        "train/generate.py",
        "key_variable: the environment has no variable of the given name",
        {
            "model": "m",
            "server": "http://localhost:1/v1",
            "prompts": [{"path": "WORK/rows.jsonl"}],
            "output_dir": "HERE/out",
            "key_variable": "a1b2c3",
        },
    ),
]
