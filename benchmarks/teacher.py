"""The sharded teacher: bytes held and read per rank, speed, and equality with the unsharded logits.

python benchmarks/teacher.py --quick --json benchmarks/results/teacher_cpu.json

Checkpoints of random weights (--hidden, --layers, ...) are written as bf16, AWQ and NF4 and loaded
by each number of --ranks with ds_configs/teacher_zero3.json. `held_share` and `read_share` are
shares of the checkpoint's bytes, the maximum over ranks; held includes the small tensors that
ZeRO-3 keeps whole. `disk_s` is the part of `load_s` spent reading. `tokens_s` counts all ranks,
from the third forward on. The checkpoints were just written, so they are read from the page cache.
On a GPU, --gpu_parts measures the kernel's bandwidth, the layers' matrix rate, and the memory of a
distillation step of 32B-AWQ -> 14B-NF4 with two ranks on one GPU, each capped at 24 GB. NCCL cannot
have two ranks on one GPU, and gloo moves the shards through the host, so its time means nothing.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from random_checkpoint import GROUP, qwen_config, write_random
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kd.losses.head import TeacherOutputs
from kd.models import awq, awq_writer, sharding
from kd.models.heads import LossInputs, backbone_only, head_of, return_loss, target_positions
from kd.recipe import parse, setting
from kd.run.exit import leave
from kd.settings.distillation import Objective

DS_CONFIG = "ds_configs/teacher_zero3.json"
SHAPES = {  # Qwen2.5: hidden, intermediate, layers, heads, key-value heads
    "32B": (5120, 27648, 64, 40, 8),
    "14B": (5120, 13824, 48, 40, 8),
}
CAP_GB = 24


@dataclass
class BenchmarkSettings:
    quick: bool = setting(False, "Use four layers: under 5 minutes on two cores.")
    ranks: list[int] = setting([2, 3], "Numbers of processes.")
    formats: list[str] = setting(["awq", "nf4", "bf16"], "Checkpoint formats.")
    hidden: int = setting(1024, "Hidden size.")
    intermediate: int = setting(2816, "Hidden size of the MLP.")
    layers: int = setting(24, "Number of layers.")
    vocabulary: int = setting(8192, "Vocabulary size.")
    tokens: int = setting(64, "Tokens per forward and rank.")
    forwards: int = setting(4, "Number of forwards; the third and later ones are timed.")
    gpu_parts: bool = setting(False, "Run only the parts that need a GPU.")
    gpu_kernels: bool = setting(True, "Include the kernel and the layers.")
    gpu_step: bool = setting(True, "Include the step, which writes 28 GB at full depth.")
    gpu_layers: list[int] = setting([64, 48], "Layers of teacher and student in the step.")
    json: str | None = setting(None, "Output file.")
    worker: str | None = setting(None, "Internal: the part of one rank, as JSON.")


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    if settings.worker:
        run_worker(json.loads(settings.worker))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in (gpu_rows if settings.gpu_parts else rank_rows)(settings, folder):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if settings.json:
                Path(settings.json).write_text(json.dumps(rows, indent=1) + "\n")


def rank_rows(settings: BenchmarkSettings, folder: Path) -> Iterator[dict[str, Any]]:
    heads = max(1, settings.hidden // 64)
    config = qwen_config(
        settings.hidden,
        settings.intermediate,
        4 if settings.quick else settings.layers,
        heads,
        max(1, heads // 4),
        settings.vocabulary,
    )
    sizes = {form: write_random(config, form, folder / form) for form in settings.formats}
    for ranks in settings.ranks:
        work = {"part": "ranks", "folder": str(folder), "formats": settings.formats}
        work |= {"tokens": settings.tokens, "forwards": settings.forwards}
        found = start_workers(work, ranks)
        for form, size in sizes.items():
            worst = {key: max(rank[form][key] for rank in found) for key in found[0][form]}
            yield {
                "format": form,
                "ranks": ranks,
                "checkpoint_mib": size / 2**20,
                "held_share": worst["held"] / size,
                "read_share": worst["read"] / size,
                "max_logit_difference": worst["difference"],
                "load_s": worst["load_s"],
                "disk_s": worst["disk_s"],
                "tokens_s": ranks * settings.tokens / worst["forward_s"],
                **machine(),
            }


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # far above `cores`: the times are disturbed
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def start_workers(work: dict[str, Any], ranks: int, one_gpu: bool = False) -> list[dict]:
    """Start the ranks and return the result of each."""
    with tempfile.TemporaryDirectory() as out, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, __file__, "--worker", json.dumps(work | {"out": out})]
        processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0 if one_gpu else rank}
            place["LOCAL_WORLD_SIZE"] = ranks
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = os.environ | {key: str(value) for key, value in place.items()}
            if not torch.cuda.is_available():
                env |= {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=env, stdout=sys.stderr))
        for process in processes:
            process.wait()
        files = [Path(out) / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]


def run_worker(work: dict[str, Any]) -> None:
    one_gpu = work["part"] == "step"  # NCCL refuses two ranks on one GPU
    deepspeed.init_distributed("gloo" if one_gpu or not torch.cuda.is_available() else "nccl")
    if one_gpu:
        found = distillation_step(work)
    else:
        found = {form: shares_and_speed(work, form) for form in work["formats"]}
    (Path(work["out"]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    leave(0)


def sharded_teacher(folder: str) -> tuple:
    """(engine, module, files, seconds of loading)."""
    dist.barrier()
    began = time.perf_counter()
    opened = sharding.open_checkpoint(folder, "sdpa", "auto")
    engine, module = sharding.shard(*opened, sharding.engine_settings(DS_CONFIG))
    return engine, module, opened[-1], time.perf_counter() - began


@torch.no_grad()
def shares_and_speed(work: dict[str, Any], form: str) -> dict[str, float]:
    folder = f"{work['folder']}/{form}"
    engine, module, files, load_s = sharded_teacher(folder)
    shards = sum(p.ds_tensor.numel() * p.element_size() for p in module.parameters())
    kept = sum(p.ds_numel * p.element_size() for p in module.parameters() if p.ds_persist)
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(module.config.vocab_size, (1, work["tokens"]), device=engine.device)
    times = []
    for _ in range(work["forwards"]):
        dist.barrier()
        began = time.perf_counter()
        hidden = engine(input_ids=ids)
        wait()
        times.append(time.perf_counter() - began)
    with deepspeed.zero.GatheredParameters(list(module.get_output_embeddings().parameters())):
        logits = head_of(module).logits(hidden[0], module.config.vocab_size)
    whole = sharding.load_unsharded(folder, "sdpa", "auto", engine.device)
    backbone_only(whole)
    truth = head_of(whole).logits(whole(input_ids=ids)[0], module.config.vocab_size)
    return {
        "held": shards + kept,
        "read": files.bytes_read,
        "difference": (logits - truth).abs().max().item(),
        "load_s": load_s,
        "disk_s": files.seconds,
        "forward_s": min(times[2:]),
    }


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpu_rows(settings: BenchmarkSettings, folder: Path) -> Iterator[dict[str, Any]]:
    assert torch.cuda.is_available(), "--gpu_parts needs a GPU"
    if settings.gpu_kernels:
        yield from kernel_rows()
    if settings.gpu_step:
        yield step_row(folder, SHAPES["32B"], SHAPES["14B"], settings.gpu_layers)


def kernel_rows() -> Iterator[dict[str, Any]]:
    hidden, intermediate, _, heads, pairs = SHAPES["32B"]
    shapes = [  # (out, in) of the linear layers of a block
        *[(heads * 128, hidden), (pairs * 128, hidden), (pairs * 128, hidden)],
        *[(hidden, heads * 128), (intermediate, hidden), (intermediate, hidden)],
        (hidden, intermediate),
    ]
    yield dequantization_row(shapes)
    yield forward_row(shapes, tokens=8192)


def step_row(
    folder: Path, teacher: tuple, student: tuple, layers: list[int], vocab_size: int = 152_064
) -> dict[str, Any]:
    """Memory of a step by two ranks: all that a rank holds, and its half of the teacher."""
    sizes = {}
    for role, form, shape, depth in zip(
        *(("teacher", "student"), ("awq", "nf4"), (teacher, student), layers), strict=True
    ):
        config = qwen_config(*shape[:2], depth, *shape[3:], vocab_size)
        sizes[f"{role}_gib"] = write_random(config, form, folder / role) / 2**30
    work = {"part": "step", "folder": str(folder / "teacher"), "tokens": 1024}
    found = start_workers(work | {"student": str(folder / "student")}, ranks=2, one_gpu=True)
    worst = {key: max(rank[key] for rank in found) for key in found[0]}
    return {"part": "step", "cap_gib": CAP_GB, "layers": layers, **sizes, **worst, **machine()}


def best_seconds(run) -> float:
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times[3:])


def random_layer(out: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(out, inputs, device="cuda") * inputs**-0.5
    return awq_writer.quantize(weight, GROUP)


def dequantization_row(shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Bandwidth of dequantization, as a share of the bandwidth of copying the weights."""
    ours = copied = moved = both = 0.0
    for out, inputs in set(shapes):
        packed = random_layer(out, inputs)
        weight = awq.dequantize(*packed, torch.bfloat16)
        other = torch.empty_like(weight)
        ours += best_seconds(lambda packed=packed: awq.dequantize(*packed, torch.bfloat16))
        copied += best_seconds(lambda other=other, weight=weight: other.copy_(weight))
        moved += weight.nbytes + sum(part.nbytes for part in packed)
        both += 2 * weight.nbytes
    share = (moved / ours) / (both / copied)
    rates = {"gb_s": moved / ours / 1e9, "copy_gb_s": both / copied / 1e9}
    return {"part": "dequantization", **rates, "share_of_copy": share, **machine()}


