"""All of a run that is settled before a model is loaded: settings, tokenizer, objective, rows, plan.

Every ValueError that can be raised early is raised here.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from kd.data.packing import check_packing
from kd.data.row_cache import RowSettings, TokenisedRows, tokenised_rows
from kd.data.show import shown_rows
from kd.data.sources import check_sources
from kd.data.template import writes_the_date
from kd.data.tokenizer import check_same_tokenizer, load_tokenizer, set_template_arguments
from kd.data.vocabularies import shared_vocabulary
from kd.distributed import print_rank0
from kd.losses.fused import Objective
from kd.losses.hidden import HiddenObjective, layer_map
from kd.models.frozen import base_model, check_teacher, teacher_tokenizer
from kd.models.inherit import inherited_pairs
from kd.models.load import check_attention
from kd.planning.activations import CannotTrace
from kd.planning.fitting import fit, fit_scoring, layout_of, present_machine
from kd.planning.layout import Layout, Plan
from kd.recipe import parse_json_object
from kd.run.run_record import earlier_plan, recipe_of
from kd.run.signals import STOPPED
from kd.settings.distillation import (
    OWN_BASE,
    DataSettings,
    ModelSettings,
    OnPolicySettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings
from kd.teachers.aligned_teacher import check_alignable, check_alignment
from kd.teachers.cache_files import TeacherCache
from kd.teachers.cached import Documents, open_cache
from kd.teachers.fingerprint import NO_HIDDEN_STATES, manifest_of
from kd.training.checkpoints.checkpoint import usable_checkpoint
from kd.training.checkpoints.same_run import check_same_rows, check_same_run, identify_run
from kd.training.on_policy import check_on_policy
from kd.training.overfit_check import check_rows


@dataclass
class Prepared:
    """A run that can be started."""

    settings: list  # the dataclasses of its recipe, with the dtype decided
    names: dict[str, str]  # of the model, which none of them holds
    model: ModelSettings
    tokenizer: PreTrainedTokenizerBase
    cache: TeacherCache | None
    teacher_tokenizer: PreTrainedTokenizerBase | None  # only where it is another one
    objective: Objective
    hidden: HiddenObjective | None
    rows: TokenisedRows
    eval_rows: TokenisedRows | None
    about: dict[str, Any]  # what the manifests of its checkpoints say of it
    checkpoint: str | None  # the one that it goes on from
    plan: Plan | None
    max_length: int

    @property
    def recipe(self) -> dict[str, Any]:
        return recipe_of(self.settings, self.names)


def prepare(
    name: str,
    model: ModelSettings,
    data: DataSettings,
    training: TrainingSettings,
    teacher: TeacherSettings | None,
    objective_settings: Objective | None,
    on_policy: OnPolicySettings | None = None,
) -> Prepared:
    check_sources(data.sources)
    check_sources(data.eval_sources)
    check_attention(model.attn_implementation)
    model = with_dtype(model, training)
    if teacher and on_policy:
        check_on_policy(on_policy, teacher, data)
    if teacher and teacher.align_tokenizers:
        check_alignable(teacher, objective_settings)
    if teacher and not teacher.teacher_cache:
        check_teacher(teacher, model)
    tokenizer, cache = shared_tokenizer(name, model, training, teacher, objective_settings)
    other = other_tokenizer(tokenizer, training, teacher)
    if data.packing:
        live = [base_model(teacher, name)] if teacher and not cache else []
        for model_name in [name, *live]:
            check_packing(AutoConfig.from_pretrained(model_name), model_name)
    objective, hidden = Objective(soft_weight=0.0), None
    if teacher and objective_settings:
        objective, hidden = objectives(objective_settings, name, base_model(teacher, name))
    parts = (model, data, training, teacher, objective_settings, on_policy)
    settings = [part for part in parts if part]
    names = {"student" if teacher else "model": name}
    about, checkpoint = resume_point(training, recipe_of(settings, names))
    rows, eval_rows = prepare_rows(data, tokenizer, training, other)
    if cache:
        for part, what in ((rows, "training"), (eval_rows, "held-out")):
            if part:
                cache.check(Documents([part]), f"{what} documents", tokenizer.decode)
    about["rows"] = rows.folder.name  # a hash of the files, the settings and the tokenizer
    if checkpoint:
        check_same_rows(checkpoint, about["rows"])
    if training.check:
        rows = rows.subset(check_rows(rows.lengths, training.global_batch_size))
    earlier = earlier_plan(training.output_dir) if checkpoint else None
    longest, pairs = rows.longest, len(hidden.layers) if hidden else 0
    machine = present_machine(training)
    if on_policy and on_policy.student_fraction:  # an answer may be longer than the one it replaces
        longest = min(longest + on_policy.max_new_tokens, data.max_length)
    layout = layout_of(
        name, longest, model, data, training, teacher, objective, pairs, machine, on_policy
    )
    plan = planned(layout, training, earlier)
    return Prepared(
        settings, names, model, tokenizer, cache, other, objective, hidden, rows, eval_rows, about,
        checkpoint, plan, data.max_length,
    )  # fmt: skip


def shared_tokenizer(
    name: str,
    model: ModelSettings,
    training: TrainingSettings,
    teacher: TeacherSettings | None,
    objective: Objective | None,
) -> tuple[PreTrainedTokenizerBase, TeacherCache | None]:
    """The tokenizer with the template that all of a run reads, and the cache where there is one."""
    tokenizer, cache = load_tokenizer(name, model.chat_template), None
    if teacher and teacher.teacher_cache:
        cache = open_cache(teacher, objective, model, tokenizer)
        print_rank0(f"teacher: {cache.tokens} scored tokens in {teacher.teacher_cache}, no model")
    elif teacher and teacher.teacher == OWN_BASE:
        print_rank0("teacher: the student without its adapters, on every process, in its type")
    elif teacher and not teacher.align_tokenizers:
        print_rank0(share_tokenizer(tokenizer, teacher_tokenizer(teacher.teacher)))
    set_template(tokenizer, model, training)
    return tokenizer, cache


def other_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingSettings,
    teacher: TeacherSettings | None,
) -> PreTrainedTokenizerBase | None:
    """That of a teacher to which rows are aligned; each model reads its own chat template."""
    if not teacher or not teacher.align_tokenizers:
        return None
    other = teacher_tokenizer(teacher.teacher)
    print_rank0(str(shared_vocabulary(tokenizer, other)))
    return other


def prepare_scoring(
    name: str,
    model_settings: ModelSettings,
    data: DataSettings,
    training: TrainingSettings,
    teacher_settings: TeacherSettings,
    objective_settings: Objective,
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
    if teacher_settings.align_tokenizers:
        check_alignable(teacher_settings, objective_settings)
    if teacher_settings.teacher == OWN_BASE:
        raise ValueError(
            "teacher: self; wanted a model to score with: give the student's own base by its name"
        )
    if objective_settings.hidden_weight:
        raise ValueError(NO_HIDDEN_STATES)
    tokenizer = load_tokenizer(name, model_settings.chat_template)
    print_rank0(share_tokenizer(tokenizer, load_tokenizer(teacher_settings.teacher)))
    manifest = manifest_of(teacher_settings, objective_settings, model_settings, tokenizer)
    set_template(tokenizer, model_settings, training)
    objective, _ = objectives(objective_settings, name, teacher_settings.teacher)
    documents = Documents([part for part in prepare_rows(data, tokenizer, training) if part])
    settings = with_dtype(model_settings, training)
    one = dataclasses.replace(teacher_settings, teacher_cache=None)
    longest, machine = int(documents.lengths.max()), present_machine(training)
    layout = layout_of(name, longest, settings, data, training, one, objective, 0, machine)
    layout = dataclasses.replace(layout, micro=training.max_per_device_train_batch_size)
    plan = told_once(training, fit_scoring, layout)
    if plan:
        print_rank0(str(plan))
    return settings, objective, tokenizer, manifest, documents


def resume_point(training: TrainingSettings, recipe: dict) -> tuple[dict, str | None]:
    """(what this run's manifests say of it, the checkpoint that it goes on from).

    Raises ValueError where there is one that belongs to another run.
    """
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = plugin.hf_ds_config.get_value("zero_optimization.stage") if plugin else None
    about = identify_run(training, recipe, stage)
    found = usable_checkpoint(training.output_dir)
    if training.process_index == 0:
        (Path(training.output_dir) / STOPPED).unlink(missing_ok=True)
    if not found:
        return about, None
    check_same_run(found[0], found[1], about)
    print_rank0(f"going on from {found[0]}")
    return about, found[0]


def planned(layout: Layout, training: TrainingSettings, earlier: dict | None) -> Plan | None:
    """The plan of this run, with its micro-batch settled. Raises ValueError where none fits.

    A run that goes on keeps its micro-batch, whatever else is using the memory now.
    """
    given = training.micro_batch_given
    if earlier:
        batch = {"micro": earlier["rows"], "accumulation": earlier["accumulation"]}
        layout, given = dataclasses.replace(layout, **batch), True
    plan = told_once(training, fit, layout, given)
    if plan is None:
        return None
    training.use_batch(plan.layout.micro, plan.layout.accumulation)
    print_rank0(str(plan))
    return plan


def told_once(training: TrainingSettings, plan: Callable[..., Plan], *what: Any) -> Plan | None:
    """plan(*what), whose ValueError rank 0 alone spells out; None for a model that is not planned."""
    try:
        return plan(*what)
    except CannotTrace as error:
        print_rank0(f"no plan of the memory: {error}")
        return None
    except ValueError:
        if training.process_index:
            raise ValueError("the run does not fit; rank 0 says why") from None
        raise


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
    settings: Objective, student: str, teacher: str
) -> tuple[Objective, HiddenObjective | None]:
    """The loss at the head, and the one between hidden states; of the models only configurations."""
    if not settings.hidden_weight:
        return settings, None
    configs = [AutoConfig.from_pretrained(name).get_text_config() for name in (student, teacher)]
    pairs = settings.hidden_layers or inherited_pairs(*configs)
    layers = layer_map(pairs, *(config.num_hidden_layers for config in configs))
    return settings, HiddenObjective(settings.hidden_weight, settings.hidden_loss, layers)


def set_template(
    tokenizer: PreTrainedTokenizerBase, model: ModelSettings, training: TrainingSettings
) -> None:
    """Student, teacher and whoever loads the saved tokenizer read this one template."""
    arguments = parse_json_object("template_arguments", model.template_arguments)
    set_template_arguments(tokenizer, arguments)
    template = tokenizer.chat_template
    if isinstance(template, str) and writes_the_date(template):
        print_rank0(
            "note: the chat template writes today's date into every conversation; "
            'template_arguments: {date_string: "26 Jul 2024"} makes it the same for ever',
        )


def prepare_rows(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingSettings,
    other: PreTrainedTokenizerBase | None = None,
) -> tuple[TokenisedRows, TokenisedRows | None]:
    """(training rows, held-out rows), each a list of documents a row.

    They are aligned to a teacher's `other` tokenizer where it has one.
    """

    def prepare(sources: list[dict], **sizes: int | None) -> TokenisedRows:
        settings = RowSettings(
            data.max_length, data.mixture_seed, data.on_bad_row, data.on_long_row, **sizes
        )
        progress = not training.disable_tqdm
        rows = tokenised_rows(
            sources, settings, tokenizer, data.data_cache, data.data_workers, progress, other
        )
        print_rank0(f"{rows.report}\ntokenised rows: {rows.folder}")
        note = other and check_alignment(rows.report.aligned, rows.report.targets)
        if note:
            print_rank0(note)
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
    print_rank0(shown_rows(rows, tokenizer, count))
