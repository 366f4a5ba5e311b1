"""Recipe keys of the teacher: a live model, sharded or whole, or the cache of its outputs."""

from dataclasses import dataclass
from typing import Literal

from kd.recipe import AUTO, NONE, check_ranges, mistake, require_file, setting
from kd.settings.machine_file import repository_file
from kd.settings.model_paths import require_model

TEACHER_WORKSPACE = 1024  # MiB, where nothing has chosen
OWN_BASE = "self"  # value of `teacher`: the student's frozen base, with its adapters off


@dataclass
class TeacherSettings:
    """The teacher: a live model, or the cache of its outputs."""

    teacher: str = setting(
        "",
        "Hub name or folder of the teacher: a full model or a LoRA adapter. self: the student "
        "with its adapters off.",
    )
    align_tokenizers: bool = setting(
        False,
        "Allow a teacher with another tokenizer: align the two tokenizations by bytes and compare "
        "distributions over classes of tokens that both vocabularies share.",
    )
    teacher_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Type of the teacher's weights; auto: the type of its checkpoint."
    )
    teacher_deepspeed: str = setting(
        AUTO,
        "DeepSpeed ZeRO-3 JSON that shards the teacher over all processes, or none: every process "
        "holds the whole teacher. auto: whichever the machine file or the memory plan says.",
    )
    teacher_sharded_over: Literal["auto", "node", "all"] = setting(
        AUTO,
        "Processes that share one sharded teacher: those of each node, so that it is gathered "
        "within the node, or all. auto: node if that fits.",
    )
    teacher_workspace_mb: int | Literal["auto"] = setting(
        AUTO,
        "Memory for the hidden states of a sharded teacher, in MiB per device. One forward pass "
        "covers as many micro-batches of a step as fit, and the head stays gathered for them if "
        "it fits, too. auto: by the memory plan.",
        least=0,
        note="0: one micro-batch per pass",
    )
    teacher_cache: str | None = setting(
        None,
        "Folder of teacher outputs, written by train/cache_teacher.py with the same recipe; "
        "training then loads no teacher.",
    )
    cache_top_k: int = setting(
        64,
        "Number of most likely token ids that the teacher cache keeps per token.",
        least=0,
        note="0: all",
    )
    cache_dtype: Literal["float16", "float32"] = setting(
        "float16",
        "Type of log-probabilities in the teacher cache; float32 with cache_top_k: 0 is lossless.",
    )
    cache_check_tokens: int = setting(
        256,
        "Number of target tokens on which a new cache is compared with the live teacher; 0 skips "
        "the comparison.",
        least=0,
    )
    cache_shard_mb: int = setting(
        256,
        "Size of one shard of the teacher cache in MiB; an interrupted run loses at most one "
        "shard per process.",
        least=1,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.teacher == OWN_BASE:
            if self.teacher_deepspeed not in (AUTO, NONE):
                mistake(
                    f"teacher_deepspeed: {self.teacher_deepspeed} with teacher: self, which has no "
                    "weights of its own; remove it"
                )
            if self.teacher_sharded_over != AUTO:
                mistake("teacher_sharded_over: teacher: self has no weights of its own; remove it")
        elif not self.teacher_cache:
            require_model("teacher", self.teacher)
        if self.teacher_sharded_over != AUTO and self.teacher_deepspeed == NONE:
            mistake(
                f"teacher_sharded_over: {self.teacher_sharded_over} with teacher_deepspeed: none, "
                "which shards no teacher; remove one of them"
            )
        if self.teacher_deepspeed not in (AUTO, NONE):
            require_file("teacher_deepspeed", str(repository_file(self.teacher_deepspeed)))

    @property
    def workspace_bytes(self) -> int:
        """The memory for hidden states; TEACHER_WORKSPACE if none was chosen."""
        given = self.teacher_workspace_mb
        return 2**20 * (TEACHER_WORKSPACE if given == AUTO else given)

    @property
    def sharding(self) -> str | None:
        """The JSON that shards the teacher; None if every process holds it whole."""
        return None if self.teacher_deepspeed in (AUTO, NONE) else self.teacher_deepspeed
