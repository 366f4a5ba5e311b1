"""What a training prints while it runs: one readable line per log, and one bar on a terminal.

TensorBoard and the `trainer_state.json` of a checkpoint have all figures.
"""

import sys

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class Console(TrainerCallback):
    """Prints the logs of a training on rank 0, instead of Transformers' dictionaries.

    `parts`: whether the loss has several terms, so that the divergence is a figure of its own.
    """

    def __init__(self, parts: bool) -> None:
        self.parts = parts
        self.bar: tqdm | None = None

    @classmethod
    def instead_of_theirs(cls, trainer: Trainer, parts: bool) -> "Console":
        """Replace the callbacks with which Transformers prints logs and shows a bar."""
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        console = cls(parts)
        trainer.add_callback(console)
        return console

    def on_step_end(self, args, state, control, **_) -> None:
        """Move the bar; a log file has none, since it has the lines."""
        if not state.is_world_process_zero or args.disable_tqdm or not sys.stderr.isatty():
            return
        if self.bar is None:
            begin = state.global_step - 1
            self.bar = tqdm(total=state.max_steps, initial=begin, desc="training", unit="step")
        self.bar.update(state.global_step - self.bar.n)

    def close_bar(self) -> None:
        """Remove the bar, so that another can take its place; the next step shows it again."""
        if self.bar is not None:
            self.bar.leave = False
            self.bar.close()
            self.bar = None

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **_) -> None:
        """Print the line of a log."""
        shown = {k: v for k, v in (logs or {}).items() if self.parts or "divergence" not in k}
        line = log_line(shown, state.global_step, state.max_steps)
        if state.is_world_process_zero and line:
            with tqdm.external_write_mode():
                print(line, flush=True)

    def on_train_end(self, args, state, control, **_) -> None:
        """Remove the bar."""
        self.close_bar()


def log_line(logs: dict[str, float], step: int, last: int) -> str:
    """The line of a training step, of an evaluation or of the end of a training; else empty."""
    if "train_runtime" in logs:
        return f"trained to step {step} of {last} in {duration(logs['train_runtime'])}"
    if "eval_loss" in logs:
        means = {name.removeprefix("eval_"): value for name, value in logs.items()}
        return f"held out, after step {step}: {figures(means)}"
    return f"step {step} of {last}: {figures(logs)}" if "loss" in logs else ""


def figures(logs: dict[str, float]) -> str:
    """The figures by which a reader follows a run, each with its unit."""
    shown = {
        "loss": "loss {:.4g}",
        "divergence": "divergence {:.4g}",
        "top1_agreement": "agreement {:.1%}",
        "learning_rate": "learning rate {:.2g}",
        "target_tokens_per_second": "{:,.0f} tokens/s",
        "memory_gib": "{:.2f} GiB",
    }
    found = [text.format(logs[name]) for name, text in shown.items() if name in logs]
    return ", ".join(found)


def duration(seconds: float) -> str:
    """Seconds in the units of a person: 3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
