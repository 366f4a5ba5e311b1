"""lm-evaluation-harness as a library: its tasks, prompts and metrics, on models that we load.

Local files: the packaged task with nothing replaced but where its rows come from, so prompts and
metrics stay the published ones. What a task file may say is in lm_eval's docs/task_guide.md.
"""

import hashlib
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from kd.distributed import barrier, rank, world_size

SPLITS = ("train", "validation", "test")


class SharedModel(HFLM):
    """A loaded model whose requests are divided among the processes.

    HFLM itself takes a loaded model for the only process, and would let each do all the work.
    """

    @property
    def rank(self) -> int:
        return rank()

    @property
    def world_size(self) -> int:
        return world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        if world_size() == 1:
            return tensor
        parts = [torch.zeros_like(tensor, device="cpu") for _ in range(world_size())]
        dist.all_gather(parts, tensor.cpu())
        return torch.stack(parts)

    def gather_object(self, obj: object, dst: int = 0) -> list | None:
        if world_size() == 1:
            return [obj]
        found = [None] * world_size() if dst == rank() else None
        dist.gather_object(obj, found, dst)
        return found

    def barrier(self) -> None:
        barrier()


def check_task_data(task_data: dict[str, str | dict[str, str]]) -> None:
    """Raise ValueError where a file is missing, or a split has another name."""
    for task, files in task_data.items():
        for split, file in as_splits(files).items():
            if split not in SPLITS:
                raise ValueError(f"task_data: {task}: split {split}; wanted {', '.join(SPLITS)}")
            if not Path(file).is_file():
                raise ValueError(f"task_data: {task}: no file {file}; wanted JSON lines")


def as_splits(files: str | dict[str, str]) -> dict[str, str]:
    return {"test": files} if isinstance(files, str) else files


def write_task_files(task_data: dict[str, str | dict[str, str]], folder: Path) -> None:
    """One task file each in `folder`, with which `lm_eval --include_path` does the same.

    Raises ValueError for a task that the package does not have.
    """
    packaged = TaskManager().task_index
    for task, files in task_data.items():
        if task not in packaged or packaged[task].yaml_path is None:
            raise ValueError(f"task_data: lm_eval {version('lm_eval')} has no task {task}")
        splits = as_splits(files)
        override = {
            "include": str(packaged[task].yaml_path),
            "task": task,
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {s: str(Path(f).resolve()) for s, f in splits.items()}
            },
            "training_split": "train" if "train" in splits else None,
            "validation_split": "validation" if "validation" in splits else None,
            "test_split": "test" if "test" in splits else None,
            "fewshot_split": next(split for split in SPLITS if split in splits),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{task}.yaml").write_text(json.dumps(override, indent=1) + "\n")


def files_hash(task_data: dict[str, str | dict[str, str]], task: str) -> str | None:
    """Of the contents of a task's local files; None for data of the hub."""
    if task not in task_data:
        return None
    contents = [Path(file).read_bytes() for _, file in sorted(as_splits(task_data[task]).items())]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def find_tasks(tasks: list[str], task_data: dict, folder: Path) -> TaskManager:
    """Raises ValueError for a task that neither the package nor `folder` has."""
    local = set(tasks) <= set(task_data)
    # The package has thousands of files: not read where none is needed.
    include = str(folder) if task_data else None
    manager = TaskManager(include_path=include, include_defaults=not local)
    missing = [task for task in tasks if task not in manager.all_tasks]
    if missing:
        raise ValueError(
            f"tasks: lm_eval {version('lm_eval')} has no {', '.join(missing)}; `lm_eval ls tasks` "
            "lists them"
        )
    return manager


def run_task(
    model: SharedModel,
    task: str,
    manager: TaskManager,
    num_fewshot: int | None,
    limit: int | None,
    chat_template: bool,
) -> dict | None:
    """Metrics and items of one task or group; None but in the first process.

    Raises ValueError where there are fewer documents than processes.
    """
    if world_size() > 1:
        for name, found in manager.load([task])["tasks"].items():
            count = min(len(found.eval_docs), limit or len(found.eval_docs))
            if count < world_size():
                raise ValueError(
                    f"tasks: {name} has {count} documents for {world_size()} processes; wanted one "
                    "for each: start fewer"
                )
    found = simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat_template,
        task_manager=manager,
    )
    if found is None:
        return None
    return {
        "tasks": {name: task_result(found, name) for name in found["samples"]},
        "groups": {n: numbers(r) for n, r in found.get("groups", {}).items()},
    }


def numbers(metrics: dict) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def task_result(found: dict, name: str) -> dict:
    """{"metrics": as lm_eval prints them, "items": {"hashes", "values": {metric: one an item}}}."""
    samples = sorted(found["samples"][name], key=lambda s: (s["filter"], s["doc_id"]))
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    first = [sample for sample in samples if sample["filter"] == filters[0]]
    values = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                key = f"{metric},{sample['filter']}"
                values.setdefault(key, []).append(float(sample[metric]))
    config = found["configs"][name]
    choice = config["output_type"] == "multiple_choice"
    return {
        "metrics": numbers(found["results"][name]),
        "version": found["versions"][name],
        "num_fewshot": found["n-shot"][name],
        # What guessing would score; None where there is nothing to choose from.
        "chance": statistics.fmean(1 / len(s["arguments"]) for s in first) if choice else None,
        "items": {"hashes": [sample["doc_hash"] for sample in first], "values": values},
    }
