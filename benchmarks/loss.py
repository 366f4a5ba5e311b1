"""Time and peak memory of the distillation loss: ours, TRL's and Liger's kernels, naive PyTorch.

python benchmarks/loss.py --quick --json benchmarks/results/loss_cpu.json

Forward and backward to the student's hidden states, with both heads frozen. As in published models,
heads have a multiple of 512 rows; the peers, which know no other size of a vocabulary, get the
first rows of them. The implementations alternate in one process and must agree; the best time of
each counts. `limit_s` is the time of the three matrix products alone, aligned and with the faster
of two tile sizes. Memory is the peak above the inputs; on a CPU each implementation is measured in
a new process. TRL 1.16.0 is measured where it is installed (pip install --no-deps trl==1.16.0 is
enough for its kernel), Liger 0.8.5 where it is installed and CUDA is available. Columns of a
missing implementation are null.
"""

import gc
import importlib.util
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from kd.losses import fused
from kd.losses.divergences import DIVERGENCES
from kd.losses.fused import linear_distillation_loss
from kd.losses.head import Head, TeacherOutputs, padded_width
from kd.planning.machine import available_memory
from kd.recipe import parse, setting
from kd.settings.distillation import Objective

HEAD_ROWS = 512  # heads have a multiple of these: 152 064 rows for 151 665 ids
MIXTURE = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
WIDTHS = {"1.5B->0.5B": (1536, 896), "32B->14B": (5120, 5120)}  # teacher, student
QUICK = [("1.5B->0.5B", 1024, "forward_kl"), ("1.5B->0.5B", 256, "jensen_shannon")]


@dataclass
class BenchmarkSettings:
    quick: bool = setting(
        False, "Measure one model pair and two divergences: 5 minutes on two cores."
    )
    pairs: list[str] = setting(
        list(WIDTHS), f"Pairs: {', '.join(WIDTHS)}, or hidden sizes, teacher->student: 64->32."
    )
    tokens: list[int] = setting([1024, 4096, 16384], "Numbers of target tokens.")
    divergences: list[str] = setting(
        ["forward_kl", "reverse_kl", "jensen_shannon"], f"Divergences: {', '.join(DIVERGENCES)}."
    )
    vocabularies: list[int] = setting([152_064], "Vocabulary sizes: rows of both heads.")
    loss_workspace_mb: int = setting(512, "Workspace of the loss in MiB, as in a recipe.")
    tile: int = setting(fused.TILE, "Maximum number of tokens per tile on a CPU.")
    repeats: int = setting(3, "Number of repetitions; the best time of each implementation counts.")
    json: str | None = setting(None, "Output file.")
    peak_of: str | None = setting(None, "Internal: print the peak of one implementation in MiB.")


@dataclass(frozen=True)
class Cell:
    shape: str
    teacher_width: int
    student_width: int
    tokens: int
    vocabulary: int
    divergence: str
    loss_workspace_mb: int
    tile: int


@dataclass
class Inputs:
    """Hidden states (N, H) and heads (V or more, H); logits have a standard deviation of 2."""

    vocabulary: int
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor

    @property
    def weight(self) -> Tensor:
        return self.head[: self.vocabulary]

    @property
    def teacher_weight(self) -> Tensor:
        return self.teacher_head[: self.vocabulary]

    def first(self, tokens: int) -> "Inputs":
        cut = {k: vars(self)[k][:tokens] for k in ("hidden", "teacher_hidden", "labels")}
        return replace(self, **cut)


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    if settings.peak_of:
        name, cell = json.loads(settings.peak_of)
        print(peak_in_this_process(name, Cell(**cell)))
        return
    rows = []
    for cell in cells(settings):
        rows.append(measure(cell, settings.repeats))
        print_row(rows[-1])
        if settings.json:
            Path(settings.json).write_text(json.dumps(rows, indent=1) + "\n")


def cells(settings: BenchmarkSettings) -> list[Cell]:
    grid = [
        (pair, tokens, divergence)
        for pair in settings.pairs
        for tokens in settings.tokens
        for divergence in settings.divergences
    ]
    chosen = QUICK if settings.quick else grid
    made = []
    for vocabulary, (pair, tokens, divergence) in product(settings.vocabularies, chosen):
        widths = WIDTHS.get(pair) or tuple(int(width) for width in pair.split("->"))
        shape = f"{pair} H={widths[0]}->{widths[1]} N={tokens} V={vocabulary}"
        limits = (settings.loss_workspace_mb, settings.tile)
        made.append(Cell(shape, *widths, tokens, vocabulary, divergence, *limits))
    return made


