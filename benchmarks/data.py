"""Rows per second from files to batches, ours and TRL's SFTTrainer on the same rows.

python benchmarks/data.py --quick --json benchmarks/results/data_cpu.json

The rows are conversations of several turns: questions about Python objects, answered by their
docstrings. Both sides must produce the same tokens and the same targets. `prepare` goes from a file
of rows to packed tokens (ours: cache written), `again` is a second start, `load` goes from there to
padded batches. `prepare_cpu_s` is the CPU time of all processes, which other jobs on the machine
disturb least. TRL 1.16.0 is measured where it is installed (pip install --no-deps trl==1.16.0);
otherwise its columns are null. The share of a step is measured with the shipped small model.
"""

import importlib.util
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from texts import read_docs
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from kd.data.encoding import ENCODE_BATCH
from kd.data.packing import Collator
from kd.data.row_cache import RowSettings, tokenised_rows
from kd.data.tokenised_rows import TokenisedRows
from kd.data.workers import MIN_BATCHES
from kd.recipe import parse, setting
from kd.settings.distillation import Objective
from kd.settings.training_arguments import training_arguments
from kd.training.trainer import DistillationTrainer

MODEL = "data/quickstart/student"
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BATCH = 8
TIMES = ("prepare_s", "prepare_cpu_s", "again_s", "load_s")


