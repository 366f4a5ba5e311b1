"""What a recipe sets of models, data, objective and teacher; of training: kd/settings/training.py."""

from dataclasses import dataclass, field
from typing import Literal

from kd.recipe import parse_json_list, parse_json_object, require_file, setting

OWN_BASE = "self"  # the teacher that is the student with its adapters off


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
