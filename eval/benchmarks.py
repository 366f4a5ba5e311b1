"""Measure models on the tasks of lm-evaluation-harness, with its own prompts and metrics.

python eval/benchmarks.py --models parent=runs/parent student=runs/student \
    --tasks boolq winogrande piqa --out_dir results

A model is a hub name, a folder, or the folder of a LoRA adapter. The rows come from the hub, or
from local JSON lines with the same fields: --task_data '{"boolq": "boolq.jsonl"}'. The result of
each task and model is OUT_DIR/benchmarks/TASK/NAME.json, with the score of every document; a rerun
measures only missing results. With a launch file in front, the processes share the documents; tasks
with random few-shot examples then draw other examples.
"""

from kd.distributed import print_rank0, start_gloo
from kd.recipe import parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import BenchmarkSettings, ModelSelection


def main() -> None:
    selection, settings = parse(ModelSelection, BenchmarkSettings, description=__doc__)
    check_writable("out_dir", settings.out_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.harness import (
        SharedModel,
        benchmark_text,
        missing_benchmarks,
        prepare_tasks,
        run_task,
    )
    from kd.evaluation.models import model_for, tokenizer_for
    from kd.evaluation.results import write_result

    start_gloo()
    missing = missing_benchmarks(selection, settings)
    if not missing:
        return
    tasks = list(dict.fromkeys(task for files in missing.values() for task in files))
    manager = prepare_tasks(tasks, settings)
    for name, files in missing.items():
        path = selection.named_models[name]
        model = SharedModel(
            model_for(selection, path),
            tokenizer=tokenizer_for(selection, path),
            batch_size=selection.batch_size,
        )
        for task, (file, description) in files.items():
            result = run_task(model, task, manager, settings)
            if result:  # on rank 0
                write_result(file, description, result)
                print_rank0(f"{benchmark_text(name, result)}\nwrote {file}")
        del model  # free its memory before the next one is loaded


if __name__ == "__main__":
    run(main)
