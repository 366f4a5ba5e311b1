"""Plan the memory of a run, settle its micro-batch, and write its record."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.data.show import write_summary
from kd.distributed import print_rank0, rank
from kd.planning.activations import CannotTrace
from kd.planning.fitting import fit, fit_scoring, layout_of, rates_of, scoring_layout
from kd.planning.layout import Layout, Plan
from kd.planning.machine import present_machine
from kd.planning.model_sizes import student_tensors, teacher_tensors
from kd.planning.search import MICRO
from kd.planning.throughput import MatrixWork, matrix_work
from kd.run.finished import DONE
from kd.run.host_memory import keep_memory_flat
from kd.run.run_record import earlier_plan, write_record
from kd.settings.training import derive_batch
from kd.settings.training_recipe import Recipe
from kd.teachers.cached import Documents
from kd.training.downloads import download_weights
from kd.training.resume import ResumePoint
from kd.training.tokenizers import Tokenizers
from kd.training.training_rows import TrainingRows


@dataclass
class Run:
    """A training run that is ready to load its models."""

    recipe: Recipe
    tokenizers: Tokenizers
    rows: TrainingRows
    resume: ResumePoint
    plan: Plan | None  # None if the model cannot be traced
    work: MatrixWork | None  # None on a CPU, and without a plan


def plan_run(
    recipe: Recipe, tokenizers: Tokenizers, rows: TrainingRows, resume: ResumePoint
) -> Run:
    """Collective: choose the micro-batch for these rows, write run.json, fetch the weights.

    A resumed run keeps its micro-batch, whatever memory is free now, unless it has another number
    of processes. Raises ValueError with remedies if no micro-batch fits.
    """
    training = recipe.training
    longest = rows.train.longest
    if recipe.generates_answers:  # an answer can be longer than the one that it replaces
        longest = min(longest + recipe.on_policy.max_new_tokens, recipe.data.max_length)
    machine = present_machine(training)
    layout = layout_of(recipe, longest, machine)
    given = training.micro_batch_given
    earlier = earlier_plan(training.output_dir) if resume.checkpoint else None
    if earlier and earlier["processes"] == layout.processes:
        batch = {"micro": earlier["rows"], "accumulation": earlier["accumulation"]}
        layout, given = replace(layout, **batch), True
    if not given:  # shorter rows than max_length may have room for larger micro-batches
        most = training.max_per_device_train_batch_size
        micro, steps = derive_batch(training.global_batch_size, layout.processes, most)
        layout = replace(layout, micro=micro, accumulation=steps)
    plan = plan_or_none(fit, layout, given, rates_of(machine.file))
    if plan:
        if plan.layout.micro != training.per_device_train_batch_size and not given:
            recipe.chosen[MICRO] = f"the fastest that fits, with rows of at most {longest} tokens"
        training.use_batch(plan.layout.micro, plan.layout.accumulation)
        print_rank0(plan)
    if rank() == 0:
        (Path(training.output_dir) / DONE).unlink(missing_ok=True)  # of a shorter run
        write_record(training.output_dir, [recipe], recipe.chosen, plan and plan.record())
        write_summary(training.output_dir, rows.train, rows.heldout)
    download_weights(recipe)
    work = matrix_work(plan.layout, training.device, machine.file.tflops) if plan else None
    return Run(recipe, tokenizers, rows, resume, plan, work)


def plan_scoring(recipe: Recipe, documents: Documents) -> None:
    """Collective: print the memory plan of filling a teacher cache.

    Raises ValueError with remedies if the teacher does not fit.
    """
    training = recipe.training
    layout = scoring_layout(recipe, int(documents.lengths.max()), present_machine(training))
    plan = plan_or_none(fit_scoring, layout)
    if plan:
        print_rank0(plan)


def plan_or_none(make_plan: Callable[..., Plan], layout: Layout, *arguments: Any) -> Plan | None:
    """Call `make_plan` for a layout; return None, with a note, for a model that cannot be traced.

    Raises ValueError if the run does not fit; only rank 0 gives the details.
    """
    try:
        tensors = student_tensors(layout) + (teacher_tensors(layout) if layout.teacher else [])
        keep_memory_flat(layout.device, sum(tensor.bytes for tensor in tensors))
        return make_plan(layout, *arguments)
    except CannotTrace as error:
        print_rank0(f"no memory plan: {error}")
        return None
    except ValueError:
        if rank():
            raise ValueError("the run does not fit in memory; rank 0 gives the details") from None
        raise
