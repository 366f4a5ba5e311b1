"""The keys of a recipe, and the one parser for recipe files and command-line flags.

Precedence: dataclass default < recipe < launch profile < command line. The recipe is spelt as
command-line tokens and put in front of the others, so that both have the same validation.
"""

import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
]


CHECK_STEPS, CHECK_RATE = 10, 5  # of --check; the rate multiplies learning_rate
OWN_BASE = "self"  # the teacher that is the student with its adapters off


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its line of `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelSettings:
    """How the trained model is loaded and which of its weights are trained."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "type of the weights; auto: that of bf16 / fp16, where no float32 copy is needed"
    )
    quantization: Literal["none", "nf4"] = setting(
        "none", "nf4: the frozen base in 4 bits (QLoRA); needs lora_rank"
    )
    lora_rank: int = setting(0, "rank of the LoRA adapters; 0 trains every weight")
    lora_alpha: float = setting(16.0, "scale of the adapters' product, divided by lora_rank")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "modules with adapters; all-linear: every Linear but the head"},
    )
    train_template_tokens: bool = setting(
        False, "with LoRA, also train the embeddings of the chat template's special tokens"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "attention of student and teacher"
    )
    chat_template: str | None = setting(
        None, "file with a Jinja chat template, in place of the tokenizer's own"
    )
    template_arguments: str | None = setting(
        None, "variables of the template, such as {enable_thinking: false}; saved with the model"
    )

    def __post_init__(self) -> None:
        if self.quantization != "none" and not self.lora_rank:
            raise ValueError(
                f"quantization: {self.quantization} with lora_rank: 0. Four-bit weights cannot be "
                "trained: set lora_rank (16, say), or quantization: none"
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank: {self.lora_rank}; wanted 0 (train all) or more")
        if self.train_template_tokens and not self.lora_rank:
            raise ValueError(
                "train_template_tokens: true with lora_rank: 0. Full training trains every "
                "embedding already: remove the key, or set lora_rank"
            )
        require_file("chat_template", self.chat_template)
        parse_json_object("template_arguments", self.template_arguments)


@dataclass
class DataSettings:
    """What is trained on; see `kd.data.sources` for the keys of one source."""

    data: str = setting("", "JSON list of sources: [{path, split, count, columns, ...}, ...]")
    eval_data: str | None = setting(None, "the same for the held-out rows")
    max_length: int = setting(1024, "tokens a row at most")
    on_long_row: Literal["cut", "cut_left", "drop"] = setting(
        "cut", "a longer row keeps its first tokens, or its last, or is dropped; all are counted"
    )
    on_bad_row: Literal["error", "drop"] = setting(
        "error", "a row that cannot be read: stop with its file and line, or drop and count it"
    )
    packing: bool = setting(False, "several documents a row, no attention between them")
    mixture_seed: int = setting(
        0, "draws the rows of every source; apart from `seed`, so that seeds share their rows"
    )
    mixture_rows: int | None = setting(
        None, "rows of all sources with a weight together; without: as many as never repeat one"
    )
    train_rows: int | None = setting(
        None, "so many rows of the mixture, of each source its share (a trial run)"
    )
    data_cache: str = setting("runs/cache", "folder of tokenised rows, which all runs may share")
    data_workers: int = setting(0, "processes that tokenise; 0: one for each core")

    def __post_init__(self) -> None:
        self.sources = parse_json_list("data", self.data)
        self.eval_sources = parse_json_list("eval_data", self.eval_data)
        if not self.sources:
            raise ValueError("data: no source given; wanted a list such as [{path: rows.jsonl}]")
        if self.max_length < 2:
            raise ValueError(f"max_length: {self.max_length}; wanted 2 or more")
        for key in ("mixture_rows", "train_rows"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted 1 or more")
        if self.data_workers < 0:
            raise ValueError(f"data_workers: {self.data_workers}; wanted 0 (all cores) or more")


@dataclass
class ObjectiveSettings:
    """loss = soft_weight * divergence + (1 - soft_weight) * cross-entropy, a target token."""

    divergence: Divergence = setting("forward_kl", "between teacher and student distributions")
    soft_weight: float = setting(1.0, "1: divergence alone (distill); 0: cross-entropy alone (sft)")
    temperature: float = setting(1.0, "divides both models' logits in the divergence")
    temperature_squared: bool = setting(
        False, "multiply the divergence (value and gradient) by temperature^2, as Hinton (2015)"
    )
    jensen_shannon_weight: float = setting(
        0.5, "the teacher's share of the mixture in jensen_shannon; 0.5 is the symmetric one"
    )
    skew: float = setting(
        0.1, "share of the first distribution in the mixture of skew_forward_kl, skew_reverse_kl"
    )
    loss_workspace_mb: int = setting(
        512, "MiB of a device for the loss's logits; its tiles of tokens are cut to fit"
    )
    hidden_weight: float = setting(0.0, "of the loss between hidden states; 0: none")
    hidden_loss: Literal["cosine", "mse"] = setting("cosine", "between hidden states of the map")
    hidden_layers: list[str] | None = setting(
        None,
        "student:teacher pairs, 0 the embeddings; without: all blocks, to those that an inherited "
        "student's were, else to evenly spaced ones",
    )

    def __post_init__(self) -> None:
        if self.hidden_weight < 0.0:
            raise ValueError(f"hidden_weight: {self.hidden_weight}; wanted 0 or more")
        if not 0.0 <= self.soft_weight <= 1.0:
            raise ValueError(f"soft_weight: {self.soft_weight}; wanted 0 to 1")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature: {self.temperature}; wanted more than 0")
        for key in ("jensen_shannon_weight", "skew"):
            if not 0.0 < getattr(self, key) < 1.0:
                raise ValueError(
                    f"{key}: {getattr(self, key)}; wanted more than 0 and less than 1 "
                    "(divergence: forward_kl or reverse_kl for the ends)"
                )
        if self.loss_workspace_mb < 128:
            raise ValueError(f"loss_workspace_mb: {self.loss_workspace_mb}; wanted 128 or more")


@dataclass
class OnPolicySettings:
    """Rows of a step that the student answers itself; kd/training/on_policy.py says how they count."""

    student_fraction: float = setting(
        0.0, "share of a step's rows that the student answers itself; on these the divergence alone"
    )
    max_new_tokens: int = setting(256, "of such an answer at most; a row keeps to max_length, too")
    generation_temperature: float = setting(1.0, "of its sampling; 0: always the likeliest token")
    top_p: float = setting(1.0, "it samples among the likeliest tokens of this probability")
    top_k: int = setting(0, "it samples among so many likeliest tokens; 0: all")
    generation_workspace_mb: int = setting(
        2048, "MiB of a device for its keys and values; as many rows are written at once as fit"
    )
    generation_engine: Literal["generate", "continuous"] = setting(
        "generate",
        "of Transformers: generate, in batches that last as long as their longest row; or continuous "
        "batching, where a row that ends makes room for the next (best with flash_attention_2)",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.student_fraction <= 1.0:
            raise ValueError(f"student_fraction: {self.student_fraction}; wanted 0 to 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p}; wanted more than 0, and 1 at most")
        for key, least in (
            ("max_new_tokens", 1),
            ("generation_temperature", 0),
            ("top_k", 0),
            ("generation_workspace_mb", 1),
        ):
            if not getattr(self, key) >= least:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted {least} or more")


@dataclass
class StudentSettings:
    student: str = setting("", "hub name or folder of the model to train")

    def __post_init__(self) -> None:
        if not self.student:
            raise ValueError("student: not given; wanted a hub name or a folder")


@dataclass
class TeacherSettings:
    """The model that is learnt from."""

    teacher: str = setting(
        "", "hub name or folder, also of a LoRA adapter; self: the student without its adapters"
    )
    align_tokenizers: bool = setting(
        False,
        "a teacher with another tokenizer: texts are aligned by bytes, and distributions compared "
        "over common classes of tokens",
    )
    teacher_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "auto: the type the checkpoint has"
    )
    teacher_deepspeed: str | None = setting(
        None, "a ZeRO-3 JSON: the teacher is sharded over all processes; without: whole on each"
    )
    teacher_workspace_mb: int = setting(
        1024,
        "MiB of a device for the states of a sharded teacher; it runs over as many micro-batches "
        "of a step at once as fit, and its head stays gathered where there is room",
    )
    teacher_cache: str | None = setting(
        None, "folder that train/cache_teacher.py filled with this recipe: no teacher is loaded"
    )
    cache_top_k: int = setting(64, "likeliest ids that a cache keeps of a token; 0: all of them")
    cache_dtype: Literal["float16", "float32"] = setting(
        "float16", "of a cache's log-probabilities; float32 with cache_top_k 0 loses nothing"
    )
    cache_check_tokens: int = setting(
        256, "target tokens on which a new cache is held against the live teacher; 0: none"
    )
    cache_shard_mb: int = setting(256, "of one file of a cache; a kill costs at most that")

    def __post_init__(self) -> None:
        if not self.teacher and not self.teacher_cache:
            raise ValueError("teacher: not given; wanted a hub name or a folder")
        for key, least in (("cache_top_k", 0), ("cache_check_tokens", 0), ("cache_shard_mb", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted {least} or more")
        require_file("teacher_deepspeed", self.teacher_deepspeed)
        if self.teacher == OWN_BASE:
            self.teacher_deepspeed = None  # a launch profile gives it to every teacher
        if self.teacher_workspace_mb < 0:
            raise ValueError(
                f"teacher_workspace_mb: {self.teacher_workspace_mb}; wanted 0 (one micro-batch at "
                "a time) or more"
            )


@dataclass
class TrainingSettings(TrainingArguments):
    """Transformers' training arguments, with one batch size in place of three."""

    global_batch_size: int = setting(0, "rows an optimizer step, over all processes")
    max_per_device_train_batch_size: int = setting(8, "cap on the micro-batch; a profile sets it")
    per_device_train_batch_size: int | None = setting(None, "derived from global_batch_size")
    gradient_accumulation_steps: int | None = setting(None, "derived from global_batch_size")
    per_device_eval_batch_size: int | None = setting(None, "the training micro-batch by default")
    gpu_memory_gb: float | None = setting(
        None, "GiB that a process may use at most; a profile sets its GPU's; without: all there is"
    )
    logging_steps: float = setting(10, "optimizer steps between two points of every curve")
    sample_prompts: int = setting(
        4, "held-out beginnings that student and teacher write on at every evaluation; 0: none"
    )
    sample_tokens: int = setting(48, "tokens they write after each")
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    save_total_limit: int | None = setting(2, "checkpoints kept")
    early_stopping_patience: int | None = setting(
        None, "stop after so many evaluations without a better metric_for_best_model"
    )
    check: bool = setting(
        False, "ten steps on eight rows in output_dir/check, which must over-fit: try this first"
    )
    max_skipped_steps: int = setting(
        3, "steps in a row without a finite loss or gradient that are left out; one more: an error"
    )
    logging_nan_inf_filter: bool = setting(False, "true would log another loss in place of nan")
    remove_unused_columns: bool = setting(False, "the collator decides what the models see")
    ddp_find_unused_parameters: bool | None = setting(False, "every trained weight gets a gradient")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir: not given; wanted the folder of this run")
        if self.check:
            self.set_up_check()
        self.settle_batch(int(os.environ.get("WORLD_SIZE", 1)))
        super().__post_init__()

    def settle_batch(self, processes: int) -> None:
        """Derive what is not given of the batch; what is given is not the plan's to change."""
        self.micro_batch_given = bool(
            self.per_device_train_batch_size or self.gradient_accumulation_steps
        )
        self.eval_batch_given = bool(self.per_device_eval_batch_size)
        self.use_batch(
            *derive_batch(
                self.global_batch_size,
                processes,
                self.max_per_device_train_batch_size,
                self.per_device_train_batch_size,
                self.gradient_accumulation_steps,
            )
        )
        self.global_batch_size = (
            processes * self.per_device_train_batch_size * self.gradient_accumulation_steps
        )

    def use_batch(self, micro: int, accumulation: int) -> None:
        self.per_device_train_batch_size = micro
        self.gradient_accumulation_steps = accumulation
        if not self.eval_batch_given:
            self.per_device_eval_batch_size = micro
        if getattr(self, "hf_deepspeed_config", None):  # it took the numbers when it was made
            self.hf_deepspeed_config.config |= {
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": accumulation,
                "train_batch_size": self.world_size * micro * accumulation,
            }

    def set_up_check(self) -> None:
        """Ten steps that learn fast, and a checkpoint; nothing of the run itself is touched."""
        self.output_dir, self.report_to = f"{self.output_dir}/check", ["none"]
        self.max_steps = self.save_steps = CHECK_STEPS
        self.logging_strategy = self.save_strategy = "steps"
        self.logging_steps, self.eval_strategy = 1, "no"
        self.learning_rate *= CHECK_RATE
        self.lr_scheduler_type, self.warmup_steps = "constant", 0
        self.load_best_model_at_end, self.early_stopping_patience = False, None


def derive_batch(
    global_batch: int,
    processes: int,
    cap: int,
    micro: int | None = None,
    accumulation: int | None = None,
) -> tuple[int, int]:
    """(micro-batch, accumulation steps) with global = processes * micro * accumulation.

    The micro-batch is the largest divisor of global_batch / processes that is at most `cap`.
    What is given is taken as it is. Raises ValueError where the numbers do not divide.
    """
    if micro and accumulation:
        return micro, accumulation
    if global_batch < 1:
        raise ValueError("global_batch_size: not given; wanted rows an optimizer step (32, say)")
    if global_batch % processes:
        near = [n for n in range(1, 2 * global_batch + 1) if n % processes == 0]
        best = min(near, key=lambda n: abs(n - global_batch)) if near else processes
        raise ValueError(
            f"global_batch_size: {global_batch} does not divide by {processes} processes; "
            f"the nearest that does is {best}"
        )
    rows = global_batch // processes
    for name, given in (
        ("per_device_train_batch_size", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if given and rows % given:
            raise ValueError(
                f"{name}: {given} does not divide the {rows} rows a process "
                f"(global_batch_size {global_batch} / {processes} processes)"
            )
    if accumulation:
        return rows // accumulation, accumulation
    micro = micro or max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(cap, 1))
    return micro, rows // micro


def require_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise ValueError(f"{key}: no file {path}; wanted the path of an existing file")


def parse_json_list(key: str, text: str | None) -> list[dict]:
    """The list of objects that a recipe key holds once it is spelt as a flag."""
    if not text:
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: not JSON ({error}); wanted a list of objects: {text}") from error
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key}: found {text}; wanted a list of objects [{{path: ...}}, ...]")
    return value


def parse_json_object(key: str, text: str | None) -> dict:
    """The object that a recipe key holds once it is spelt as a flag."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: not JSON ({error}); wanted an object: {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{key}: found {text}; wanted an object {{name: value}}")
    return value


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this loader refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        double = {key for key in keys if keys.count(key) > 1}
        if double:
            raise ValueError(f"line {node.start_mark.line + 1}: key given twice: {sorted(double)}")
        return super().construct_mapping(node, deep)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def recipe_tokens(file: str) -> list[str]:
    """A recipe file as command-line tokens."""
    require_file("config", file)
    try:
        recipe = yaml.load(Path(file).read_text(), _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{file}: found {type(recipe).__name__}; wanted keys and values")
    tokens = []
    for key, value in recipe.items():
        if value is None or value == "" or value == []:
            raise ValueError(f"{file}: {key} is empty; give it a value or remove the line")
        tokens.append(f"--{key}")
        if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
            tokens.append(json.dumps(value))
        elif isinstance(value, list):
            tokens += [str(item) for item in value]
        else:
            tokens.append(str(value).lower() if isinstance(value, bool) else str(value))
    return tokens


def parse(*dataclasses: type, argv: list[str] | None = None, description: str = "") -> tuple:
    """One instance of every dataclass from `--config FILE` and flags; later tokens win.

    Raises ValueError on unknown keys (with the nearest right one), wrong choices and types.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclasses, allow_abbrev=False, description=description)
    parser.add_argument("--config", help="recipe: a YAML file of the keys below")
    position = argv.index("--config") if "--config" in argv else None
    if position is not None:
        if position + 1 >= len(argv):
            raise ValueError("--config: no file given")
        tokens = recipe_tokens(argv[position + 1])
        argv = tokens + argv[:position] + argv[position + 2 :]
    known = parser._option_string_actions
    for token in argv:
        name = token.split("=")[0]
        if name.startswith("--") and name not in known:
            raise ValueError(unknown_key(name[2:], [key[2:] for key in known]))
    parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    return parsed[: len(dataclasses)]  # the rest is the name space of --config


def unknown_key(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys"
    return f"unknown key {name}{hint}"
