"""Load the models of a run, train the student, and save it."""

from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, set_seed

from kd.data.alignment import AlignedCollator
from kd.data.packing import Collator, padding_share
from kd.data.show import log_lengths
from kd.data.vocabularies import shared_vocabulary
from kd.distributed import barrier, print_rank0, rank
from kd.losses.hidden import add_projections
from kd.models.heads import causal_lm
from kd.models.layer_pairs import hidden_objective
from kd.models.load import load_trained, parameter_counts
from kd.run.finished import mark_done
from kd.settings.training import TrainingSettings
from kd.teachers.aligned_teacher import AlignedTeacher
from kd.teachers.cached import CachedCollator, CachedTeacher
from kd.teachers.live import LiveTeacher
from kd.training.checkpoints.checkpoint import open_to_umask
from kd.training.checkpoints.recut import remove_recut
from kd.training.longer_run import LongerRun
from kd.training.on_policy import OnPolicyRows
from kd.training.overfit_check import report_check
from kd.training.rollouts import RolloutGenerator
from kd.training.run_plan import Run
from kd.training.tensorboard import open_writer, write_hparams
from kd.training.trainer import DistillationTrainer

Teacher = LiveTeacher | CachedTeacher | AlignedTeacher


def load_student(run: Run) -> PreTrainedModel | PeftModel:
    """Load the model to train; its adapters start at random from the recipe's seed."""
    set_seed(run.recipe.training.seed)
    return load_trained(run.recipe.model_name, run.recipe.model, run.tokenizers.student)


def set_up_teacher(run: Run, student: nn.Module) -> Teacher:
    """Load the teacher, or open its cache; a hidden-state loss may add projections to the student.

    Raises ValueError for a teacher with a head that cannot be read.
    """
    recipe, tokenizers = run.recipe, run.tokenizers
    device = recipe.training.device
    if tokenizers.cache:
        return CachedTeacher(tokenizers.cache, device)
    teacher = LiveTeacher(recipe.teacher, recipe.model, device, student)
    if tokenizers.teacher:
        vocabulary = shared_vocabulary(tokenizers.student, tokenizers.teacher)
        return AlignedTeacher(teacher, vocabulary)
    hidden = hidden_objective(recipe)
    if hidden:
        set_seed(recipe.training.seed)  # loading draws a number of random values that varies
        add_projections(causal_lm(student), hidden, teacher.width)
    return teacher


def make_collator(run: Run) -> Collator | CachedCollator | AlignedCollator:
    """The collator of a run: rows to batches, with what the teacher needs."""
    tokenizers = run.tokenizers
    flat = run.recipe.model.attention == "flash_attention_2"
    collator = Collator(tokenizers.student.pad_token_id, flat=flat)
    if tokenizers.cache:
        return CachedCollator(collator, tokenizers.cache)
    if tokenizers.teacher:
        return AlignedCollator(collator, tokenizers.teacher.pad_token_id)
    return collator


def make_trainer(
    run: Run, student: nn.Module, teacher: Teacher | None = None
) -> DistillationTrainer:
    """The trainer of a run; without a teacher it fine-tunes on the text alone."""
    recipe, tokenizer, training = run.recipe, run.tokenizers.student, run.recipe.training
    collator, on_policy_rows = make_collator(run), None
    if recipe.generates_answers:
        generator = RolloutGenerator(causal_lm(student), recipe.on_policy, tokenizer)
        on_policy_rows = OnPolicyRows(recipe.on_policy, generator, collator, recipe.data.max_length)
    trainer = DistillationTrainer(
        model=student,
        args=training,
        train_dataset=run.rows.train,
        eval_dataset=run.rows.heldout,
        data_collator=collator,
        processing_class=tokenizer,
        objective=recipe.objective,
        vocab_size=len(tokenizer),
        teacher=teacher,
        hidden=hidden_objective(recipe),
        run_identity=run.resume.identity,
        work=run.work,
        on_policy_rows=on_policy_rows,
    )
    board = f"{training.output_dir}/tensorboard"
    open_writer(trainer, board, run.resume.checkpoint)
    first_start = not run.resume.checkpoint
    if rank() == 0 and first_start and "tensorboard" in training.report_to:
        log_lengths(run.rows.train, board)
    if run.resume.longer:
        trainer.add_callback(LongerRun())
    trainer.add_callback(RemovesRecut())
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStopping(training.early_stopping_patience))
    return trainer


