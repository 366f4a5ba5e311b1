"""Calling a causal language model for the loss: the backbone, then the head at target positions.

B batch, T tokens, N target tokens, H hidden, V vocabulary. `return_loss` replaces the `forward` of
the CausalLM on the instance. Callers then call the wrapped model (DDP, DeepSpeed, PEFT), so every
hook of the wrappers runs. A loss computed outside that call is silently wrong under ZeRO-3.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.data.encoding import IGNORE_INDEX
from kd.data.packing import bounds_of
from kd.losses.fused import head_logits, linear_distillation_loss
from kd.losses.head import Head, TeacherOutputs
from kd.losses.hidden import HiddenObjective, hidden_loss
from kd.losses.metrics import BY_NAME, REPORTED, TOKEN_METRICS
from kd.losses.sparse import SparseTeacherOutputs
from kd.models.blocks import layer_states
from kd.models.readout import scale_and_softcap
from kd.settings.distillation import Objective


@dataclass
class LossInputs:
    """What the student's call needs besides its input ids.

    A dataclass rather than a tuple of tensors, so that no wrapper casts its tensors.

    Attributes:
        labels: (B, T) target ids, not shifted; IGNORE_INDEX where there is no target.
        objective: The loss; None asks for the argmax ids instead.
        vocab_size: Number of ids of the tokenizer.
        teacher: The teacher's outputs at the target positions.
        hidden: The hidden-state loss, if any.
        teacher_states: The teacher's states (N, H of the teacher) for every pair of layers of it.
        on_policy: (B, T) bool, tokens of student-generated answers; None if there are none.
    """

    labels: Tensor
    objective: Objective | None
    vocab_size: int
    teacher: TeacherOutputs | SparseTeacherOutputs | None = None
    hidden: HiddenObjective | None = None
    teacher_states: list[Tensor] | None = None
    on_policy: Tensor | None = None


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find where labels (B, T) are predicted.

    Returns:
        (B, T) bool, the positions one before a target, and the targets, (N,).
    """
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return positions, labels[:, 1:][positions[:, :-1]]


def head_reader(model: PreTrainedModel, adapters: bool = True) -> Callable[[], Head]:
    """Return a function that reads the model's head; call it where ZeRO-3 has gathered the weight.

    Scale and softcap come from the config (Granite divides its logits, Cohere multiplies them,
    Gemma 2 and 3 cap them) and are compared with the model's own forward. Without `adapters` the
    function reads the head of the base model.

    Raises ValueError with the model type if the model computes its logits in another way.
    """
    scale, softcap = scale_and_softcap(type(model), model.config)
    layer = model.get_output_embeddings()
    # PEFT's wrapper for trained tokens exposes the weight with its rows replaced, but no bias.
    plain = layer.original_module if isinstance(layer, TrainableTokensWrapper) else layer
    weights = layer if adapters else plain
    return lambda: Head(weights.weight, plain.bias, scale, softcap)


def head_of(model: PreTrainedModel) -> Head:
    """Return the model's head as it is now."""
    return head_reader(model)()


def backbone_only(model: PreTrainedModel) -> None:
    """Make model(...) return the last hidden states, (B, T, H), instead of logits."""

    def forward(self, **inputs):
        return self.base_model(**inputs, use_cache=False).last_hidden_state

    model.forward = types.MethodType(forward, model)


