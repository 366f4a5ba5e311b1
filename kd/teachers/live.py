"""A teacher that runs in the training step: sharded over all processes, or whole on each of them.

Every forward of a sharded teacher gathers all of its layers, however few tokens it processes. It
therefore runs over as many micro-batches of a step at once as its workspace holds, and keeps their
hidden states.

B batch, T tokens, N target tokens, H hidden.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import Tensor

from kd.data.packing import bounds_of, side_by_side, to_device
from kd.distributed import all_max
from kd.losses.head import TeacherOutputs
from kd.models.blocks import blocks_in_parts, layer_states
from kd.models.frozen import load_teacher, student_base_forward
from kd.models.heads import causal_lm, head_reader, target_positions
from kd.models.liger import use_liger
from kd.models.sharding import load_sharded
from kd.settings.distillation import ModelSettings
from kd.settings.teacher import OWN_BASE, TeacherSettings

Outputs = tuple[TeacherOutputs, list[Tensor]]  # and the states, (N, H), of each requested layer


class LiveTeacher:
    """Computes hidden states at the target positions, and provides the head that reads them."""

    def __init__(
        self,
        settings: TeacherSettings,
        model: ModelSettings,
        device: torch.device,
        student: PeftModel | None = None,
    ):
        """Load the teacher; `student` is needed only for `teacher: self`.

        Raises ValueError for `teacher: self` without a student, and for an adapter that replaces
        the head.
        """
        self.device = device
        self.workspace = settings.workspace_bytes
        self.sharded = settings.sharding is not None
        if settings.teacher == OWN_BASE:
            if student is None:
                raise ValueError(
                    "teacher: self needs the student of a training run, and there is none; give "
                    "the name of the student's base"
                )
            self.call, self.module = student_base_forward(student), causal_lm(student)
        elif self.sharded:
            self.call, self.module = load_sharded(
                settings.teacher,
                settings.sharding,
                settings.teacher_sharded_over,
                model.attention,
                settings.teacher_dtype,
            )
        else:
            self.module = load_teacher(settings, model, device)
            self.call = self.module
        if settings.teacher != OWN_BASE:
            use_liger(self.module, model.liger_kernels)
        self.read_head = head_reader(self.module, adapters=settings.teacher != OWN_BASE)

    @property
    def width(self) -> int:
        """The hidden size H."""
        return self.module.config.get_text_config().hidden_size

    def outputs(
        self, batches: list[dict[str, Tensor]], layers: list[int] | None = None
    ) -> Iterator[contextlib.AbstractContextManager[Outputs]]:
        """One context per batch, in order: (teacher outputs, states (N, H) of each of `layers`).

        Inside a context the head is gathered. Collective for a sharded teacher: all ranks need
        equally many batches and must enter every context, even for batches without targets.
        """
        layers = layers or []
        for start, end, keep_head in self.passes(batches, len(layers)):
            kept = self.states(batches[start:end], layers)
            with contextlib.ExitStack() as head:
                for i in range(end - start):
                    # Popped, so that the states of a finished micro-batch are freed.
                    yield self.outputs_of(
                        *kept.pop(0),
                        head,
                        opens=i == 0 or not keep_head,
                        closes=i == end - start - 1 or not keep_head,
                    )

    def batch_outputs(
        self, batch: dict[str, Tensor], layers: list[int] | None = None
    ) -> contextlib.AbstractContextManager[Outputs]:
        """The context of a single batch."""
        return next(self.outputs([batch], layers))

    def passes(self, batches: list[dict[str, Tensor]], layers: int) -> list[tuple[int, int, bool]]:
        """Collective: (start, end, whether the head can stay gathered) of each forward.

        The longest micro-batch of all ranks decides, so the result is the same on every rank.
        """
        if not self.sharded or not batches:
            return [(i, i + 1, False) for i in range(len(batches))]
        shapes = torch.tensor([batch["input_ids"].shape for batch in batches], device=self.device)
        # Bytes per position: all states while the teacher runs, then those at the targets.
        position = (2 + layers) * self.width * self.module.dtype.itemsize
        head = self.module.get_output_embeddings().weight
        head_bytes = head.ds_numel * head.dtype.itemsize
        return [
            (start, end, positions * position + head_bytes <= self.workspace)
            for start, end, positions in groups(
                all_max(shapes).tolist(), self.workspace // position
            )
        ]

    @torch.no_grad()
    def states(self, batches: list[dict[str, Tensor]], layers: list[int]) -> list[tuple]:
        """Per batch, from one forward: (last states (N, H), [states (N, H) of each of `layers`]).

        The result is bit-identical to separate forwards, unless only some of the batches are
        packed: attention may then use another kernel for the others.
        """
        batches = [to_device(batch, self.device) for batch in batches]
        wide = side_by_side(batches)
        pieces = [tuple(batch["input_ids"].shape) for batch in batches]
        bounds = [bounds_of(batch) for batch in batches]
        targets = target_positions(wide["labels"])[0].split([rows for rows, _ in pieces])
        indices = [positions.nonzero(as_tuple=True) for positions in targets]

        def select(state: Tensor) -> list[Tensor]:  # (sum of B, T, H) to (N, H) of every batch
            parts = state.split([rows for rows, _ in pieces])
            return [part[index] for part, index in zip(parts, indices, strict=True)]

        inputs = {"input_ids": wide["input_ids"], "position_ids": wide["position_ids"]}
        apart = contextlib.nullcontext()
        if len(pieces) > 1:
            apart = blocks_in_parts(self.module, pieces, bounds)
        else:
            inputs |= bounds[0]
        with apart, layer_states(self.module, layers, select) as found:
            hidden = self.call(**inputs)
        last = select(hidden)
        chosen = [found.get(layer, last) for layer in layers]
        return [(state, [layer[i] for layer in chosen]) for i, state in enumerate(last)]

    @contextlib.contextmanager
    def outputs_of(
        self,
        hidden: Tensor,
        states: list[Tensor],
        head: contextlib.ExitStack,
        opens: bool,
        closes: bool,
    ) -> Iterator[Outputs]:
        """The context of one batch; hidden and the mapped layers' states are (N, H) each.

        `opens` gathers the head, `closes` releases it.
        """
        if opens and self.sharded:
            import deepspeed

            parameters = list(self.module.get_output_embeddings().parameters())
            head.enter_context(deepspeed.zero.GatheredParameters(parameters))
        try:
            yield TeacherOutputs(hidden, self.read_head()), states
        finally:
            if closes:
                head.close()


def groups(shapes: list[list[int]], most: int) -> Iterator[tuple[int, int, int]]:
    """Split (B, T) shapes into runs: (start, end, positions), at most `most` positions per run.

    Positions count all rows of a run, padded to its longest. A larger shape is a run by itself.
    """
    start = rows = longest = 0
    for i, (count, length) in enumerate(shapes):
        if i > start and (rows + count) * max(longest, length) > most:
            yield start, i, rows * longest
            start, rows, longest = i, 0, 0
        rows, longest = rows + count, max(longest, length)
    yield start, len(shapes), rows * longest
