"""Planned memory and measured memory of real runs: two processes on a CPU, or one GPU.

python benchmarks/plan.py --json benchmarks/results/plan_cpu.json

On a GPU, measured is the peak that PyTorch allocated. On a CPU it is the peak of RssAnon (anonymous
memory, without mapped files and libraries) of the larger rank, above its value before the student
is loaded, until the end of training. Planned is the value in run.json without the allowance for
libraries. The ranks run the training script as it is, which sets the allocator for large models
(kd/run/host_memory.py).
"""

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from random_checkpoint import qwen_config
from transformers import AutoTokenizer, Qwen2ForCausalLM

from kd.distributed import rank
from kd.recipe import parse, setting
from kd.training import run_training
from kd.training.trainer import DistillationTrainer

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
ZERO2 = ("--deepspeed", "ds_configs/student_zero2.json")
ZERO3 = ("--deepspeed", "ds_configs/student_zero3.json")
SHARDED = ("--teacher_deepspeed", "ds_configs/teacher_zero3.json")
CHECKPOINTS, BF16 = ("--gradient_checkpointing", "true"), ("--precision", "bfloat16")
TWO_MICRO_BATCHES = ("--gradient_accumulation_steps", "2")
LORA = ("--lora_rank", "16")
QLORA = (*LORA, "--quantization", "nf4")
TEACHER = ("--teacher", "TEACHER")
LAYOUTS = {
    "full, ZeRO-2": ZERO2,
    "full, ZeRO-2, checkpointing, teacher whole": (*ZERO2, *CHECKPOINTS, *TEACHER),
    "full, ZeRO-3, checkpointing, teacher sharded": (*ZERO3, *CHECKPOINTS, *TEACHER, *SHARDED),
    "full, ZeRO-2, bf16, teacher sharded": (*ZERO2, *BF16, *TEACHER, *SHARDED),
    "full, ZeRO-2, bf16, two micro-batches": (*ZERO2, *BF16, *TWO_MICRO_BATCHES),
    "full, ZeRO-3, bf16, two micro-batches": (*ZERO3, *BF16, *TWO_MICRO_BATCHES),
    "LoRA, ZeRO-2, teacher sharded": (*ZERO2, *LORA, *TEACHER, *SHARDED),
    "LoRA, ZeRO-3, checkpointing, teacher whole": (*ZERO3, *LORA, *CHECKPOINTS, *TEACHER),
    "QLoRA, ZeRO-2, bf16, teacher sharded": (*ZERO2, *QLORA, *BF16, *TEACHER, *SHARDED),
    "QLoRA, ZeRO-2, checkpointing, teacher sharded": (
        *(*ZERO2, *QLORA, *CHECKPOINTS, *TEACHER, *SHARDED),
    ),
    "QLoRA, ZeRO-3, checkpointing": (*ZERO3, *QLORA, *CHECKPOINTS),
    "LoRA, DDP, checkpointing": (*LORA, *CHECKPOINTS, "--deepspeed", "none"),
}


@dataclass
class BenchmarkSettings:
    layouts: list[str] = setting(list(LAYOUTS), "Names of layouts.")
    student: list[int] = setting(
        [640, 6], "Width and layers of the student; the default takes 120 MB in float32."
    )
    teacher: list[int] = setting(
        [768, 8], "Width and layers of the teacher; the default takes 250 MB in float32."
    )
    micro: int = setting(2, "Rows per micro-batch.")
    length: int = setting(256, "Tokens per row.")
    json: str | None = setting(None, "Output file.")
    rank_of: str | None = setting(None, "Internal: run one rank with these flags.")


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    if settings.rank_of:
        run_rank(json.loads(settings.rank_of))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_inputs(work, settings)
        for name in settings.layouts:
            rows.append(measure(name, work, settings))
            row = rows[-1]
            print(
                f"{name}: planned {row['planned_mib']:.0f} MiB, measured "
                f"{row['measured_mib']:.0f} MiB, planned / measured {row['ratio']:.2f} "
                f"({row['worst']})",
                flush=True,
            )
            if settings.json:
                Path(settings.json).write_text(json.dumps(rows, indent=1) + "\n")


