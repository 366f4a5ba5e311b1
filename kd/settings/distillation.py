"""Recipe keys of the models, the data, the objective and the teacher.

The keys of the optimization are in kd/settings/training.py; all of them together are a `Recipe`
(kd/settings/training_recipe.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kd.recipe import (
    AUTO,
    check_ranges,
    mistake,
    parse_json_list,
    parse_json_object,
    require_file,
    setting,
)
from kd.settings.model_paths import require_model

if TYPE_CHECKING:  # settings are checked before torch is imported, which takes seconds
    from torch import Tensor

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
]

LOSS_WORKSPACE, SMALLEST_WORKSPACE = 512, 128  # MiB; the first one where nothing has chosen
LIMITS = "for the limits, set divergence: forward_kl or reverse_kl"


@dataclass
class ModelSettings:
    """How the trained model is loaded and which of its weights are trained."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "Type of the weights. auto: that of precision; float32 if every weight is trained without "
        "DeepSpeed.",
    )
    quantization: Literal["none", "nf4"] = setting(
        "none", "Quantization of the frozen base: nf4 is 4 bits (QLoRA) and needs lora_rank."
    )
    lora_rank: int = setting(0, "Rank of the LoRA adapters; 0 trains every weight.", least=0)
    lora_alpha: float = setting(
        16.0, "LoRA alpha: adapters are scaled by lora_alpha / lora_rank.", above=0
    )
    lora_dropout: float = setting(
        0.0, "Dropout probability at the input of each LoRA adapter.", least=0, below=1
    )
    lora_target_modules: list[str] = setting(
        ["all-linear"],
        "Modules with LoRA adapters. all-linear: every linear layer except the LM head.",
    )
    train_template_tokens: bool = setting(
        False, "With LoRA, also train the embeddings of the chat template's special tokens."
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        AUTO,
        "Attention implementation of student and teacher. auto: flash_attention_2 if it is "
        "installed and the GPU and the models support it, else sdpa.",
    )
    liger_kernels: bool | Literal["auto"] = setting(
        AUTO,
        "Run RMSNorm and SwiGLU of student and teacher in the kernels of liger-kernel. auto: on a "
        "GPU, if the package is installed and knows the model.",
    )
    chat_template: str | None = setting(
        None, "File with a Jinja chat template that replaces the tokenizer's own."
    )
    template_arguments: str | None = setting(
        None,
        "Variables of the chat template, such as {enable_thinking: false}; saved with the model.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.quantization != "none" and not self.lora_rank:
            mistake(
                f"quantization: {self.quantization} with lora_rank: 0: 4-bit weights cannot be "
                "trained; set lora_rank (for example 16), or quantization: none"
            )
        if self.train_template_tokens and not self.lora_rank:
            mistake(
                "train_template_tokens: true with lora_rank: 0: full training already trains every "
                "embedding; remove the key, or set lora_rank"
            )
        require_file("chat_template", self.chat_template)
        parse_json_object("template_arguments", self.template_arguments)

    @property
    def attention(self) -> str:
        """The attention implementation; sdpa, which runs everywhere, if none was chosen."""
        return "sdpa" if self.attn_implementation == AUTO else self.attn_implementation


@dataclass
class DataSettings:
    """Training and held-out rows; `kd.data.sources` lists the keys of one source."""

    data: str = setting(
        "", "JSON list of training sources: [{path, split, count, columns, ...}, ...]."
    )
    eval_data: str | None = setting(
        None, "JSON list of held-out sources, in the same format as data."
    )
    max_length: int = setting(1024, "Maximum number of tokens per row.", least=2)
    on_long_row: Literal["cut", "cut_left", "drop"] = setting(
        "cut",
        "What to do with rows longer than max_length. cut: keep the first tokens; cut_left: keep "
        "the last tokens; drop: drop the row. rows.json counts these rows.",
    )
    on_bad_row: Literal["error", "drop"] = setting(
        "error",
        "What to do with unreadable rows. error: stop and name file and line; drop: drop and "
        "count them.",
    )
    on_suspicious_row: Literal["tell", "error"] = setting(
        "tell",
        "What to do with rows that are often mistakes: an empty answer, two questions in a row, "
        "a held-out row that is a training row, ... tell: count them by reason; error: stop.",
    )
    control_tokens_in_text: Literal["split", "keep"] = setting(
        "split",
        "How to encode control tokens of the tokenizer, such as <|im_end|>, in the text of a row. "
        "split: as ordinary text; keep: as control tokens, for rows that mean them.",
    )
    packing: bool = setting(
        False, "Pack several documents into one row; attention never crosses documents."
    )
    mixture_seed: int = setting(
        0,
        "Seed that draws the rows of the mixture. It is separate from seed, so that runs with "
        "different seeds can use the same rows.",
        least=0,
    )
    mixture_rows: int | None = setting(
        None,
        "Total number of rows drawn from sources with a weight. Default: as many as possible "
        "without repeating a row.",
        least=1,
    )
    train_rows: int | None = setting(
        None,
        "Use only this many rows of the mixture, in proportion from every source (trial runs).",
        least=1,
    )
    data_cache: str = setting(
        "runs/cache", "Folder with the cache of tokenized rows; runs can share it."
    )
    data_workers: int = setting(
        0, "Number of tokenizing processes.", least=0, note="0: one per core"
    )

    def __post_init__(self) -> None:
        self.sources = parse_json_list("data", self.data)
        self.eval_sources = parse_json_list("eval_data", self.eval_data)
        check_ranges(self)
        if not self.sources:
            mistake('data: no source given; wanted a list such as [{"path": "rows.jsonl"}]')


@dataclass(frozen=True)
class Objective:
    """The training loss, per target token, as a recipe sets it and as the loss reads it.

    loss = soft_weight * divergence(temperature) + (1 - soft_weight) * cross-entropy, plus
    hidden_weight * hidden-state loss. Supervised fine-tuning is `Objective(soft_weight=0.0)`.
    Raises ValueError if a weight or a temperature is out of range.
    """

    soft_weight: float = setting(
        1.0,
        "Weight of the divergence in the loss; cross-entropy has weight 1 - soft_weight. 1: "
        "divergence only; 0: cross-entropy only.",
        least=0,
        most=1,
    )
    divergence: Divergence = setting(
        "forward_kl", "Divergence between the teacher's and the student's next-token distributions."
    )
    temperature: float = setting(
        1.0,
        "Softmax temperature of teacher and student in the divergence.",
        least=0.001,
        most=1000,
    )
    temperature_squared: bool = setting(
        False, "Multiply the divergence and its gradient by temperature^2 (Hinton et al. 2015)."
    )
    jensen_shannon_weight: float = setting(
        0.5,
        "Weight of the teacher in the mixture of jensen_shannon; 0.5 is symmetric.",
        above=0,
        below=1,
        note=LIMITS,
    )
    skew: float = setting(
        0.1,
        "Mixture weight of the first distribution in skew_forward_kl and skew_reverse_kl.",
        above=0,
        below=1,
        note=LIMITS,
    )
    loss_workspace_mb: int | Literal["auto"] = setting(
        AUTO,
        "Memory for logits in the loss, in MiB per device; tokens are processed in tiles. auto: "
        "larger tiles where the memory plan has room for them.",
        least=SMALLEST_WORKSPACE,
    )
    hidden_weight: float = setting(
        0.0, "Weight of the loss between hidden states; 0 disables it.", least=0, repr=False
    )
    hidden_loss: Literal["cosine", "mse"] = setting(
        "cosine", "Loss between hidden states of student and teacher.", repr=False
    )
    hidden_layers: list[str] | None = setting(
        None,
        "Layers of the hidden-state loss as student:teacher pairs; 0 is the embedding output. "
        "Default: the origin of each inherited block, otherwise evenly spaced teacher blocks.",
        repr=False,
        hash=False,
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def workspace_bytes(self) -> int:
        """The memory for logits; LOSS_WORKSPACE if none was chosen."""
        chosen = LOSS_WORKSPACE if self.loss_workspace_mb == AUTO else self.loss_workspace_mb
        return 2**20 * chosen

    @property
    def divergence_scale(self) -> float:
        """The factor of the divergence: temperature^2 with `temperature_squared`, otherwise 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def mixture(self) -> dict[str, float]:
        """The mixture argument of `kd.losses.divergences`; empty for divergences without one."""
        if self.divergence == "jensen_shannon":
            return {"weight": self.jensen_shannon_weight}
        return {"skew": self.skew} if self.divergence.startswith("skew_") else {}

    def total(self, divergence: "Tensor", cross_entropy: "Tensor") -> "Tensor":
        """Combine the two terms, each of any one shape; `divergence` includes its scale.

        A term of weight 0 is left out: multiplied by 0, an infinite one would make the loss NaN.
        """
        weight = self.soft_weight
        if weight == 0.0:
            return cross_entropy
        return divergence if weight == 1.0 else weight * divergence + (1 - weight) * cross_entropy


@dataclass
class OnPolicySettings:
    """Student-generated answers in training batches; see kd/training/on_policy.py."""

    student_fraction: float = setting(
        0.0,
        "Fraction of rows whose answers the student generates (on-policy distillation). Their loss "
        "is the divergence only.",
        least=0,
        most=1,
    )
    max_new_tokens: int = setting(
        256,
        "Maximum number of tokens per student-generated answer; prompt + answer is capped at "
        "max_length.",
        least=1,
    )
    generation_temperature: float = setting(
        1.0,
        "Sampling temperature of student-generated answers.",
        least=0,
        note="0: greedy decoding",
    )
    top_p: float = setting(
        1.0,
        "Nucleus sampling of student-generated answers: sample only from the most likely tokens "
        "with this total probability; 1 disables the limit.",
        above=0,
        most=1,
    )
    top_k: int = setting(
        0,
        "Sampling of student-generated answers: sample only from the k most likely tokens; 0 "
        "disables the limit.",
        least=0,
    )
    generation_workspace_mb: int = setting(
        2048,
        "Memory for the keys and values of student-generated answers, in MiB per device; it sets "
        "how many answers are generated at once.",
        least=1,
    )
    generation_engine: Literal["generate", "continuous"] = setting(
        "generate",
        "Generation engine of Transformers. generate: static batches; continuous: continuous "
        "batching, where a finished row makes room for the next (best with flash_attention_2).",
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class SftSettings:
    """The model of train/sft.py."""

    model: str = setting("", "Hub name or folder of the model to train.")

    def __post_init__(self) -> None:
        require_model("model", self.model)


@dataclass
class ShowSettings:
    """A look at the rows before training."""

    show_rows: int = setting(
        0,
        "Print this many rows with their target tokens marked, then exit without training. With "
        "align_tokenizers: as both tokenizers see them.",
        least=0,
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class StudentSettings:
    """The student of train/distill.py."""

    student: str = setting("", "Hub name or folder of the student, the model to train.")

    def __post_init__(self) -> None:
        require_model("student", self.student)
