"""One training run from settings to a saved model: what train/sft.py and train/distill.py share."""

import dataclasses
import functools
import shutil
from pathlib import Path

from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    set_seed,
)

from kd.data.cache import RowSettings, TokenisedRows, tokenised_rows
from kd.data.packing import Collator, check_packing, padding_share
from kd.data.show import log_lengths, shown_rows, write_summary
from kd.data.sources import check_sources
from kd.data.template import writes_the_date
from kd.losses.fused import Objective
from kd.losses.hidden import HiddenObjective, add_projections, layer_map
from kd.models.activations import CannotTrace
from kd.models.fitting import fit, layout_of, present_machine
from kd.models.heads import causal_lm
from kd.models.inherit import inherited_pairs
from kd.models.layout import Layout, Plan
from kd.models.load import check_attention, load_trained, parameter_counts
from kd.models.throughput import matrix_work
from kd.models.tokenizer import check_same_tokenizer, load_tokenizer, set_template_arguments
from kd.recipe import (
    OWN_BASE,
    DataSettings,
    ModelSettings,
    ObjectiveSettings,
    TeacherSettings,
    TrainingSettings,
    parse_json_object,
)
from kd.teachers.cached import CachedCollator, CachedTeacher, Documents, open_cache
from kd.teachers.fingerprint import NO_HIDDEN_STATES, manifest_of
from kd.teachers.live import LiveTeacher
from kd.teachers.load import base_model, check_teacher, teacher_tokenizer
from kd.training.check import check_rows, report_check
from kd.training.checkpoint import earlier_plan, recipe_of, write_record
from kd.training.exit import is_done, mark_done
from kd.training.out_of_memory import names_what_to_change
from kd.training.same_run import about_run, check_same_rows, check_same_run
from kd.training.saving import open_to_umask, usable_checkpoint
from kd.training.stopping import STOPPED
from kd.training.tensorboard import write_hparams, write_no_step_twice
from kd.training.trainer import DistillationTrainer