@torch.no_grad()
def forward_row(shapes: list[tuple[int, int]], tokens: int) -> dict[str, Any]:
    """Matrix rate of a block's seven linear layers, as a share of the plain products."""
    ours = products = 0.0
    for out, inputs in shapes:
        packed = random_layer(out, inputs)
        hidden = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        weight = awq.dequantize(*packed, torch.bfloat16)  # (in, out)

        def layer(hidden=hidden, packed=packed):
            return nn.functional.linear(hidden, awq.dequantize(*packed, torch.bfloat16).T)

        ours += best_seconds(layer)
        products += best_seconds(lambda hidden=hidden, weight=weight: hidden @ weight)
    flops = 2 * tokens * sum(out * inputs for out, inputs in shapes)
    rates = {"tflops": flops / ours / 1e12, "product_tflops": flops / products / 1e12}
    row = {"part": "forward", "tokens": tokens, **rates, "share_of_products": products / ours}
    return row | machine()


def distillation_step(work: dict[str, Any]) -> dict[str, Any]:
    """Peak memory and time of a step: sharded 32B-AWQ teacher, 14B-NF4 student with LoRA."""
    from peft import LoraConfig, get_peft_model

    cuda = torch.cuda.is_available()
    if cuda:
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(CAP_GB * 2**30 / total)
    engine, teacher, _, load_s = sharded_teacher(work["folder"])
    held = torch.cuda.memory_allocated() if cuda else 0
    student = AutoModelForCausalLM.from_pretrained(
        work["student"], dtype=torch.bfloat16, device_map={"": engine.device}
    )
    config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.enable_input_require_grads()
    student = get_peft_model(student, config)
    return_loss(student.get_base_model())
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocab_size, times = student.config.vocab_size, []
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(vocab_size, (1, work["tokens"]), device=engine.device)
    positions = torch.arange(work["tokens"], device=engine.device)[None]
    chosen, _ = target_positions(ids)
    for _ in range(2):
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            hidden = engine(input_ids=ids, position_ids=positions)[chosen]
        head = list(teacher.get_output_embeddings().parameters())
        with deepspeed.zero.GatheredParameters(head):
            outputs = TeacherOutputs(hidden, head_of(teacher))
            inputs = LossInputs(ids, Objective(1.0), vocab_size, outputs)
            loss = student(input_ids=ids, position_ids=positions, loss_inputs=inputs)["loss"]
        (loss / len(hidden)).backward()
        for parameter in trained:
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        times.append(time.perf_counter() - began)
    measured = {"load_s": load_s, "step_s": times[-1], "loss": loss.item() / len(hidden)}
    if cuda:
        measured |= {
            "held_teacher_gib": held / 2**30,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return measured


if __name__ == "__main__":
    main()
