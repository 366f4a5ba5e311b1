"""On-policy distillation: the first-step loss next to TRL's GKDTrainer, and the effect of a stage.

PYTHONPATH=TRL python benchmarks/on_policy.py --json benchmarks/results/on_policy_cpu.json

TRL is the folder of its package (pip install --no-deps --target TRL trl==1.16.0); without it the
first part is null. In the first part TRL trains one step, off-policy (lmbda 0) and on-policy (lmbda
1), and our trainer computes the loss of exactly the same tokens. Two differences are known and
accounted for: TRL divides by the target tokens of the data even where the student wrote other
tokens, so its loss grows with the answer length; and its label mask includes the line break after a
turn.

In the second part the quickstart's small student is first distilled on the data, then trained for
more steps, off-policy or on its own answers. All students are measured on held-out rows: the
divergence on the data's text, and on the text that the student generates for the same prompts.
Finished students stay in --out_dir; run the command again to continue.
"""

import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kd.data.encoding import EncodedRow, encode_rows
from kd.data.packing import Collator
from kd.data.tokenizer import load_tokenizer
from kd.losses.metrics import REPORTED
from kd.recipe import parse, setting
from kd.run.run_record import commit
from kd.settings.distillation import ModelSettings, Objective, OnPolicySettings
from kd.settings.teacher import TeacherSettings
from kd.settings.training_arguments import training_arguments
from kd.teachers.live import LiveTeacher
from kd.training.on_policy import OnPolicyRows
from kd.training.rollouts import RolloutGenerator
from kd.training.trainer import DistillationTrainer

TEACHER, STUDENT = "data/quickstart/teacher", "data/quickstart/student"
DATA, HELDOUT = (f"runs/quickstart/data/chat_{part}.jsonl" for part in ("train", "heldout"))
BETA = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}  # TRL's name of each
WAYS = {
    "off-policy, forward_kl": ["--divergence", "forward_kl"],
    "off-policy, reverse_kl": ["--divergence", "reverse_kl"],
    "on-policy, reverse_kl": ["--divergence", "reverse_kl", "--student_fraction", "1"],
}


@dataclass
class OnPolicyBenchmark:
    rows: int = setting(8, "Rows of the step that is compared with TRL.")
    seeds: list[int] = setting([0, 1, 2], "Seeds of the second part.")
    stage: bool = setting(True, "Run the second part.")
    first_steps: int = setting(150, "Off-policy steps of 16 rows that precede the stage.")
    steps: int = setting(60, "Steps of 16 rows per method.")
    new_tokens: int = setting(48, "Maximum number of tokens per generated answer.")
    heldout: int = setting(96, "Held-out rows.")
    minutes: float = setting(math.inf, "Start no training after this many minutes.")
    out_dir: str = setting("runs/on_policy", "Folder of the students.")
    json: str | None = setting(None, "Output file.")


def main() -> None:
    (settings,) = parse(OnPolicyBenchmark, description=__doc__)
    torch.set_num_threads(1)
    report = {
        "beside_trl": beside_trl(settings) if importlib.util.find_spec("trl") else None,
        "stage": stage(settings) if settings.stage else None,
        "settings": {k: v for k, v in vars(settings).items() if k not in ("json", "minutes")},
        "device": "cpu",
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(report, indent=1))
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")