def measure(cell: Cell, repeats: int) -> dict[str, Any]:
    """One row: best times, peaks, and the machine they were measured on."""
    inputs = make_inputs(cell)
    limits = sorted({cell.tile, 1024})  # tokens per matrix product
    runnable = {name: run for name, run in IMPLEMENTATIONS.items() if can_run(name, cell)}
    times: dict[str | int, list[float]] = {name: [] for name in [*runnable, *limits]}
    gradients: dict[str, Tensor] = {}
    for turn in range(-1, repeats):
        few = 2 if turn < 0 else cell.tokens  # the first, untimed run loads the libraries
        part = inputs.first(few)
        for name, run in runnable.items():
            seconds, gradient = timed(run, part, cell)
            if turn >= 0:
                times[name].append(seconds)
                gradients.setdefault(name, gradient)
            del gradient
        for tile in limits:
            seconds = time_products(part, min(tile, few))
            if turn >= 0:
                times[tile].append(seconds)
    check_equal_gradients(gradients)
    del inputs, part  # free memory for the processes that measure the peaks
    best = {name: min(values) for name, values in times.items()}
    peaks = {name: peak(name, cell) if name in runnable else None for name in IMPLEMENTATIONS}
    row = asdict(cell) | {f"{name}_s": best.get(name) for name in IMPLEMENTATIONS}
    row["limit_s"] = min(best[tile] for tile in limits)
    row |= {f"{name}_mib": value for name, value in peaks.items()}
    row["trl_over_ours"] = row["trl_s"] and row["trl_s"] / row["ours_s"]
    row["liger_over_ours"] = row["liger_s"] and row["liger_s"] / row["ours_s"]
    row["naive_over_ours"] = row["naive_s"] and row["naive_s"] / row["ours_s"]
    row["ours_over_limit"] = row["ours_s"] / row["limit_s"]
    return row | {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(device_and_dtype()[1]).removeprefix("torch."),
        "torch": torch.__version__,
    }


def make_inputs(cell: Cell) -> Inputs:
    device, dtype = device_and_dtype()
    rows = -(-cell.vocabulary // HEAD_ROWS) * HEAD_ROWS
    torch.manual_seed(0)

    def normal(rows: int, width: int, scale: float) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device).normal_(std=scale)

    return Inputs(
        cell.vocabulary,
        normal(cell.tokens, cell.student_width, 1.0),
        normal(rows, cell.student_width, 2 * cell.student_width**-0.5),
        normal(cell.tokens, cell.teacher_width, 1.0),
        normal(rows, cell.teacher_width, 2 * cell.teacher_width**-0.5),
        torch.randint(cell.vocabulary, (cell.tokens,), device=device),
    )


def device_and_dtype() -> tuple[str, torch.dtype]:
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def ours(inputs: Inputs, hidden: Tensor, cell: Cell) -> Tensor:
    fused.TILE = cell.tile
    objective = Objective(1.0, cell.divergence, loss_workspace_mb=cell.loss_workspace_mb)
    teacher = TeacherOutputs(inputs.teacher_hidden, Head(inputs.teacher_head))
    loss, _ = linear_distillation_loss(
        hidden, inputs.labels, Head(inputs.head), objective, cell.vocabulary, teacher
    )
    return loss


