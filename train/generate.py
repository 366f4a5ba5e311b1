"""Let a teacher answer prompts, and make training rows of its answers.

launch/cpu.sh train/generate.py --config recipes/small/a_answers.yaml

Writes raw.jsonl (every answer, appended at once: run the same command again to go on) and
train.jsonl (the rows to train on). The processes of a launch profile or of torchrun share the work.
"""

import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from kd.data.sources import check_sources, load_prompts
from kd.generation.engines import LocalEngine
from kd.generation.filters import training_rows, write_rows
from kd.generation.sampling import (
    GenerationSettings,
    Sample,
    answer_batch,
    compose_batches,
    cut_torn_lines,
    raw_file,
    read_raw,
    wanted_samples,
)
from kd.recipe import parse
from kd.training.checkpoint import write_record
from kd.training.exit import DONE, mark_done, run

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def main() -> None:
    (settings,) = parse(GenerationSettings, description=__doc__)
    check_sources(settings.sources)
    prompts = load_prompts(settings.sources, settings.mixture_seed)
    samples = wanted_samples(prompts, settings)
    if PROCESSES > 1:  # for barriers alone; one process may wait hours for another's last batch
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    raw = earlier_answers(settings)
    report_start(settings, len(prompts), samples, raw)
    generate_missing(settings, samples, set(raw))
    if RANK == 0:
        finish(settings, samples)


def earlier_answers(settings: GenerationSettings) -> dict[str, dict]:
    """What is in the raw files; every process sees the same, before any of them appends.

    There is no early way out of a finished run: where nothing is missing no model is loaded.
    """
    if RANK == 0:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        cut = cut_torn_lines(settings.output_dir)
        if cut:
            print(f"cut a torn last line of {cut} bytes")
        (Path(settings.output_dir) / DONE).unlink(missing_ok=True)
        write_record(settings.output_dir, [settings])
    barrier()
    raw = read_raw(settings.output_dir)
    barrier()
    return raw


def report_start(
    settings: GenerationSettings, prompts: int, samples: list[Sample], raw: dict[str, dict]
) -> None:
    """Say what there is and what is missing."""
    if RANK:
        return
    keys = {sample.key for sample in samples}
    distinct = len(samples) // settings.samples_per_prompt
    print(
        f"prompts: {prompts} read, {prompts - distinct} repeated\n"
        f"samples: {len(samples)} = {distinct} prompts x {settings.samples_per_prompt}; "
        f"{len(keys & set(raw))} there already"
    )
    foreign = len(set(raw) - keys)
    if foreign:
        print(f"raw files: {foreign} samples of other settings or prompts, left out of train.jsonl")


def generate_missing(settings: GenerationSettings, samples: list[Sample], known: set[str]) -> None:
    """Append the answers that are not `known`: this process's share of the unfinished batches."""
    batches = compose_batches(samples, settings.batch_size)
    unfinished = [batch for batch in batches if any(s.key not in known for s in batch)]
    if not unfinished:
        return
    mine = unfinished[RANK::PROCESSES]
    if mine:
        engine = load_engine(settings)
        with open(raw_file(settings.output_dir, RANK), "a") as file:
            for batch in tqdm(mine, desc="generating", unit="batch", disable=RANK > 0):
                answer_batch(batch, engine, settings, known, file)
    barrier()


def load_engine(settings: GenerationSettings) -> LocalEngine:
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return LocalEngine(
        settings.model,
        settings.dtype,
        device,
        settings.temperature,
        settings.top_p,
        settings.max_new_tokens,
        settings.system_prompt,
    )


def finish(settings: GenerationSettings, samples: list[Sample]) -> None:
    """Write train.jsonl and the done marker; show counts and two answers."""
    rows, report = training_rows(samples, read_raw(settings.output_dir))
    path = Path(settings.output_dir) / "train.jsonl"
    write_rows(path, rows)
    print(report)
    for row in (rows[0], rows[-1])[: len(rows)]:
        question, answer = (message["content"][:300] for message in row["messages"][-2:])
        print(f"\n> {question}\n{answer}")
    mark_done(settings.output_dir, asdict(report))
    print(f"\nsaved to {path}")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    run(main)
