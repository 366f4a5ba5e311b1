"""Measure models on the tasks of lm-evaluation-harness, with its own prompts and metrics.

python eval/benchmarks.py --models parent=runs/parent student=runs/student \
    --tasks boolq winogrande piqa --out_dir results

A model is a hub name, a folder, or a LoRA adapter's folder. The data comes from the hub, or with
--task_data '{"boolq": "boolq.jsonl"}' from JSON lines with the fields that the task's rows have
there. One file a task and model, OUT_DIR/benchmarks/TASK/NAME.json, with the score of every item; a
rerun measures what is missing. `launch/PROFILE.sh eval/benchmarks.py ...` shares the documents
between processes; where a task draws worked examples, it draws others then.
"""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from kd.distributed import barrier, print_rank0, rank, start_gloo, world_size
from kd.evaluation.harness import (
    SharedModel,
    check_task_data,
    files_hash,
    find_tasks,
    run_task,
    write_task_files,
)
from kd.evaluation.models import ModelSelection
from kd.evaluation.results import describe_model, is_measured, write_result
from kd.recipe import parse, setting
from kd.run.exit import run


@dataclass
class BenchmarkSettings:
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "tasks or groups of lm_eval: boolq piqa ..."}
    )
    task_data: str | None = setting(
        None, "JSON {task: file, or {split: file}} of local rows, in place of the hub's"
    )
    num_fewshot: int | None = setting(None, "worked examples before a question; the task's own")
    limit: int | None = setting(None, "only the first documents of each task (a trial run)")
    apply_chat_template: bool = setting(False, "ask in the chat template; other numbers without")
    out_dir: str = setting("results", "folder of the results; benchmarks/TASK/NAME.json in it")

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: none given; wanted names such as boolq winogrande piqa")
        try:
            self.files = json.loads(self.task_data or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"task_data: not JSON ({error}): {self.task_data}") from error
        check_task_data(self.files)


def main() -> None:
    selection, settings = parse(ModelSelection, BenchmarkSettings, description=__doc__)
    folder = Path(settings.out_dir) / "benchmarks" / "task_files"
    start_gloo()
    wanted = missing_results(selection, settings)
    if not wanted:
        return
    tasks = list(dict.fromkeys(task for files in wanted.values() for task in files))
    local = {task: files for task, files in settings.files.items() if task in tasks}
    if rank() == 0:
        write_task_files(local, folder)
    barrier()
    manager = find_tasks(tasks, local, folder)
    for name, files in wanted.items():
        path = selection.named_models[name]
        model = SharedModel(
            selection.load(path),
            tokenizer=selection.tokenizer(path),
            batch_size=selection.batch_size,
        )
        for task, (file, description) in files.items():
            result = run_task(
                model,
                task,
                manager,
                settings.num_fewshot,
                settings.limit,
                settings.apply_chat_template,
            )
            if result:
                write_result(file, description, result)
                show(name, result, file)
        del model  # before the next one is loaded


def missing_results(
    selection: ModelSelection, settings: BenchmarkSettings
) -> dict[str, dict[str, tuple[Path, dict]]]:
    """{model: {task: (file, description)}} of what was not measured like this yet."""
    wanted: dict[str, dict[str, tuple[Path, dict]]] = {}
    for name, path in selection.named_models.items():
        tokenizer = selection.tokenizer(path)
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
                wanted.setdefault(name, {})[task] = (file, description)
    return wanted


def show(name: str, result: dict, file: Path) -> None:
    for task, found in result["tasks"].items():
        count = len(found["items"]["hashes"])
        metrics = {k: v for k, v in found["metrics"].items() if "_stderr" not in k}
        told = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
        print_rank0(f"{name}, {task}: {told} over {count} documents")
    print_rank0(f"wrote {file}")


if __name__ == "__main__":
    run(main)