def train(
    name: str,
    model_settings: ModelSettings,
    data: DataSettings,
    training: TrainingSettings,
    teacher_settings: TeacherSettings | None = None,
    objective_settings: ObjectiveSettings | None = None,
) -> None:
    """Train the model `name`, resuming where an earlier run of the same command stopped.

    Raises ValueError for every mistake that can be seen before a model is loaded.
    """
    check_sources(data.sources)
    check_sources(data.eval_sources)
    check_attention(model_settings.attn_implementation)
    if training.check and training.process_index == 0:  # always anew
        shutil.rmtree(training.output_dir, ignore_errors=True)
    model_settings = with_dtype(model_settings, training)
    cached = teacher_settings and teacher_settings.teacher_cache
    if teacher_settings and not cached:
        check_teacher(teacher_settings, model_settings)
    if is_done(training.output_dir):
        say(training, f"{training.output_dir} is finished already; remove it to train anew")
        return
    tokenizer = load_tokenizer(name, model_settings.chat_template)
    cache = None
    if cached:
        cache = open_cache(teacher_settings, objective_settings, model_settings, tokenizer)
        say(training, f"teacher: {cache.tokens} scored tokens in {cached}, no model")
    elif teacher_settings and teacher_settings.teacher == OWN_BASE:
        say(training, "teacher: the student without its adapters, on every process, in its type")
    elif teacher_settings:
        note = share_tokenizer(tokenizer, teacher_tokenizer(teacher_settings.teacher))
        say(training, note)
    set_template(tokenizer, model_settings, training)
    if data.packing:
        live = [base_model(teacher_settings, name)] if teacher_settings and not cache else []
        for model_name in [name, *live]:
            check_packing(AutoConfig.from_pretrained(model_name), model_name)
    objective, hidden = Objective(), None
    if teacher_settings and objective_settings:
        objective, hidden = objectives(objective_settings, name, base_model(teacher_settings, name))
    settings = [model_settings, data, training, teacher_settings, objective_settings]
    names = {"student" if teacher_settings else "model": name}
    about, checkpoint = resume_point(training, recipe_of([s for s in settings if s], names))
    rows, eval_rows = prepare_rows(data, tokenizer, training)
    if cache:
        for prepared, what in ((rows, "training"), (eval_rows, "held-out")):
            if prepared:
                cache.check(Documents([prepared]), f"{what} documents", tokenizer.decode)
    about["rows"] = rows.folder.name  # a hash of the files, the settings and the tokenizer
    if checkpoint:
        check_same_rows(checkpoint, about["rows"])
    if training.check:
        rows = rows.subset(check_rows(rows.lengths, training.global_batch_size))
    earlier = earlier_plan(training.output_dir) if checkpoint else None  # rank 0 writes a new one
    longest = max(rows.lengths)
    pairs = len(hidden.layers) if hidden else 0
    layout = layout_of(
        name,
        longest,
        model_settings,
        data,
        training,
        teacher_settings,
        objective,
        pairs,
        present_machine(training),
    )
    plan = planned(layout, training, earlier)
    if training.process_index == 0:
        write_record(training.output_dir, [s for s in settings if s], names, plan and plan.record())
        write_summary(training.output_dir, rows, eval_rows)

    work = matrix_work(plan.layout, training.device) if plan else None
    set_seed(training.seed)
    needs = (None if cache else teacher_settings, objective_settings)
    explained = functools.partial(
        names_what_to_change, training, model_settings, data.max_length, *needs
    )
    with explained():
        model = load_trained(name, model_settings, tokenizer)
    flat = model_settings.attn_implementation == "flash_attention_2"
    teacher, collator = None, Collator(tokenizer.pad_token_id, flat=flat)
    if cache:
        teacher = CachedTeacher(cache, training.device)
        collator = CachedCollator(collator, cache)
    elif teacher_settings:
        with explained():
            teacher = LiveTeacher(teacher_settings, model_settings, training.device, model)
    if hidden and teacher:
        add_projections(causal_lm(model), hidden, teacher.width)
    trainer = DistillationTrainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=tokenizer,
        objective=objective,
        vocabulary=len(tokenizer),
        teacher=teacher,
        hidden=hidden,
        about=about,
        work=work,
    )
    write_no_step_twice(trainer, f"{training.output_dir}/tensorboard", checkpoint)
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStopping(training.early_stopping_patience))
    say(training, describe(trainer, training))
    if training.process_index == 0 and "tensorboard" in training.report_to:
        log_lengths(rows, f"{training.output_dir}/tensorboard")
    with explained():
        result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.stop.leave(training.output_dir, trainer.state.global_step, trainer.state.max_steps)
    metrics = dict(result.metrics)
    if training.check:
        say(training, report_check(trainer.state.log_history, metrics["train_runtime"]))
        return
    if eval_rows:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()  # the training curve, for the report
    if training.process_index == 0:
        open_to_umask(Path(training.output_dir).glob("*.safetensors"))
        if "tensorboard" in training.report_to:
            recipe = recipe_of([s for s in settings if s], names)
            write_hparams(f"{training.output_dir}/tensorboard", recipe, metrics)
        mark_done(training.output_dir, metrics)
        print(f"saved to {training.output_dir}")


