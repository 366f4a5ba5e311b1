"""Print the memory, time and disk space that a training run will need, without loading a model.

launch/2xa100.sh train/plan.py --config recipes/small/d_distill.yaml

Takes the recipe and the flags of train/sft.py or train/distill.py. Runs in one process and plans
for the processes and GPUs of the launch file, which need not be here (--gpu_memory_gb 40 for
smaller ones).
"""

import json
from pathlib import Path

from kd.planning.plan_recipe import parse_plan, planned_rates
from kd.run.exit import run


def main() -> None:
    settings, recipe, machine = parse_plan(description=__doc__)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.planning.choices import choose, lines
    from kd.planning.disk import describe_disk, disk_bytes
    from kd.planning.fitting import fit, layout_of
    from kd.planning.run_length import count_rows, describe_run
    from kd.planning.throughput import duration

    recipe = choose(recipe, machine, {})
    print(lines(recipe))
    training, data = recipe.training, recipe.data
    plan = fit(layout_of(recipe, data.max_length, machine), training.micro_batch_given)
    print(plan)
    time = duration(plan.layout, planned_rates(settings, training, machine))
    print(time)
    print(describe_run(training, time, settings.rows or count_rows(data)))
    disk = disk_bytes(plan.layout, training.save_total_limit or 1)
    print(describe_disk(disk))
    if settings.json:
        record = plan.record() | {"seconds a step": time.seconds, "disk": disk}
        Path(settings.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
