"""A teacher that runs in the training step, whole on every process or sharded over all of them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd.losses.fused import TeacherSignal
from kd.models.heads import backbone_only, head_of, layer_states, target_positions
from kd.models.quantized import has_own_layers
from kd.models.sharding import load_sharded, load_unsharded, without_zero_init
from kd.recipe import ModelSettings, TeacherSettings


class LiveTeacher:
    """Gives the hidden states at a batch's target positions, and the head that reads them."""

    def __init__(self, settings: TeacherSettings, model: ModelSettings, device: torch.device):
        self.sharded = settings.teacher_deepspeed is not None
        if self.sharded:
            self.call, self.module = load_sharded(
                settings.teacher,
                settings.teacher_deepspeed,
                model.attn_implementation,
                settings.teacher_dtype,
            )
        else:
            self.module = load_whole(settings, model, device)
            self.call = self.module

    @property
    def width(self) -> int:
        return self.module.config.get_text_config().hidden_size

    @contextlib.contextmanager
    def signal(
        self, batch: dict[str, Tensor], layers: list[int] | None = None
    ) -> Iterator[tuple[TeacherSignal, list[Tensor]]]:
        """(signal, (N, H) states of each of `layers`) of one micro-batch.

        The head stays gathered until the block ends.

        Every rank must call it equally often, also with no target token: a sharded teacher
        gathers its layers from all of them.
        """
        with torch.no_grad(), layer_states(self.module, layers or []) as states:
            hidden = self.call(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        positions, _ = target_positions(batch["labels"])
        chosen = [states.get(layer, hidden)[positions] for layer in layers or []]
        with self.gathered_head():
            yield TeacherSignal(hidden[positions], head_of(self.module)), chosen

    def gathered_head(self) -> contextlib.AbstractContextManager:
        if not self.sharded:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            list(self.module.get_output_embeddings().parameters())
        )


def load_whole(settings: TeacherSettings, model: ModelSettings, device: torch.device):
    """The unsharded teacher, frozen; a quantised one has the layers of the sharded one."""
    dtype = settings.teacher_dtype
    if has_own_layers(settings.teacher):
        teacher = load_unsharded(settings.teacher, model.attn_implementation, dtype, device)
        backbone_only(teacher)
        return teacher
    with without_zero_init():
        teacher = AutoModelForCausalLM.from_pretrained(
            settings.teacher,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=model.attn_implementation,
            device_map={"": device},
        )
    teacher.eval().requires_grad_(False)
    backbone_only(teacher)
    return teacher
