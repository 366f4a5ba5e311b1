"""lm-evaluation-harness as a library: its tasks, prompts and metrics, on models loaded here.

For local rows, the packaged task is included and only its data source is replaced, so that prompts
and metrics stay the published ones. lm_eval's docs/task_guide.md describes the task files.
"""

import hashlib
import json
import statistics
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from kd.distributed import all_gather, barrier, rank, world_size
from kd.evaluation.models import tokenizer_for
from kd.evaluation.results import describe_model, is_measured
from kd.evaluation.task_rows import check_rows
from kd.settings.evaluation import SPLITS, BenchmarkSettings, ModelSelection

TaskData = dict[str, dict[str, str]]  # {task: {split: file}}


class SharedModel(HFLM):
    """A loaded model whose requests are divided among the ranks.

    HFLM alone assumes that a loaded model belongs to a single process, and repeats all the work on
    every rank.
    """

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return rank()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Collective: stack tensors (N, K) of all ranks to (ranks, N, K), on the CPU."""
        if world_size() == 1:
            return tensor
        return torch.stack(all_gather(tensor.cpu()))

    def gather_object(self, obj: object, dst: int = 0) -> list | None:
        """Collective: return the objects of all ranks on rank `dst`, and None elsewhere."""
        found = all_gather(obj)
        return found if rank() == dst else None

    def barrier(self) -> None:
        """Collective: wait for all ranks."""
        barrier()


def missing_benchmarks(
    selection: ModelSelection, settings: BenchmarkSettings
) -> dict[str, dict[str, tuple[Path, dict]]]:
    """Return {model: {task: (file, description)}} of all results that are missing.

    Raises ValueError if apply_chat_template is set and a model has no chat template.
    """
    missing: dict[str, dict[str, tuple[Path, dict]]] = {}
    for name, path in selection.named_models.items():
        tokenizer = tokenizer_for(selection, path)
        if settings.apply_chat_template and tokenizer.chat_template is None:
            raise ValueError(f"{name}: {path} has no chat template; leave apply_chat_template out")
        for task in settings.tasks:
            description = describe_model(
                selection,
                path,
                tokenizer,
                task=task,
                task_files_hash=files_hash(settings.files, task),
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                lm_eval=version("lm_eval"),
                processes=world_size(),
            )
            file = Path(settings.out_dir) / "benchmarks" / task / f"{name}.json"
            if not is_measured(file, description):
                missing.setdefault(name, {})[task] = (file, description)
    return missing


def prepare_tasks(tasks: list[str], settings: BenchmarkSettings) -> TaskManager:
    """Collective: write the task files of local rows, and find all tasks.

    Raises ValueError for a task that lm_eval does not have, and for local rows that do not fit it.
    """
    folder = Path(settings.out_dir) / "benchmarks" / "task_files"
    local = {task: files for task, files in settings.files.items() if task in tasks}
    if rank() == 0:
        write_task_files(local, folder)
    barrier()
    manager = find_tasks(tasks, local, folder)
    for task, splits in local.items():
        check_rows(task, splits, manager, folder)
    return manager


def write_task_files(task_data: TaskData, folder: Path) -> None:
    """Write a task file for each task; `lm_eval --include_path FOLDER` gives the same results.

    Raises ValueError for a task that lm_eval does not have.
    """
    packaged = TaskManager().task_index
    for task, splits in task_data.items():
        if task not in packaged or packaged[task].yaml_path is None:
            raise ValueError(f"task_data: lm_eval {version('lm_eval')} has no task {task}")
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


def files_hash(task_data: TaskData, task: str) -> str | None:
    """Hash the contents of a task's local files; None for data of the hub."""
    if task not in task_data:
        return None
    contents = [Path(file).read_bytes() for _, file in sorted(task_data[task].items())]
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]


def find_tasks(tasks: list[str], task_data: TaskData, folder: Path) -> TaskManager:
    """Return a manager that knows the tasks of lm_eval and of `folder`.

    Raises ValueError for a task that neither has.
    """
    local = set(tasks) <= set(task_data)
    # lm_eval has thousands of task files; they are read only if a task needs them.
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
    model: SharedModel, task: str, manager: TaskManager, settings: BenchmarkSettings
) -> dict | None:
    """Collective: return the metrics and items of one task or group on rank 0, None elsewhere.

    Raises ValueError if a task has fewer documents than there are ranks.
    """
    limit = settings.limit
    if world_size() > 1:
        for name, found in manager.load([task])["tasks"].items():
            count = min(len(found.eval_docs), limit or len(found.eval_docs))
            if count < world_size():
                raise ValueError(
                    f"tasks: {name} has {count} documents for {world_size()} processes; wanted at "
                    "least one each: start fewer processes"
                )
    found = simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=settings.num_fewshot,
        limit=limit,
        apply_chat_template=settings.apply_chat_template,
        task_manager=manager,
    )
    if found is None:
        return None
    return {
        "tasks": {name: task_result(found, name) for name in found["samples"]},
        "groups": {n: numbers(r) for n, r in found.get("groups", {}).items()},
    }


def numbers(metrics: dict) -> dict[str, float]:
    """Return the numeric entries of lm_eval's metrics."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def task_result(found: dict, name: str) -> dict:
    """Return the metrics as lm_eval prints them, and every item's hash and values."""
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
        # Accuracy of random guessing; None if the task is not multiple choice.
        "chance": statistics.fmean(1 / len(s["arguments"]) for s in first) if choice else None,
        "items": {"hashes": [sample["doc_hash"] for sample in first], "values": values},
    }


def benchmark_text(name: str, result: dict) -> str:
    """Format the metrics of a result, one line for each task."""
    lines = []
    for task, found in result["tasks"].items():
        count = len(found["items"]["hashes"])
        metrics = {k: v for k, v in found["metrics"].items() if "_stderr" not in k}
        told = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        lines.append(f"{name}, {task}: {told} over {count} documents")
    return "\n".join(lines)