def prepare_scoring(
    name: str,
    model_settings: ModelSettings,
    data: DataSettings,
    training: TrainingSettings,
    teacher_settings: TeacherSettings,
    objective_settings: ObjectiveSettings,
) -> tuple[ModelSettings, Objective, PreTrainedTokenizerBase, dict, Documents]:
    """(settings, objective, tokenizer, manifest, documents) for train/cache_teacher.py.

    The documents are those that `train` will ask a cache for, held-out ones included. Raises
    ValueError for every mistake that can be seen before a model is loaded.
    """
    check_sources(data.sources)
    check_sources(data.eval_sources)
    for key in ("teacher", "teacher_cache"):
        if not getattr(teacher_settings, key):
            raise ValueError(f"{key}: not given; wanted the teacher, and the folder to fill")
    if objective_settings.hidden_weight:
        raise ValueError(NO_HIDDEN_STATES)
    tokenizer = load_tokenizer(name, model_settings.chat_template)
    say(training, share_tokenizer(tokenizer, load_tokenizer(teacher_settings.teacher)))
    manifest = manifest_of(teacher_settings, objective_settings, model_settings, tokenizer)
    set_template(tokenizer, model_settings, training)
    objective, _ = objectives(objective_settings, name, teacher_settings.teacher)
    rows = [part for part in prepare_rows(data, tokenizer, training) if part]
    settings = with_dtype(model_settings, training)
    return settings, objective, tokenizer, manifest, Documents(rows)


def resume_point(training: TrainingSettings, recipe: dict) -> tuple[dict, str | None]:
    """(what this run's manifests say of it, the checkpoint that it goes on from).

    Raises ValueError where there is one that belongs to another run.
    """
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = plugin.hf_ds_config.get_value("zero_optimization.stage") if plugin else None
    about = about_run(training, recipe, stage)
    found = usable_checkpoint(training.output_dir)
    if training.process_index == 0:
        (Path(training.output_dir) / STOPPED).unlink(missing_ok=True)
    if not found:
        return about, None
    check_same_run(found[0], found[1], about)
    say(training, f"going on from {found[0]}")
    return about, found[0]


def planned(layout: Layout, training: TrainingSettings, earlier: dict | None) -> Plan | None:
    """The plan of this run, with its micro-batch settled. Raises ValueError where none fits.

    A run that goes on keeps its micro-batch, whatever else is using the memory now.
    """
    given = training.micro_batch_given
    if earlier:
        batch = {"micro": earlier["rows"], "accumulation": earlier["accumulation"]}
        layout, given = dataclasses.replace(layout, **batch), True
    try:
        plan = fit(layout, given)
    except CannotTrace as error:
        say(training, f"no plan of the memory: {error}")
        return None
    except ValueError:
        if training.process_index:
            raise ValueError("the run does not fit; rank 0 says why") from None
        raise
    training.use_batch(plan.layout.micro, plan.layout.accumulation)
    say(training, str(plan))
    return plan


def with_dtype(
    model: ModelSettings, training: TrainingSettings, deepspeed: bool | None = None
) -> ModelSettings:
    """The settings with `dtype: auto` decided by the precision of the launch profile.

    Without `deepspeed` it is what this process was started with.
    Raises ValueError where weight updates would round to nothing without a word.
    """
    if deepspeed is None:
        deepspeed = getattr(training, "deepspeed_plugin", None) is not None
    no_copy = not model.lora_rank and not deepspeed  # DeepSpeed keeps float32 copies, DDP does not
    dtype = model.dtype
    if dtype == "auto":
        half = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
        dtype = "float32" if no_copy else half
    if no_copy and dtype != "float32":
        raise ValueError(
            f"dtype: {dtype} with every weight trained and no DeepSpeed: small updates round to "
            "nothing, since no float32 copy is kept; set dtype: float32 (bf16: true still computes "
            "in bfloat16), or set lora_rank"
        )
    return dataclasses.replace(model, dtype=dtype)


