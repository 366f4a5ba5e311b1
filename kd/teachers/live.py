"""A teacher that runs in the training step: sharded over all processes, or whole on each of them.

A sharded teacher gathers all its layers at every forward, whatever the tokens, so it runs over as
many micro-batches of a step at once as its workspace holds, and keeps their hidden states.
B batch, T tokens, N target tokens, H hidden.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from kd.data.packing import side_by_side
from kd.losses.fused import TeacherSignal
from kd.models.blocks import in_pieces, layer_states
from kd.models.frozen import base_of_student, load_whole
from kd.models.heads import causal_lm, head_reader, target_positions
from kd.models.sharding import load_sharded
from kd.settings.distillation import OWN_BASE, ModelSettings, TeacherSettings

Signal = tuple[TeacherSignal, list[Tensor]]  # and the (N, H) states of every layer asked for


class LiveTeacher:
    """Gives the hidden states at target positions, and the head that reads them."""

    def __init__(
        self,
        settings: TeacherSettings,
        model: ModelSettings,
        device: torch.device,
        student: PeftModel | None = None,
    ):
        """`student` is looked at only where the teacher is its own base."""
        self.device = device
        self.workspace = settings.teacher_workspace_mb * 2**20
        self.sharded = settings.teacher_deepspeed is not None
        if settings.teacher == OWN_BASE:
            if student is None:
                raise ValueError(
                    "teacher: self is the student of a training run, and there is none; give the "
                    "base's name"
                )
            self.call, self.module = base_of_student(student), causal_lm(student)
        elif self.sharded:
            self.call, self.module = load_sharded(
                settings.teacher,
                settings.teacher_deepspeed,
                model.attn_implementation,
                settings.teacher_dtype,
            )
        else:
            self.module = load_whole(settings, model, device)
            self.call = self.module
        self.read_head = head_reader(self.module, adapters=settings.teacher != OWN_BASE)

    @property
    def width(self) -> int:
        return self.module.config.get_text_config().hidden_size

    def signals(
        self, batches: list[dict[str, Tensor]], layers: list[int] | None = None
    ) -> Iterator[contextlib.AbstractContextManager[Signal]]:
        """One context for each of `batches`, in turn; inside it the head is gathered.

        Every rank must have equally many batches and enter all contexts, also those of batches with
        no target token: a sharded teacher gathers its layers from all of them.
        """
        layers = layers or []
        for start, end, keep_head in self.passes(batches, len(layers)):
            kept = self.states(batches[start:end], layers)
            with contextlib.ExitStack() as head:
                for i in range(end - start):
                    # Popped, so that states are freed as soon as their micro-batch is done with.
                    yield self.signal_of(
                        *kept.pop(0),
                        head,
                        opens=i == 0 or not keep_head,
                        closes=i == end - start - 1 or not keep_head,
                    )

    def signal(
        self, batch: dict[str, Tensor], layers: list[int] | None = None
    ) -> contextlib.AbstractContextManager[Signal]:
        """The context of one batch alone."""
        return next(self.signals([batch], layers))

    def passes(self, batches: list[dict[str, Tensor]], layers: int) -> list[tuple[int, int, bool]]:
        """(start, end, whether the head can stay gathered) of the batches of each forward.

        The same on every rank, whose micro-batches differ in length: what counts is the longest.
        """
        if not self.sharded or not batches:
            return [(i, i + 1, False) for i in range(len(batches))]
        shapes = torch.tensor([batch["input_ids"].shape for batch in batches], device=self.device)
        dist.all_reduce(shapes, dist.ReduceOp.MAX)
        # The states of all positions while the teacher runs, then those of targets beside them.
        position = (2 + layers) * self.width * self.module.dtype.itemsize
        head = self.module.get_output_embeddings().weight
        head_bytes = head.ds_numel * head.dtype.itemsize
        return [
            (start, end, positions * position + head_bytes <= self.workspace)
            for start, end, positions in groups(shapes.tolist(), self.workspace // position)
        ]

    @torch.no_grad()
    def states(self, batches: list[dict[str, Tensor]], layers: list[int]) -> list[tuple]:
        """[((N, H) last states, [(N, H) of each of `layers`])] of every batch, by one forward.

        They are what each batch gives alone, to the last bit; where only some are packed, attention
        may take another kernel for the others.
        """
        wide = side_by_side([{k: v.to(self.device) for k, v in b.items()} for b in batches])
        pieces = [tuple(batch["input_ids"].shape) for batch in batches]
        targets = target_positions(wide["labels"])[0].split([rows for rows, _ in pieces])
        indices = [positions.nonzero(as_tuple=True) for positions in targets]

        def select(state: Tensor) -> list[Tensor]:  # (sum of B, T, H) to (N, H) of every batch
            parts = state.split([rows for rows, _ in pieces])
            return [part[index] for part, index in zip(parts, indices, strict=True)]

        apart = in_pieces(self.module, pieces) if len(pieces) > 1 else contextlib.nullcontext()
        with apart, layer_states(self.module, layers, select) as found:
            hidden = self.call(input_ids=wide["input_ids"], position_ids=wide["position_ids"])
        last = select(hidden)
        chosen = [found.get(layer, last) for layer in layers]
        return [(state, [layer[i] for layer in chosen]) for i, state in enumerate(last)]

    @contextlib.contextmanager
    def signal_of(
        self,
        hidden: Tensor,
        states: list[Tensor],
        head: contextlib.ExitStack,
        opens: bool,
        closes: bool,
    ) -> Iterator[Signal]:
        if opens and self.sharded:
            import deepspeed

            parameters = list(self.module.get_output_embeddings().parameters())
            head.enter_context(deepspeed.zero.GatheredParameters(parameters))
        try:
            yield TeacherSignal(hidden, self.read_head()), states
        finally:
            if closes:
                head.close()


def groups(shapes: list[list[int]], most: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, positions) of runs of (B, T) shapes, each of at most `most` positions or alone.

    Positions are those of all rows padded to the longest.
    """
    start = rows = longest = 0
    for i, (count, length) in enumerate(shapes):
        if i > start and (rows + count) * max(longest, length) > most:
            yield start, i, rows * longest
            start, rows, longest = i, 0, 0
        rows, longest = rows + count, max(longest, length)
    yield start, len(shapes), rows * longest