def train(trainer: DistillationTrainer, run: Run) -> dict[str, float]:
    """Train to the end and return Trainer's metrics of the run.

    Raises `Stopped` if a signal ended the training early, with a checkpoint saved; ValueError for
    activations that overflow and for a loss that stays non-finite.
    """
    print_rank0(describe(trainer, run.recipe.training))
    result = trainer.train(resume_from_checkpoint=run.resume.checkpoint)
    state = trainer.state
    trainer.stop.raise_if_stopped(
        run.recipe.training.output_dir, state.global_step, state.max_steps
    )
    shares = trainer.metrics.mean_shares()
    if shares:
        print_rank0(shares_line(shares))
    return dict(result.metrics) | shares


def finish(trainer: DistillationTrainer, run: Run, metrics: dict[str, float]) -> None:
    """Collective: evaluate, save the model and mark the run as done; or report a `--check`.

    Raises ValueError if the run ended in steps without a finite loss, if a weight is not finite, or
    if the loss of a `--check` did not fall.
    """
    training = run.recipe.training
    trainer.non_finite.check_end()
    if training.check:
        print_rank0(report_check(trainer.state.log_history, metrics["train_runtime"]))
        return
    if run.rows.heldout:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()  # the report reads the training curve from it
    if rank() == 0:
        open_to_umask(Path(training.output_dir).glob("*.safetensors"))
        if "tensorboard" in training.report_to:
            write_hparams(f"{training.output_dir}/tensorboard", run.recipe.to_dict())
        mark_done(training.output_dir, metrics)
        print(f"saved to {training.output_dir}")


def shares_line(shares: dict[str, float]) -> str:
    """The line with the shares of the GPU's matrix rate that a training has reached."""
    texts = {
        "model_flop_utilization": "{:.1%} of the vendor's peak (6 N student + 2 N teacher a token)",
        "matrix_peak_share": "{:.1%} of the measured matrix rate, with all that was recomputed",
    }
    found = [text.format(shares[name]) for name, text in texts.items() if name in shares]
    return f"model FLOP utilization: {'; '.join(found)}"


def describe(trainer: DistillationTrainer, training: TrainingSettings) -> str:
    """The lines that let a reader check a run before it starts."""
    trained, total = parameter_counts(trainer.model)
    micro, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rows = trainer.train_dataset
    targets = sum(rows.targets) / len(rows)
    grouped = training.train_sampling_strategy == "group_by_length"
    flat = trainer.data_collator.flat  # one long row per micro-batch, without padding
    padding = 0.0 if flat else padding_share(rows.lengths, micro, grouped, steps)
    return (
        f"parameters: {trained:,} trained of {total:,}\n"
        f"rows per step: {training.global_batch_size} = {training.world_size} processes x {micro} "
        f"rows x {steps} accumulation; about {targets * training.global_batch_size:.0f} target "
        f"tokens\npadding: {padding:.0%} of a micro-batch\n"
        f"objective: {trainer.objective}"
        + (f"\nhidden states: {trainer.hidden}" if trainer.hidden else "")
        + (f"\n{trainer.on_policy_rows}" if trainer.on_policy_rows else "")
    )


class RemovesRecut(TrainerCallback):
    """Remove the checkpoint that was written for another number of ranks, once it is loaded."""

    def on_train_begin(self, args, state, control, **_) -> None:
        """Called when all ranks have loaded the checkpoint."""
        barrier()
        if rank() == 0:
            remove_recut(Path(args.output_dir))


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping of Transformers that keeps its patience counter when a run resumes."""

    def on_train_begin(self, args, state, control, **kw) -> None:
        """Restore the attributes that the last checkpoint saved."""
        super().on_train_begin(args, state, control, **kw)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        vars(self).update(saved.get("attributes", {}))
