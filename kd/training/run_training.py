"""One training run from settings to a saved model: what train/sft.py and train/distill.py share."""

import shutil
from pathlib import Path

from transformers import EarlyStoppingCallback, set_seed

from kd.data.alignment import AlignedCollator
from kd.data.packing import Collator, padding_share
from kd.data.show import log_lengths, write_summary
from kd.data.vocabularies import shared_vocabulary
from kd.distributed import print_rank0
from kd.losses.hidden import add_projections
from kd.losses.objective import Objective
from kd.models.heads import causal_lm
from kd.models.load import load_trained, parameter_counts
from kd.planning.throughput import matrix_work
from kd.run.exit import is_done, mark_done
from kd.run.run_record import write_record
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    OnPolicySettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings
from kd.teachers.aligned_teacher import AlignedTeacher
from kd.teachers.cached import CachedCollator, CachedTeacher
from kd.teachers.live import LiveTeacher
from kd.training.checkpoints.checkpoint import open_to_umask
from kd.training.on_policy import OnPolicyRows
from kd.training.out_of_memory import names_what_to_change
from kd.training.overfit_check import report_check
from kd.training.preparation import Prepared, prepare
from kd.training.rollouts import RolloutGenerator
from kd.training.tensorboard import write_hparams, write_no_step_twice
from kd.training.trainer import DistillationTrainer


def train(
    name: str,
    model_settings: ModelSettings,
    data: DataSettings,
    training: TrainingSettings,
    teacher_settings: TeacherSettings | None = None,
    objective_settings: Objective | None = None,
    on_policy: OnPolicySettings | None = None,
) -> None:
    """Train the model `name`, resuming where an earlier run of the same command stopped.

    Raises ValueError for every mistake that can be seen before a model is loaded.
    """
    if training.check and training.process_index == 0:  # always anew
        shutil.rmtree(training.output_dir, ignore_errors=True)
    if is_done(training.output_dir):
        print_rank0(f"{training.output_dir} is finished already; remove it to train anew")
        return
    run = prepare(
        name, model_settings, data, training, teacher_settings, objective_settings, on_policy
    )
    if training.process_index == 0:
        plan = run.plan and run.plan.record()
        write_record(training.output_dir, run.settings, run.names, plan)
        write_summary(training.output_dir, run.rows, run.eval_rows)
    live = None if run.cache else teacher_settings
    with names_what_to_change(training, run.model, data.max_length, live, objective_settings):
        trainer = load_trainer(name, run, training, live, on_policy)
        print_rank0(describe(trainer, training))
        result = trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.stop.leave(training.output_dir, trainer.state.global_step, trainer.state.max_steps)
    if training.check:
        seconds = result.metrics["train_runtime"]
        print_rank0(report_check(trainer.state.log_history, seconds))
        return
    finish(trainer, run, training, dict(result.metrics))


def load_trainer(
    name: str,
    run: Prepared,
    training: TrainingSettings,
    live: TeacherSettings | None,
    on_policy: OnPolicySettings | None = None,
) -> DistillationTrainer:
    """The run's models in a trainer; `live` is the teacher that is loaded, if one is."""
    work = matrix_work(run.plan.layout, training.device) if run.plan else None
    set_seed(training.seed)
    model = load_trained(name, run.model, run.tokenizer)
    flat = run.model.attn_implementation == "flash_attention_2"
    teacher, collator = None, Collator(run.tokenizer.pad_token_id, flat=flat)
    if run.cache:
        teacher = CachedTeacher(run.cache, training.device)
        collator = CachedCollator(collator, run.cache)
    elif live:
        teacher = LiveTeacher(live, run.model, training.device, model)
    if run.teacher_tokenizer:
        teacher = AlignedTeacher(teacher, shared_vocabulary(run.tokenizer, run.teacher_tokenizer))
        collator = AlignedCollator(collator, run.teacher_tokenizer.pad_token_id)
    if run.hidden and teacher:
        set_seed(training.seed)  # how many numbers a teacher's loading draws depends on its kind
        add_projections(causal_lm(model), run.hidden, teacher.width)
    rows = None
    if on_policy and on_policy.student_fraction:
        writer = RolloutGenerator(causal_lm(model), on_policy, run.tokenizer)
        rows = OnPolicyRows(on_policy, writer, collator, run.max_length)
    trainer = DistillationTrainer(
        model=model,
        args=training,
        train_dataset=run.rows,
        eval_dataset=run.eval_rows,
        data_collator=collator,
        processing_class=run.tokenizer,
        objective=run.objective,
        vocabulary=len(run.tokenizer),
        teacher=teacher,
        hidden=run.hidden,
        about=run.about,
        work=work,
        on_policy_rows=rows,
    )
    board = f"{training.output_dir}/tensorboard"
    write_no_step_twice(trainer, board, run.checkpoint)
    if training.process_index == 0 and "tensorboard" in training.report_to:
        log_lengths(run.rows, board)
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStopping(training.early_stopping_patience))
    return trainer


def finish(
    trainer: DistillationTrainer, run: Prepared, training: TrainingSettings, metrics: dict
) -> None:
    """Last held-out figures, the model, the curves, and the mark that all is done."""
    if run.eval_rows:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()  # the training curve, for the report
    if training.process_index == 0:
        open_to_umask(Path(training.output_dir).glob("*.safetensors"))
        if "tensorboard" in training.report_to:
            write_hparams(f"{training.output_dir}/tensorboard", run.recipe, metrics)
        mark_done(training.output_dir, metrics)
        print(f"saved to {training.output_dir}")


def describe(trainer: DistillationTrainer, training: TrainingSettings) -> str:
    """The few lines that let a stranger check a run before it starts."""
    trained, total = parameter_counts(trainer.model)
    micro, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rows = trainer.train_dataset
    targets = sum(rows.targets) / len(rows)
    grouped = training.train_sampling_strategy == "group_by_length"
    flat = trainer.data_collator.flat  # then there is none
    padding = 0.0 if flat else padding_share(rows.lengths, micro, grouped, steps)
    return (
        f"parameters: {trained:,} trained of {total:,}\n"
        f"rows a step: {training.global_batch_size} = {training.world_size} processes x {micro} "
        f"rows x {steps} accumulation; about {targets * training.global_batch_size:.0f} target "
        f"tokens\npadding: {padding:.0%} of a micro-batch\n"
        f"objective: {trainer.objective}"
        + (f"\nhidden states: {trainer.hidden}" if trainer.hidden else "")
        + (f"\n{trainer.on_policy_rows}" if trainer.on_policy_rows else "")
    )


class EarlyStopping(EarlyStoppingCallback):
    """Transformers', which forgets how long it has been patient where a run goes on."""

    def on_train_begin(self, args, state, control, **kw) -> None:
        super().on_train_begin(args, state, control, **kw)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        vars(self).update(saved.get("attributes", {}))