def return_loss(model: PreTrainedModel) -> None:
    """Make model(..., loss_inputs=LossInputs(...)) return {"loss": sum, "metrics": sums}.

    A flat batch's BOUNDS are further arguments of the call.

    "loss" is a scalar, the loss summed over target tokens; "metrics" are the sums of REPORTED,
    (len(REPORTED),). Without an objective the call returns the argmax ids at the target positions,
    (N,). The forward of the head module itself computes the fused loss, because ZeRO-3 gathers the
    head's weight only within a call of that module.

    Raises:
        ValueError: LoRA has replaced the head, whose weight then is not plain.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear | TrainableTokensWrapper):
        raise ValueError(
            f"the student's head is a {type(head).__name__}; wanted a plain Linear: leave the head "
            "out of lora_target_modules"
        )

    read_head = head_reader(model)

    def head_forward(
        hidden: Tensor, labels: Tensor, inputs: LossInputs, on_policy: Tensor | None = None
    ):
        if inputs.objective is None:
            return argmax_ids(hidden, read_head(), inputs.vocab_size)
        return loss_by_origin(hidden, labels, read_head(), inputs, on_policy)

    def forward(self, input_ids, position_ids, loss_inputs: LossInputs, **more):
        objective = loss_inputs.hidden
        head = self.get_output_embeddings()
        layers = [student for student, _ in objective.layers] if objective else []
        with layer_states(self, layers) as states:
            hidden = self.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds_of(more)
            ).last_hidden_state  # (B, T, H)
        positions, labels = target_positions(loss_inputs.labels)
        if loss_inputs.objective is None:
            return head(hidden[positions], labels, loss_inputs)
        mask = loss_inputs.on_policy
        on_policy = None if mask is None else mask[positions]  # (N,)
        loss, data_sums, on_policy_sums = head(hidden[positions], labels, loss_inputs, on_policy)
        hidden_sums = data_sums.new_zeros(2)  # data, on-policy
        if objective:
            kept = [states.get(layer, hidden)[positions] for layer in layers]  # (N, H) each
            hidden_sums = hidden_loss(self, kept, loss_inputs.teacher_states, objective, on_policy)
            loss = loss + objective.weight * hidden_sums.sum()
        return {"loss": loss, "metrics": reported(data_sums, on_policy_sums, hidden_sums.detach())}

    head.forward = head_forward
    model.forward = types.MethodType(forward, model)


def reported(data_sums: Tensor, on_policy_sums: Tensor, hidden_sums: Tensor) -> Tensor:
    """Arrange sums as REPORTED.

    Args:
        data_sums: (len(TOKEN_METRICS),) over the data's tokens.
        on_policy_sums: (len(TOKEN_METRICS),) over the tokens of student-generated answers.
        hidden_sums: (2,) the hidden-state loss over either.

    Returns:
        (len(REPORTED),).
    """
    sums = {
        "tokens": dict(zip(TOKEN_METRICS, data_sums, strict=True)) | {"hidden": hidden_sums[0]},
        "on_policy_tokens": dict(zip(TOKEN_METRICS, on_policy_sums, strict=True))
        | {"hidden": hidden_sums[1]},
    }
    metrics = [BY_NAME[name] for name in REPORTED]
    return torch.stack([sums[metric.tokens][metric.value] for metric in metrics])


def loss_by_origin(
    hidden: Tensor, labels: Tensor, head: Head, inputs: LossInputs, on_policy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss, with metric sums for data tokens and for on-policy tokens apart.

    On-policy tokens have no cross-entropy term: the student would only learn to repeat itself.

    Args:
        hidden: (N, H) states that predict the labels.
        labels: (N,) target ids.
        head: The student's head.
        inputs: Objective, vocabulary size and teacher outputs.
        on_policy: (N,) bool, tokens of student-generated answers; None if there are none.

    Returns:
        The loss, a scalar, and the sums over data and over on-policy tokens,
        (len(TOKEN_METRICS),) each.
    """
    objective, vocab_size, teacher = inputs.objective, inputs.vocab_size, inputs.teacher
    if on_policy is None:
        loss, sums = linear_distillation_loss(hidden, labels, head, objective, vocab_size, teacher)
        return loss, sums, torch.zeros_like(sums)

    def part(tokens: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        known = replace(teacher, hidden=teacher.hidden[tokens])
        states, targets = hidden[tokens], labels[tokens]
        return linear_distillation_loss(states, targets, head, objective, vocab_size, known)

    on_policy_loss, on_policy_sums = part(on_policy, replace(objective, soft_weight=1.0))
    if on_policy.all():  # a second call would cost a trained head another gradient
        return on_policy_loss, torch.zeros_like(on_policy_sums), on_policy_sums
    loss, sums = part(~on_policy, objective)
    return on_policy_loss + loss, sums, on_policy_sums


@torch.no_grad()
def argmax_ids(hidden: Tensor, head: Head, vocab_size: int) -> Tensor:
    """Return the most probable next ids, (N,), after states (N, H).

    Ignores the head's scale and softcap, which do not change the order; a softcap could make the
    largest logits equal.
    """
    return head_logits(hidden, replace(head, scale=1.0, softcap=None), vocab_size).argmax(-1)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the CausalLM itself, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
