"""Cost of logging: the same steps with TensorBoard at the default interval, and without any log.

python benchmarks/log_cost.py --json benchmarks/results/log_cost_cpu.json

One process distils the shipped teacher into random weights. Both variants alternate; the fastest
run of each counts. `log_share` is the time spent in the log calls divided by the time of the run.
Other processes on the machine disturb it less than they disturb the difference of two runs.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kd.data.encoding import EncodedRow
from kd.data.packing import Collator
from kd.data.tokenizer import load_tokenizer
from kd.recipe import parse, setting
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.settings.training import TrainingSettings
from kd.settings.training_arguments import training_arguments
from kd.teachers.live import LiveTeacher
from kd.training.tensorboard import open_writer
from kd.training.trainer import DistillationTrainer

TEACHER = str(Path(__file__).parents[1] / "data/quickstart/teacher")


@dataclass
class BenchmarkSettings:
    steps: int = setting(60, "Optimizer steps per run.")
    rows: int = setting(8, "Rows per step.")
    length: int = setting(128, "Tokens per row.")
    repeats: int = setting(3, "Number of repetitions; the fastest of each variant counts.")
    json: str | None = setting(None, "Output file.")


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    runs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(settings.repeats):
        for logged in runs:
            runs[logged].append(seconds_of_training(settings, logged))
    on, off = min(runs[True]), min(runs[False])
    metrics = {
        "with_log_s": on[0],
        "without_log_s": off[0],
        "on_over_off": on[0] / off[0],
        "log_share": on[1] / on[0],
        "logging_steps": int(TrainingSettings.logging_steps),
        "step_s": on[0] / settings.steps,
        "steps": settings.steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(metrics, indent=1))
    if settings.json:
        Path(settings.json).write_text(json.dumps(metrics, indent=1) + "\n")


def seconds_of_training(settings: BenchmarkSettings, logged: bool) -> tuple[float, float]:
    """(seconds of all steps but the first, seconds of these spent in log calls)."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, logged, folder)
        inside, begun = 0.0, None
        log = trainer.log

        def timed_log(*args, **kw):
            nonlocal inside
            begin = time.perf_counter()
            log(*args, **kw)
            inside += time.perf_counter() - begin

        step = trainer.training_step

        def noted_step(*args, **kw):
            nonlocal begun
            loss = step(*args, **kw)
            begun = begun or time.perf_counter()
            return loss

        trainer.log, trainer.training_step = timed_log, noted_step
        trainer.train()
        return time.perf_counter() - begun, inside


def make_trainer(settings: BenchmarkSettings, logged: bool, folder: str) -> DistillationTrainer:
    training = training_arguments(
        output_dir=folder,
        global_batch_size=settings.rows,
        max_steps=settings.steps,
        logging_strategy="steps" if logged else "no",
        report_to=["tensorboard"] if logged else ["none"],
        save_strategy="no",
        disable_tqdm=True,
    )
    tokenizer = load_tokenizer(TEACHER)
    torch.manual_seed(0)
    model = ModelSettings(dtype="float32")
    ids = torch.randint(len(tokenizer), (settings.rows * settings.steps, settings.length)).tolist()
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TEACHER)),
        args=training,
        train_dataset=[[EncodedRow.from_labels(row, list(row))] for row in ids],
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        objective=Objective(soft_weight=0.5),
        vocab_size=len(tokenizer),
        teacher=LiveTeacher(TeacherSettings(teacher=TEACHER), model, training.device),
    )
    open_writer(trainer, f"{folder}/tensorboard", None)
    return trainer


if __name__ == "__main__":
    main()
