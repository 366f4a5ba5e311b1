"""What training from a cache changes: loss and gradient of the student beside the live ones.

N target tokens, H hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.losses.fused import linear_distillation_loss
from kd.losses.objective import Objective
from kd.losses.sparse import SparseSignal
from kd.models.heads import backbone_only, head_of, target_positions
from kd.models.load import load_trained
from kd.models.sharding import without_zero_init
from kd.settings.distillation import ModelSettings


@dataclass
class CacheError:
    """Means over target tokens; the gradients are those of the student's last hidden states."""

    divergence: str
    tokens: int = 0
    cached: float = 0.0
    live: float = 0.0
    gradient: float = 0.0  # norm of the difference, as a share of the live gradient's norm

    def __str__(self) -> str:
        return (
            f"error against the live teacher, {self.tokens} tokens of the untrained student: "
            f"{self.divergence} {self.cached:.6f} from the cache, {self.live:.6f} live "
            f"({self.cached / self.live - 1:+.3%}); gradients differ by {self.gradient:.3%} (by norm)"
        )


class UntrainedStudent:
    """The student of a recipe as it is before the first step."""

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
        self.vocabulary = len(tokenizer)

    @torch.no_grad()
    def states(self, row: EncodedRow) -> tuple[Tensor, Tensor]:
        """((N, H) states that predict the targets of a document, (N,) the targets)."""
        batch = {name: tensor.to(self.device) for name, tensor in self.collator([[row]]).items()}
        hidden = self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        positions, labels = target_positions(batch["labels"])
        return hidden[positions], labels

    def error(
        self,
        objective: Objective,
        signals: Iterable[tuple[EncodedRow, SparseSignal, SparseSignal]],
    ) -> CacheError:
        """Of documents, each with what a cache knows of it and with every id of the teacher."""
        soft = replace(objective, soft_weight=1.0)
        error, gap, norm = CacheError(objective.divergence), 0.0, 0.0
        for row, known, whole in signals:
            states, labels = self.states(row)
            cached, gradient = self.loss_and_gradient(states, labels, soft, known)
            live, wanted = self.loss_and_gradient(states, labels, soft, whole)
            error.tokens += len(labels)
            error.cached, error.live = error.cached + cached, error.live + live
            gap += (gradient - wanted).square().sum().item()
            norm += wanted.square().sum().item()
        error.cached, error.live = error.cached / error.tokens, error.live / error.tokens
        error.gradient = (gap / norm) ** 0.5
        return error

    def loss_and_gradient(
        self, states: Tensor, labels: Tensor, objective: Objective, signal: SparseSignal
    ) -> tuple[float, Tensor]:
        """The loss summed over tokens, and its gradient at the states in float32."""
        states = states.float().requires_grad_()
        signal = signal.to(states.device)
        loss, _ = linear_distillation_loss(
            states, labels, self.head, objective, self.vocabulary, signal
        )
        (gradient,) = torch.autograd.grad(loss, states)
        return loss.item(), gradient