def heldout_rows(count: int) -> list[dict]:
    with open(HELDOUT, encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def beside_trl(settings: OnPolicyBenchmark) -> list[dict]:
    """TRL's loss of a step and ours on the same tokens, off-policy and on-policy."""
    rows, tokenizer = heldout_rows(settings.rows), load_tokenizer(TEACHER)
    own, _ = encode_rows(rows, tokenizer, 256)
    found = []
    for divergence, beta in BETA.items():
        for way, share in (("off-policy", 0.0), ("on-policy", 1.0)):
            loss, batches = trl_step(rows, tokenizer, beta, share, settings.new_tokens)
            targets = sum(row.targets for batch in batches for row in batch)
            ours = our_step(batches, tokenizer, divergence, share > 0)
            counted = sum(row.targets for row in own) + len(own)  # plus the line breaks
            factor = counted / targets  # 1 off-policy
            row = {
                "divergence": divergence,
                "way": way,
                "trl": loss,
                "ours": ours,
                "target_tokens": targets,
                "tokens_that_trl_divides_by": counted,
                "trl_without_that_factor": loss * factor,
                "relative_difference": abs(loss * factor - ours) / ours,
            }
            found.append(row)
    return found


def trl_step(
    rows: list[dict], tokenizer, beta: float, share: float, new_tokens: int
) -> tuple[float, list[list[EncodedRow]]]:
    """(the loss that TRL logs for one step of two micro-batches, the rows of these)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    batches: list[list[EncodedRow]] = []

    class Recorder(GKDTrainer):
        def compute_loss(self, model, inputs, *args, **kw):
            batches.append(rows_of(*(inputs[k] for k in ("input_ids", "attention_mask", "labels"))))
            return super().compute_loss(model, inputs, *args, **kw)

    models = [AutoModelForCausalLM.from_pretrained(name).float() for name in (STUDENT, TEACHER)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorder(
            model=models[0],
            teacher_model=models[1],
            args=GKDConfig(
                output_dir=folder,
                use_cpu=True,
                lmbda=share,
                beta=beta,
                temperature=1.0,
                max_new_tokens=new_tokens,
                max_length=256,
                per_device_train_batch_size=len(rows) // 2,
                gradient_accumulation_steps=2,
                max_steps=1,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                bf16=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    return next(x["loss"] for x in trainer.state.log_history if "loss" in x), batches


def rows_of(ids: Tensor, mask: Tensor, labels: Tensor) -> list[EncodedRow]:
    return [
        EncodedRow.from_labels(i[m.bool()].tolist(), label[m.bool()].tolist())
        for i, m, label in zip(ids, mask, labels, strict=True)
    ]


def make_trainer(
    student: str,
    tokenizer,
    objective: Objective,
    settings: OnPolicySettings,
    rows: int,
    folder: str,
) -> DistillationTrainer:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    teacher = TeacherSettings(teacher=TEACHER, teacher_dtype="float32")
    collator = Collator(tokenizer.pad_token_id)
    generator = RolloutGenerator(model, settings, tokenizer)
    return DistillationTrainer(
        model=model,
        args=training_arguments(
            output_dir=folder,
            global_batch_size=rows,
            max_per_device_train_batch_size=rows,
            use_cpu=True,
            report_to=["none"],
        ),
        data_collator=collator,
        processing_class=tokenizer,
        objective=objective,
        vocab_size=len(tokenizer),
        teacher=LiveTeacher(teacher, ModelSettings(), torch.device("cpu")),
        on_policy_rows=OnPolicyRows(settings, generator, collator, 256),
    )


def our_step(batches: list[list[EncodedRow]], tokenizer, divergence: str, own: bool) -> float:
    """Our loss of one step on these rows; `own` marks them as student-generated."""
    with tempfile.TemporaryDirectory() as folder:
        objective = Objective(1.0, divergence)
        trainer = make_trainer(STUDENT, tokenizer, objective, OnPolicySettings(0.5), 4, folder)
        items, loss = sum(row.targets for batch in batches for row in batch), 0.0
        made = [
            trainer.on_policy_rows.collate(
                rows, range(len(rows)) if own else (), torch.device("cpu")
            )
            for rows in batches
        ]
        trainer.teacher_outputs = trainer.teacher_outputs_of(made)
        for batch in made:
            loss += trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).item()
    return loss


def stage(settings: OnPolicyBenchmark) -> list[dict]:
    """Means over the seeds whose students are finished, for each method."""
    started = time.monotonic()
    common = Path(settings.out_dir) / "first"
    train(STUDENT, common, settings, settings.first_steps, 0, ["--learning_rate", "1e-3"])
    found = [summary("none", [measured(common, settings)])]
    values: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed, (way, flags) in itertools.product(settings.seeds, WAYS.items()):
        folder = Path(settings.out_dir) / f"{way.replace(',', '').replace(' ', '_')}-seed{seed}"
        late = time.monotonic() - started > 60 * settings.minutes
        if late and not (folder / "done.json").exists():
            continue
        more = ["--mixture_seed", str(seed + 1), "--learning_rate", "3e-4", *flags]
        train(str(common), folder, settings, settings.steps, seed, more)
        values[way].append(measured(folder, settings))
    return found + [summary(way, of_seeds) for way, of_seeds in values.items() if of_seeds]


def train(
    student: str, folder: Path, settings: OnPolicyBenchmark, steps: int, seed: int, flags: list[str]
) -> None:
    """Train by the real command line, unless it is finished."""
    data = json.dumps([{"path": DATA, "count": 16 * max(steps, settings.first_steps)}])
    command = [sys.executable, "train/distill.py", "--student", student, "--teacher", TEACHER]
    command += ["--data", data, "--max_length", "256", "--global_batch_size", "16"]
    command += ["--max_per_device_train_batch_size", "16", "--max_steps", str(steps)]
    command += ["--max_new_tokens", str(settings.new_tokens), "--seed", str(seed)]
    command += ["--use_cpu", "true", "--save_strategy", "no", "--report_to", "none"]
    command += ["--disable_tqdm", "true", "--output_dir", str(folder), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measured(folder: Path, settings: OnPolicyBenchmark) -> dict[str, float]:
    """Means over the tokens of held-out rows, and over student-generated tokens."""
    tokenizer = load_tokenizer(str(folder))
    rows, _ = encode_rows(heldout_rows(settings.heldout), tokenizer, 256)
    metrics = {}
    with tempfile.TemporaryDirectory() as work:
        for divergence in ("forward_kl", "reverse_kl"):
            drawing = OnPolicySettings(1.0, settings.new_tokens)
            trainer = make_trainer(
                str(folder), tokenizer, Objective(1.0, divergence), drawing, len(rows), work
            )
            batch = trainer.data_collator([[row] for row in rows])
            (own,), _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
            for text, inputs in (("data", batch), ("own", own)):
                trainer.teacher_outputs = trainer.teacher_outputs_of([inputs])
                with torch.no_grad():
                    _, out = trainer.compute_loss(trainer.model.eval(), inputs, True, 1)
                sums = dict(zip(REPORTED, out["metrics"].tolist(), strict=True))
                mark = "on_policy_" if text == "own" else ""
                tokens = sums[f"{mark}tokens"]
                metrics[f"{divergence} over {text} text"] = sums[f"{mark}divergence"] / tokens
                teacher = sums[f"{mark}teacher_cross_entropy"] / tokens
                metrics[f"teacher's cross-entropy of {text} text"] = teacher
            (_, length, cut), answers = trainer.metrics.completions, len(rows)
            metrics |= {"tokens of an answer": length / answers, "share cut": cut / answers}
    return metrics


def summary(way: str, values: list[dict[str, float]]) -> dict:
    means = {name: statistics.mean(one[name] for one in values) for name in values[0]}
    return {"stage": way, "seeds": len(values), **means, "values": values}


if __name__ == "__main__":
    main()
