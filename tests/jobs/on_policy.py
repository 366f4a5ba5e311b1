"""Run steps with on-policy rows through the real Trainer: many cells in one start of 1 or 2 ranks.

torchrun --nproc-per-node 2 tests/jobs/on_policy.py WORK

WORK/on_policy.json is a list of cells, see `Cell` in gradients.py. Writes WORK/<name>.pt for each.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from kd.data.encoding import encode_rows
from kd.data.packing import Collator
from kd.data.tokenizer import load_tokenizer
from kd.distributed import all_gather, barrier, rank, world_size
from kd.models.heads import causal_lm
from kd.run.exit import leave
from kd.settings.distillation import Objective, OnPolicySettings
from kd.training.on_policy import OnPolicyRows
from kd.training.rollouts import RolloutGenerator
from tests.jobs.gradients import (
    OBJECTIVE,
    Cell,
    Recorder,
    hidden_objective,
    load_student,
    make_teacher,
    training_settings,
)
from tests.small import small_rows

ROWS, FRACTION = 16, 0.5
LENGTHS = [40, 3]  # most tokens of an answer, by rank


class Keeper(Recorder):
    """Keep the micro-batches of every step with the completions in them."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.filled: list[list[dict[str, torch.Tensor]]] = []

    def with_on_policy_rows(self, batches):
        filled = super().with_on_policy_rows(batches)
        self.filled.append([dict(batch) for batch in filled])
        return filled


def steps(work: Path, cell: Cell) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()  # that of the cell before
    tokenizer = load_tokenizer(str(work / "student"))
    rows, _ = encode_rows(small_rows(ROWS), tokenizer, 512)
    args = training_settings(work, cell)
    student = load_student(work, cell, tokenizer)
    engine = "continuous" if "continuous" in cell.name else "generate"
    length = LENGTHS[args.process_index]
    settings = OnPolicySettings(FRACTION, max_new_tokens=length, generation_engine=engine)
    collator = Collator(tokenizer.pad_token_id)
    generator = RolloutGenerator(causal_lm(student), settings, tokenizer)
    trainer = Keeper(
        model=student,
        args=args,
        train_dataset=[[row] for row in rows],
        data_collator=collator,
        processing_class=tokenizer,
        objective=Objective(**OBJECTIVE),
        vocab_size=len(tokenizer),
        teacher=make_teacher(work, cell, args.device, student),
        hidden=hidden_objective(cell),
        on_policy_rows=OnPolicyRows(settings, generator, collator, 512),
    )
    trainer.train()
    filled = all_gather(trainer.filled)
    return {
        "gradients": trainer.found,
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        # by step: the micro-batches of all ranks in the order of the rows
        "filled": [
            [batch for micro in zip(*(rank[n] for rank in filled), strict=True) for batch in micro]
            for n in range(cell.steps)
        ],
    }


def main() -> None:
    work = Path(sys.argv[1])
    if world_size() > 1:
        deepspeed.init_distributed("gloo")
    for cell in json.loads((work / "on_policy.json").read_text()):
        found = steps(work, Cell(**cell))
        if rank() == 0:
            torch.save(found, work / f"{cell['name']}.pt")


if __name__ == "__main__":
    main()
    barrier()
    leave(0)