def make_inputs(work: Path, settings: BenchmarkSettings) -> None:
    """Write two models with random weights, and rows longer than max_length."""
    shipped = ROOT / "data" / "quickstart" / "teacher"
    for name, (width, blocks) in (("student", settings.student), ("teacher", settings.teacher)):
        shape = (width, 8 * width // 3, blocks, width // 64, width // 128, 8192)
        config = qwen_config(*shape, tied=name == "student", dtype="float32")
        Qwen2ForCausalLM(config).save_pretrained(work / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(shipped / file, work / name)
    tokenizer = AutoTokenizer.from_pretrained(work / "student")
    ids = torch.randint(300, len(tokenizer), (64, 2 * settings.length)).tolist()
    rows = [json.dumps({"text": tokenizer.decode(row)}) for row in ids]
    (work / "rows.jsonl").write_text("\n".join(rows) + "\n")


def measure(name: str, work: Path, settings: BenchmarkSettings) -> dict:
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    flags = [part.replace("TEACHER", str(work / "teacher")) for part in LAYOUTS[name]]
    flags += ["--data", json.dumps([{"path": str(work / "rows.jsonl")}])]
    ranks = 1 if CUDA else 2
    rows = ranks * settings.micro
    flags += ["--max_length", str(settings.length), "--global_batch_size", str(rows)]
    flags += ["--per_device_train_batch_size", str(settings.micro), "--max_steps", "2"]
    flags += ["--save_strategy", "no", "--report_to", "none"]
    flags += [] if CUDA else ["--use_cpu", "true"]
    flags += ["--output_dir", str(out), "--disable_tqdm", "true"]
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(ranks), __file__]
    command += ["--rank_of", json.dumps([str(work / "student"), *flags])]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    files = sorted(out.glob("peak-*.json"))
    if len(files) != ranks:
        raise RuntimeError(done.stdout[-4000:])
    peaks = [json.loads(file.read_text()) for file in files]
    plan = json.loads((out / "run.json").read_text())["plan"]
    planned = sum(size for part, size in plan["bytes"].items() if "allowance" not in part)
    measured = max(peaks)
    return {
        "layout": name,
        "planned_mib": planned / 2**20,
        "measured_mib": measured / 2**20,
        "ratio": planned / measured,
        "worst": plan["worst"],
        "parts_mib": {part: size / 2**20 for part, size in plan["bytes"].items()},
        "ranks_mib": [peak / 2**20 for peak in peaks],
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "torch": torch.__version__,
    }


def run_rank(flags: list[str]) -> None:
    """Run the training script as one rank, and write the peak memory of this process."""
    # The group must exist before DeepSpeed reads the number of ranks.
    deepspeed.init_distributed("nccl" if CUDA else "gloo")
    peak = GpuPeak() if CUDA else Peak()
    load, train = run_training.load_trained, DistillationTrainer.train
    run_training.load_trained = lambda *args: (peak.start(), load(*args))[1]

    def train_and_stop(trainer, *args, **options):
        result = train(trainer, *args, **options)
        peak.stop()  # saving gathers a sharded student
        folder = Path(flags[flags.index("--output_dir") + 1])
        (folder / f"peak-{rank()}.json").write_text(json.dumps(peak.most - peak.before))
        return result

    DistillationTrainer.train = train_and_stop
    script, key = ("distill", "student") if "--teacher" in flags else ("sft", "model")
    sys.argv = [f"train/{script}.py", f"--{key}", *flags]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


class Peak:
    """Peak anonymous memory of this process between start and stop, sampled every millisecond."""

    def start(self) -> None:
        gc.collect()
        self.before = self.most = anonymous_bytes()
        self.running = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.001)

    def stop(self) -> None:
        self.running = False
        self.thread.join()


class GpuPeak:
    """Peak of PyTorch's CUDA allocator between start and stop."""

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def stop(self) -> None:
        self.most = torch.cuda.max_memory_allocated()


def anonymous_bytes() -> int:
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