def share_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Refuse different vocabularies; say whose chat template both models read."""
    check_same_tokenizer(teacher, student)
    if student.chat_template is None:
        student.chat_template = teacher.chat_template
        return "chat template: the teacher's, since the student has none"
    same = student.chat_template == teacher.chat_template
    other = ", equal to the teacher's" if same else "; the teacher's own is another one"
    return f"chat template: the student's{other}"


def objectives(
    settings: ObjectiveSettings, student: str, teacher: str
) -> tuple[Objective, HiddenObjective | None]:
    """The loss at the head, and the one between hidden states; of the models only configurations."""
    names = {field.name for field in dataclasses.fields(Objective)}
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k in names}
    if not settings.hidden_weight:
        return Objective(**values), None
    configs = [AutoConfig.from_pretrained(name).get_text_config() for name in (student, teacher)]
    pairs = settings.hidden_layers or inherited_pairs(*configs)
    layers = layer_map(pairs, *(config.num_hidden_layers for config in configs))
    return Objective(**values), HiddenObjective(
        settings.hidden_weight, settings.hidden_loss, layers
    )


def set_template(
    tokenizer: PreTrainedTokenizerBase, model: ModelSettings, training: TrainingSettings
) -> None:
    """Student, teacher and whoever loads the saved tokenizer read this one template."""
    arguments = parse_json_object("template_arguments", model.template_arguments)
    set_template_arguments(tokenizer, arguments)
    template = tokenizer.chat_template
    if isinstance(template, str) and writes_the_date(template):
        say(
            training,
            "note: the chat template writes today's date into every conversation; "
            'template_arguments: {date_string: "26 Jul 2024"} makes it the same for ever',
        )


def prepare_rows(
    data: DataSettings, tokenizer: PreTrainedTokenizerBase, training: TrainingSettings
) -> tuple[TokenisedRows, TokenisedRows | None]:
    """(training rows, held-out rows), each a list of documents a row."""

    def prepare(sources: list[dict], **sizes: int | None) -> TokenisedRows:
        settings = RowSettings(
            data.max_length, data.mixture_seed, data.on_bad_row, data.on_long_row, **sizes
        )
        progress = not training.disable_tqdm
        rows = tokenised_rows(
            sources, settings, tokenizer, data.data_cache, data.data_workers, progress
        )
        say(training, f"{rows.report}\ntokenised rows: {rows.folder}")
        return rows

    rows = prepare(data.sources, mixture_rows=data.mixture_rows, train_rows=data.train_rows)
    rows = rows.packed(data.max_length) if data.packing else rows
    return rows, prepare(data.eval_sources) if data.eval_sources else None


def show_rows(
    count: int, name: str, model: ModelSettings, data: DataSettings, training: TrainingSettings
) -> None:
    """Print rows as training would read them; no model is loaded."""
    tokenizer = load_tokenizer(name, model.chat_template)
    set_template(tokenizer, model, training)
    rows, _ = prepare_rows(data, tokenizer, training)
    say(training, shown_rows(rows, tokenizer, count))


def describe(trainer: DistillationTrainer, training: TrainingSettings) -> str:
    """The few lines that let a stranger check a run before it starts."""
    trained, total = parameter_counts(trainer.model)
    micro, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rows = trainer.train_dataset
    targets = sum(rows.targets) / len(rows)
    grouped = training.train_sampling_strategy == "group_by_length"
    flat = trainer.data_collator.flat  # then there is none
    padding = 0.0 if flat else padding_share(rows.lengths, micro, grouped)
    return (
        f"parameters: {trained:,} trained of {total:,}\n"
        f"rows a step: {training.global_batch_size} = {training.world_size} processes x {micro} "
        f"rows x {steps} accumulation; about {targets * training.global_batch_size:.0f} target "
        f"tokens\npadding: {padding:.0%} of a micro-batch\n"
        f"objective: {trainer.objective}"
        + (f"\nhidden states: {trainer.hidden}" if trainer.hidden else "")
    )


class EarlyStopping(EarlyStoppingCallback):
    """Transformers', which forgets how long it has been patient where a run goes on."""

    def on_train_begin(self, args, state, control, **kw) -> None:
        super().on_train_begin(args, state, control, **kw)
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        vars(self).update(saved.get("attributes", {}))


def say(training: TrainingSettings, text: str) -> None:
    if training.process_index == 0:
        print(text, flush=True)
