"""How a causal language model is called here: its backbone, then its head at target positions only.

B batch, T tokens, N target tokens, H hidden, V vocabulary. The `forward` of the CausalLM is replaced
on the instance, so that the wrapped model (DDP, DeepSpeed, PEFT) is what gets called and every hook
of theirs runs; a loss built outside of that call is silently wrong under ZeRO-3.
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
from kd.losses.fused import METRICS, Head, Objective, TeacherSignal, linear_distillation_loss
from kd.losses.hidden import HiddenObjective, hidden_loss
from kd.losses.sparse import SparseSignal
from kd.models.blocks import layer_states

# Sums over target tokens that a call returns: over those of the data, and, of what says something
# of them, over those that the student has written itself.
ON_POLICY_METRICS = (
    "divergence",
    "teacher_cross_entropy",
    "top1_agreement",
    "student_entropy",
    "teacher_entropy",
)
REPORTED = (
    *METRICS,
    "hidden",
    *(f"on_policy_{name}" for name in (*ON_POLICY_METRICS, "hidden", "tokens")),
)


@dataclass
class LossInputs:
    """What the head needs beside hidden states. No tensor tuple, so that no wrapper casts it."""

    labels: Tensor  # (B, T), not shifted
    objective: Objective | None  # None: no loss is asked for, but the most probable ids
    vocabulary: int
    teacher: TeacherSignal | SparseSignal | None = None
    hidden: HiddenObjective | None = None
    teacher_layers: list[Tensor] | None = None  # (N, H of the teacher) of every pair of the map
    own: Tensor | None = None  # (B, T) bool: written by the student itself


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """((B, T) bool: positions that predict a target, (N,) the targets), shifted by one."""
    positions = torch.zeros_like(labels, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return positions, labels[:, 1:][positions[:, :-1]]


def head_reader(model: PreTrainedModel, adapters: bool = True) -> Callable[[], Head]:
    """A function that gives the model's head, to be called where ZeRO-3 has it gathered.

    Scale and soft-cap come from the config, which takes its time: Granite divides its logits,
    Cohere multiplies them, Gemma 2 and 3 cap them. Without `adapters` it is the head of the base.
    """
    layer, settings = model.get_output_embeddings(), model.config.get_text_config().to_dict()
    scale = settings.get("logit_scale") or 1.0
    scale /= settings.get("logits_scaling") or 1.0
    softcap = settings.get("final_logit_softcapping")
    # PEFT's wrapper for trained tokens passes on the weight, with its rows replaced, and no more.
    plain = layer.original_module if isinstance(layer, TrainableTokensWrapper) else layer
    weights = layer if adapters else plain
    return lambda: Head(weights.weight, plain.bias, scale, softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The model's head as it is now, as the fused loss takes it."""
    return head_reader(model)()


def backbone_only(model: PreTrainedModel) -> None:
    """Make model(...) return the last hidden states, (B, T, H): a teacher is called like this."""

    def forward(self, **inputs):
        return self.base_model(**inputs, use_cache=False).last_hidden_state

    model.forward = types.MethodType(forward, model)


def return_loss(model: PreTrainedModel) -> None:
    """Make model(..., loss_inputs=LossInputs) return {"loss": sum, "metrics": sums}.

    Without an objective it returns the most probable id at every target position. The head module's own forward becomes the fused loss, because only inside a call of that module
    does ZeRO-3 gather its weight. Raises ValueError where the head is replaced by a full copy.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear | TrainableTokensWrapper):
        raise ValueError(
            f"the student's head is a {type(head).__name__}; wanted a plain Linear: leave the head "
            "out of lora_target_modules"
        )

    read_head = head_reader(model)

    def head_forward(hidden: Tensor, labels: Tensor, inputs: LossInputs, own: Tensor | None = None):
        if inputs.objective is None:
            return most_probable(hidden, read_head(), inputs.vocabulary)
        return loss_by_author(hidden, labels, read_head(), inputs, own)

    def forward(self, input_ids, position_ids, loss_inputs: LossInputs, **_):
        objective = loss_inputs.hidden
        head = self.get_output_embeddings()
        ours = [student for student, _ in objective.layers] if objective else []
        with layer_states(self, ours) as states:
            hidden = self.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).last_hidden_state  # (B, T, H)
        positions, labels = target_positions(loss_inputs.labels)
        if loss_inputs.objective is None:
            return head(hidden[positions], labels, loss_inputs)
        own = None if loss_inputs.own is None else loss_inputs.own[positions]  # (N,)
        loss, by_data, by_student = head(hidden[positions], labels, loss_inputs, own)
        between = by_data.new_zeros(2)  # of the data, of the student's own answers
        if objective:
            chosen = [states.get(layer, hidden)[positions] for layer in ours]  # (N, H) each
            between = hidden_loss(self, chosen, loss_inputs.teacher_layers, objective, own)
            loss = loss + objective.weight * between.sum()
        between = between.detach()
        chosen = [by_student[METRICS.index(name)] for name in (*ON_POLICY_METRICS, "tokens")]
        metrics = [*by_data, between[0], *chosen[:-1], between[1], chosen[-1]]
        return {"loss": loss, "metrics": torch.stack(metrics)}

    head.forward = head_forward
    model.forward = types.MethodType(forward, model)


def loss_by_author(
    hidden: Tensor, labels: Tensor, head: Head, inputs: LossInputs, own: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sums over the data's tokens, sums over the student's own), METRICS each.

    On its `own` tokens, (N,) bool, the divergence is all: a student learns nothing from being told
    to write what it wrote.
    """
    objective, vocabulary, teacher = inputs.objective, inputs.vocabulary, inputs.teacher
    if own is None:
        loss, sums = linear_distillation_loss(hidden, labels, head, objective, vocabulary, teacher)
        return loss, sums, torch.zeros_like(sums)
    found = []
    for tokens, wanted in ((own, replace(objective, soft_weight=1.0)), (~own, objective)):
        signal = replace(teacher, hidden=teacher.hidden[tokens])
        parts = hidden[tokens], labels[tokens], head, wanted, vocabulary, signal
        if found and not len(parts[1]):  # a call costs a trained head a gradient of its own
            return found[0], torch.zeros_like(found[1]), found[1]
        found += linear_distillation_loss(*parts)
    on_policy_loss, own_sums, loss, sums = found
    return on_policy_loss + loss, sums, own_sums


def most_probable(hidden: Tensor, head: Head, vocabulary: int) -> Tensor:
    """(N,) ids after (N, H) states; the head's scale and soft-cap change no order."""
    logits = hidden.float() @ head.weight[:vocabulary].float().T  # (N, V)
    if head.bias is not None:
        logits += head.bias[:vocabulary].float()
    return logits.argmax(-1)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The CausalLM itself, inside PEFT's wrapper where there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
