"""What training from a cache changes: loss and gradient of the student beside the live ones."""

import torch
from transformers import PreTrainedTokenizerBase

from kd.data.masks import EncodedRow
from kd.data.packing import Collator
from kd.losses.fused import linear_distillation_loss
from kd.losses.objective import Objective
from kd.losses.sparse import SparseSignal
from kd.models.heads import backbone_only, head_of, target_positions
from kd.models.load import load_trained
from kd.models.sharding import without_zero_init
from kd.recipe import ModelSettings
from kd.teachers.cache import TeacherCache
from kd.teachers.cached import signal_of


def error_against_live(
    student: str,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    cache: TeacherCache,
    documents: list[tuple[EncodedRow, SparseSignal]],
    device: torch.device,
) -> str:
    """The untrained student's divergence by the cache and by the teacher's whole distributions.

    The gradients compared are those of the student's last hidden states, over all tokens together.
    """
    with without_zero_init():
        model = load_trained(student, settings, tokenizer)
    if settings.quantization == "none":
        model.to(device)
    model.eval().requires_grad_(False)
    causal = model.get_base_model() if settings.lora_rank else model
    head = head_of(causal)
    backbone_only(causal)
    soft = Objective(**(vars(objective) | {"soft_weight": 1.0}))
    tokens = live = cached = gap = norm = 0.0
    for row, whole in documents:
        batch = {k: v.to(device) for k, v in Collator(tokenizer.pad_token_id)([[row]]).items()}
        with torch.no_grad():
            hidden = causal(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        positions, labels = target_positions(batch["labels"])
        states = hidden[positions].float().requires_grad_()  # (N, H)
        known = signal_of(cache.records([row]), cache.manifest)
        (loss, gradient), (wanted_loss, wanted) = (
            _loss_and_gradient(states, labels, head, soft, len(tokenizer), signal)
            for signal in (known, whole)
        )
        tokens += len(labels)
        live, cached = live + wanted_loss, cached + loss
        gap += (gradient - wanted).square().sum().item()
        norm += wanted.square().sum().item()
    return (
        f"error against the live teacher, {tokens:.0f} tokens of the untrained student: "
        f"{soft.divergence} {cached / tokens:.6f} from the cache, {live / tokens:.6f} live "
        f"({cached / live - 1:+.3%}); gradients differ by {(gap / norm) ** 0.5:.3%} (by norm)"
    )


def _loss_and_gradient(states, labels, head, objective, vocabulary, signal: SparseSignal):
    signal = SparseSignal(
        **{k: None if v is None else v.to(states.device) for k, v in vars(signal).items()}
    )
    loss, _ = linear_distillation_loss(states, labels, head, objective, vocabulary, signal)
    (gradient,) = torch.autograd.grad(loss, states)
    return loss.item(), gradient
