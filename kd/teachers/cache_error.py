"""The error of a teacher cache: the student's loss and gradient, against those of the live teacher.

N target tokens, H hidden.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.distributed import rank
from kd.losses.fused import linear_distillation_loss
from kd.losses.sparse import SparseTeacherOutputs
from kd.models.heads import backbone_only, head_of, target_positions
from kd.models.load import load_trained
from kd.models.sharding import without_zero_init
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.training_recipe import Recipe
from kd.teachers.cache_files import TeacherCache
from kd.teachers.cached import outputs_of


@dataclass
class CacheError:
    """Means over target tokens; gradients are those of the student's last hidden states."""

    divergence: str
    tokens: int = 0
    cached: float = 0.0
    live: float = 0.0
    gradient: float = 0.0  # norm of the difference / norm of the live gradient

    def __str__(self) -> str:
        relative = f" ({self.cached / self.live - 1:+.3%})" if self.live else ""
        return (
            f"error against the live teacher, {self.tokens} tokens of the untrained student: "
            f"{self.divergence} {self.cached:.6f} from the cache, {self.live:.6f} live"
            f"{relative}; gradients differ by {self.gradient:.3%} (by norm)"
        )


class UntrainedStudent:
    """The student of a recipe before its first training step."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        with without_zero_init():
            model = load_trained(name, settings, tokenizer)
        if settings.quantization == "none":
            model.to(device)
        model.eval().requires_grad_(False)
        self.model = model.get_base_model() if settings.lora_rank else model
        self.head = head_of(self.model)
        backbone_only(self.model)
        self.collator, self.device = Collator(tokenizer.pad_token_id), device
        self.vocab_size = len(tokenizer)

    @torch.no_grad()
    def states(self, row: EncodedRow) -> tuple[Tensor, Tensor]:
        """The last hidden states, (N, H), at the targets of a document, and the targets, (N,)."""
        batch = {name: tensor.to(self.device) for name, tensor in self.collator([[row]]).items()}
        hidden = self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        positions, labels = target_positions(batch["labels"])
        return hidden[positions], labels

    def error(
        self,
        objective: Objective,
        outputs: Iterable[tuple[EncodedRow, SparseTeacherOutputs, SparseTeacherOutputs]],
    ) -> CacheError:
        """The error over documents, each with the cached and the full outputs of the teacher."""
        soft = replace(objective, soft_weight=1.0)
        error, gap, norm = CacheError(objective.divergence), 0.0, 0.0
        for row, cached_outputs, full_outputs in outputs:
            states, labels = self.states(row)
            cached, gradient = self.loss_and_gradient(states, labels, soft, cached_outputs)
            live, expected = self.loss_and_gradient(states, labels, soft, full_outputs)
            error.tokens += len(labels)
            error.cached, error.live = error.cached + cached, error.live + live
            gap += (gradient - expected).square().sum().item()
            norm += expected.square().sum().item()
        error.cached, error.live = error.cached / error.tokens, error.live / error.tokens
        # A student that equals its teacher has no live gradient.
        error.gradient = (gap / norm) ** 0.5 if norm else math.inf if gap else 0.0
        return error

    def loss_and_gradient(
        self, states: Tensor, labels: Tensor, objective: Objective, outputs: SparseTeacherOutputs
    ) -> tuple[float, Tensor]:
        """The loss summed over N targets, and its gradient at `states`, (N, H) in float32."""
        states = states.float().requires_grad_()
        outputs = outputs.to(states.device)
        loss, _ = linear_distillation_loss(
            states, labels, self.head, objective, self.vocab_size, outputs
        )
        (gradient,) = torch.autograd.grad(loss, states)
        return loss.item(), gradient


def print_cache_error(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    cache: TeacherCache,
    references: list[tuple[EncodedRow, SparseTeacherOutputs]],
) -> None:
    """On rank 0, print the error of the cache on the documents of `references`."""
    if rank() or not references:
        return
    student = UntrainedStudent(recipe.model_name, recipe.model, tokenizer, recipe.training.device)
    compared = (
        (row, outputs_of(cache.records([row]), cache.manifest), full) for row, full in references
    )
    print(student.error(recipe.objective, compared))