@dataclass
class BenchmarkSettings:
    quick: bool = setting(False, "Use 2 000 conversations: 2 minutes on two cores.")
    rows: int = setting(20_000, "Number of conversations.")
    max_length: int = setting(1024, "Maximum number of tokens per row.")
    steps: int = setting(6, "Training steps to measure the share of a step.")
    repeats: int = setting(3, "Number of repetitions, each without a cache; the best time counts.")
    json: str | None = setting(None, "Output file.")


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    count = 2_000 if settings.quick else settings.rows
    cores = len(os.sched_getaffinity(0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as work:
        path = write_conversations(Path(work) / "rows.jsonl", count)
        found = importlib.util.find_spec("trl") is not None
        # Small data uses one worker.
        numbers = sorted({1, cores if count >= MIN_BATCHES * ENCODE_BATCH else 1})
        implementations = (
            partial(ours, marked=True),
            partial(ours, marked=False),
            *([trl] if found else []),
        )
        runs = [(run, workers) for run in implementations for workers in numbers]
        turns = []
        for turn in range(settings.repeats):
            folder = f"{work}/{turn}"
            turns.append([run(path, folder, settings.max_length, n) for run, n in runs])
        report = {
            "rows": count,
            "max_length": settings.max_length,
            "batch": BATCH,
            "cores": cores,
            "torch": torch.__version__,
            "datasets": datasets.__version__,
            "repeats": settings.repeats,
            "preparation": [best(rows) for rows in zip(*turns, strict=True)],
            "step": share_of_a_step(path, work, settings.steps),
        }
    check_equal_tokens(report["preparation"])
    for row in report["preparation"]:
        print("  ".join(f"{key} {shown(value)}" for key, value in row.items()))
    print("  ".join(f"{key} {shown(value)}" for key, value in report["step"].items()))
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")


def best(rows: tuple[dict, ...]) -> dict:
    """The best of each time over all repetitions, and the rates that follow."""
    row = rows[0] | {key: min(r[key] for r in rows) for key in TIMES}
    row["prepare_rows_per_s"] = row["rows"] / row["prepare_s"]
    row["load_rows_per_s"] = row["rows"] / row["load_s"]
    row["load_ms_per_batch"] = 1000 * row["load_s"] / row["batches"]
    return row


def write_conversations(path: Path, count: int) -> str:
    """Conversations of one to five questions, answered by whole docstrings."""
    docs = read_docs(300)
    draw = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            messages = []
            for doc in draw.sample(docs, draw.randint(1, 5)):
                messages.append({"role": "user", "content": f"What does {doc.name} do?"})
                messages.append({"role": "assistant", "content": doc.text})
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def load_tokenizer(marked: bool) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if marked:
        tokenizer.chat_template = MARKED
    return tokenizer


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def cpu_seconds() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in found)


def ours(path: str, work: str, max_length: int, workers: int, marked: bool) -> dict:
    tokenizer = load_tokenizer(marked)

    def prepare() -> TokenisedRows:
        rows = tokenised_rows(
            [{"path": path}],
            RowSettings(max_length),
            tokenizer,
            f"{work}/cache-{marked}-{workers}",
            workers,
            progress=False,
        )
        return rows.packed(max_length)

    before = cpu_seconds()
    first, rows = timed(prepare)
    cpu = cpu_seconds() - before
    again, rows = timed(prepare)
    loader = DataLoader(rows, BATCH, collate_fn=Collator(tokenizer.pad_token_id))
    name = "ours, template with markers" if marked else "ours, template without markers"
    return table_row(name, workers, rows.report.kept, first, cpu, again, loader)


def trl(path: str, work: str, max_length: int, workers: int) -> dict:
    from trl import SFTConfig, SFTTrainer

    seconds, cpu = [], []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kw):
            before = cpu_seconds()
            spent, found = timed(lambda: super(Timed, self)._prepare_dataset(*args, **kw))
            seconds.append(spent)
            cpu.append(cpu_seconds() - before)
            return found

    args = SFTConfig(
        output_dir=f"{work}/trl",
        max_length=max_length,
        packing=True,
        assistant_only_loss=True,
        dataset_num_proc=workers if workers > 1 else None,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for _ in range(2):
        start = time.perf_counter()
        raw = datasets.load_dataset(
            "json", data_files=path, split="train", cache_dir=f"{work}/trl-cache-{workers}"
        )
        read = time.perf_counter() - start
        trainer = Timed(
            model=model, args=args, train_dataset=raw, processing_class=load_tokenizer(True)
        )
        seconds[-1] += read
    loader = DataLoader(trainer.train_dataset, BATCH, collate_fn=trainer.data_collator)
    return table_row(
        "TRL 1.16.0, template with markers",
        workers,
        len(raw),
        seconds[0],
        cpu[0],
        seconds[1],
        loader,
    )


def table_row(
    name: str,
    workers: int,
    kept: int,
    first: float,
    cpu: float,
    again: float,
    loader: DataLoader,
) -> dict:
    """One row of the table: times, and the counts of tokens and targets."""

    def load() -> tuple[int, int]:
        tokens = targets = 0
        for batch in loader:
            labels = batch["labels"]
            tokens += int((batch["input_ids"] != loader.collate_fn.pad_token_id).sum())
            targets += int((labels != -100).sum())
        return tokens, targets

    tokens, targets = load()  # untimed: loads libraries and warms the disk cache
    seconds, _ = timed(lambda: [len(batch) for batch in loader])
    return {
        "name": name,
        "workers": workers,
        "rows": kept,
        "tokens": tokens,
        "targets": targets,
        "batches": len(loader),
        "prepare_s": first,
        "prepare_cpu_s": cpu,
        "again_s": again,
        "load_s": seconds,
    }


def check_equal_tokens(rows: list[dict]) -> None:
    """Assert that all implementations produced the same rows, tokens and targets."""
    for row in rows:
        for key in ("rows", "tokens", "targets"):
            assert row[key] == rows[0][key], (key, row, rows[0])


def share_of_a_step(path: str, work: str, steps: int) -> dict:
    """The share of a fine-tuning step that is spent on getting its batch."""
    tokenizer = load_tokenizer(False)
    rows = tokenised_rows(
        [{"path": path}], RowSettings(256), tokenizer, f"{work}/cache-step", progress=False
    ).packed(256)
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL),
        args=training_arguments(
            output_dir=f"{work}/out",
            global_batch_size=BATCH,
            max_steps=steps,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        objective=Objective(soft_weight=0.0),
        vocab_size=len(tokenizer),
    )
    train, _ = timed(trainer.train)
    load, _ = timed(
        lambda: [
            batch for batch, _ in zip(trainer.get_train_dataloader(), range(steps), strict=False)
        ]
    )
    return {
        "model": f"{trainer.model.num_parameters()} parameters, {BATCH} rows of 256 tokens, CPU",
        "step_ms": 1000 * train / steps,
        "batch_ms": 1000 * load / steps,
        "share_lost_to_data": load / train,
    }


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