class Absent(types.ModuleType):
    """Stand-in for a package that TRL's modules import and its kernel never uses."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in_for(*packages: str) -> None:
    for package in packages:
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = Absent(package)
            sys.modules[package].__spec__ = ModuleSpec(package, None)


def trl(inputs: Inputs, hidden: Tensor, cell: Cell) -> Tensor:
    stand_in_for("datasets", "pandas")
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        hidden,
        inputs.weight,
        None,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        None,
        MIXTURE[cell.divergence],
    )
    return divergence.sum()


def liger(inputs: Inputs, hidden: Tensor, cell: Cell) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    mean = LigerFusedLinearJSDFunction.apply(
        hidden,
        inputs.weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        None,
        MIXTURE[cell.divergence],
    )
    return mean * len(hidden)


def naive(inputs: Inputs, hidden: Tensor, cell: Cell) -> Tensor:
    """Full logits and autograd, as most trainers do it."""
    student = (hidden @ inputs.weight.T).float()  # (N, V)
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_weight.T).float()  # (N, V)
    if cell.divergence in ("forward_kl", "reverse_kl"):
        pair = (log_softmax(student, -1), log_softmax(teacher, -1))
        log_q, log_p = pair if cell.divergence == "forward_kl" else reversed(pair)
        return kl_div(log_q, log_p, log_target=True, reduction="sum")
    return DIVERGENCES[cell.divergence](teacher, student).sum()


IMPLEMENTATIONS: dict[str, Callable[[Inputs, Tensor, Cell], Tensor]] = {
    "ours": ours,
    "trl": trl,
    "liger": liger,
    "naive": naive,
}


def can_run(name: str, cell: Cell) -> bool:
    if name in ("trl", "liger") and cell.divergence not in MIXTURE:
        return False
    if name == "trl":
        return importlib.util.find_spec("trl") is not None
    if name == "liger":
        return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    if name == "naive":  # about eight (N, V) tensors in float32
        needed = 8 * 4 * cell.tokens * cell.vocabulary
        return needed < available_bytes() - 4 * cell.vocabulary * (
            cell.teacher_width + cell.student_width
        )
    return True


def available_bytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return available_memory()


def timed(run: Callable, inputs: Inputs, cell: Cell) -> tuple[float, Tensor]:
    hidden = inputs.hidden.detach().requires_grad_()
    gc.collect()
    wait()
    start = time.perf_counter()
    run(inputs, hidden, cell).backward()
    wait()
    return time.perf_counter() - start, hidden.grad


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_products(inputs: Inputs, tile: int) -> float:
    """Seconds of the three matrix products: two logits, and the gradient to the hidden states."""
    device, dtype = device_and_dtype()
    types = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
    width = padded_width(inputs.vocabulary)
    head, teacher_head = inputs.head[:width], inputs.teacher_head[:width]
    logits = torch.zeros(tile, width, device=device)
    gradient = torch.randn_like(logits).to(dtype)  # zeros would be multiplied faster on a GPU
    out = torch.empty(tile, inputs.hidden.shape[1], device=device)
    wait()
    start = time.perf_counter()
    for first in range(0, len(inputs.hidden), tile):
        n = min(tile, len(inputs.hidden) - first)
        hidden = inputs.hidden[first : first + n]
        teacher_hidden = inputs.teacher_hidden[first : first + n]
        torch.mm(hidden, head.T, out=logits[:n], **types)
        torch.mm(teacher_hidden, teacher_head.T, out=logits[:n], **types)
        torch.mm(gradient[:n], head, out=out[:n], **types)
    wait()
    return time.perf_counter() - start


def check_equal_gradients(gradients: dict[str, Tensor]) -> None:
    """Assert that all implementations compute the same gradient."""
    expected = gradients["ours"].float()
    for name, gradient in gradients.items():
        difference = (gradient.float() - expected).norm() / expected.norm()
        assert difference < (1e-4 if gradient.dtype == torch.float32 else 2e-2), (name, difference)


def peak(name: str, cell: Cell) -> float | None:
    """Peak memory above the inputs in MiB; None if the process died."""
    if torch.cuda.is_available():
        return peak_in_this_process(name, cell)
    command = [sys.executable, __file__, "--peak_of", json.dumps([name, asdict(cell)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak_in_this_process(name: str, cell: Cell) -> float:
    inputs = make_inputs(cell)
    timed(
        IMPLEMENTATIONS[name], inputs.first(2), cell
    )  # loads the libraries and allocates their buffers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(IMPLEMENTATIONS[name], inputs, cell)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_mib("VmRSS")
    timed(IMPLEMENTATIONS[name], inputs, cell)
    return status_mib("VmHWM") - before


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def print_row(row: dict[str, Any]) -> None:
    def shown(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    print(
        f"{row['shape']} {row['divergence']}: ours {shown(row['ours_s'], 3)} s, "
        f"TRL / ours {shown(row['trl_over_ours'])}, Liger / ours {shown(row['liger_over_ours'])}, "
        f"naive / ours {shown(row['naive_over_ours'])}, "
        f"ours / limit {shown(row['ours_over_limit'])}; peak MiB: ours {shown(row['ours_mib'], 0)}"
        f", TRL {shown(row['trl_mib'], 0)}, Liger {shown(row['liger_mib'], 0)}, "
        f"naive {shown(row['naive_mib'], 0)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
