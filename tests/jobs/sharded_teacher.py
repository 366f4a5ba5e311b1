"""Load every checkpoint in WORK/good, sharded and whole, and try every one in WORK/bad.

torchrun --nproc-per-node 3 tests/jobs/sharded_teacher.py WORK

Each rank writes WORK/<ranks>-<rank>.json. A good checkpoint has the bytes held and read, the
gathers, and the largest difference of its logits from the whole model's; a bad one has its error.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from kd.data.tokenizer import load_tokenizer
from kd.models import sharding, tensor_files
from kd.models.heads import backbone_only, head_of
from kd.models.load import load_trained
from kd.run.exit import leave
from kd.settings.distillation import ModelSettings

CPU = torch.device("cpu")
gathers, sent = [], []  # numel of each all-gather and of each broadcast


def count(owner, name: str, log: list, place: int) -> None:
    """Log the numel of the argument at `place` whenever owner.name is called."""
    real = getattr(owner, name)

    def counting(*args, **kw):
        log.append(args[place].numel())
        return real(*args, **kw)

    setattr(owner, name, counting)


@torch.no_grad()
def compare(folder: Path, student: torch.nn.Module, ds_config: str, over: str = "all") -> dict:
    """Run three forwards of different lengths per rank, with the student called in between."""
    attention = "eager" if "gemma2" in folder.name else "sdpa"  # sdpa has no soft-capping
    if "bf16" in folder.name:  # Transformers is the oracle unless the format needs another package
        whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    else:
        whole = sharding.load_unsharded(str(folder), attention, "auto", CPU)
    backbone_only(whole)
    sent.clear()
    opened = sharding.open_checkpoint(str(folder), attention, "auto")
    files = opened[-1]
    engine, sharded = sharding.shard(*opened, sharding.engine_settings(ds_config), over)
    shards = [p.ds_tensor.numel() * p.element_size() for p in sharded.parameters()]
    kept = [p for p in sharded.parameters() if p.ds_persist]
    found = {
        "checkpoint": files.total_bytes,
        "held": sum(shards),
        "kept whole": sum(p.ds_numel * p.element_size() for p in kept),
        "read": files.bytes_read,
        "sent": sum(sent),
        "types": sorted({str(p.dtype) for p in sharded.parameters()}),
        "differences": [],
        "gathers": [],
        "blocks": len(sharded.model.layers),
        "tensors": len(list(sharded.parameters())),
    }
    for forward, length in enumerate((9 + 8 * dist.get_rank(), 24, 3)):
        ids = torch.arange(3, 3 + length)[None]
        positions = torch.zeros_like(ids, dtype=torch.bool)
        positions[:, :-1] = forward or dist.get_rank()  # rank 0 starts without targets
        gathers.clear()
        hidden = engine(input_ids=ids, position_ids=torch.arange(length)[None])
        found["gathers"].append(len(gathers))
        head = list(sharded.get_output_embeddings().parameters())
        with deepspeed.zero.GatheredParameters(head):
            logits = head_of(sharded).logits(hidden[positions], 300)
        hidden = whole(input_ids=ids, position_ids=torch.arange(length)[None])
        truth = head_of(whole).logits(hidden[positions], 300)
        assert logits.shape == truth.shape
        difference = (logits - truth).abs().flatten().tolist()
        found["differences"].append(max([0.0, *difference]) + float(truth.isnan().any()))
        found["spread"] = truth.std().item() if truth.numel() else 0.0
        student.train(forward % 2 == 0)
        student(input_ids=ids)
    return found


def error_of(folder: Path, ds_config: str) -> str:
    if (folder / "0").is_dir():  # one folder per rank, as if on different machines
        folder = folder / str(dist.get_rank())
    try:
        sharding.load_sharded(str(folder), ds_config, "all", "sdpa")
    except ValueError as error:
        return str(error)
    return "none"


def student_error(folder: Path) -> str:
    """The error, or what is told, of a damaged student that ZeRO-3 shards while it is loaded."""
    sharded = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    )
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            load_trained(str(folder), ModelSettings(dtype="float32"), load_tokenizer(str(folder)))
    except ValueError as error:
        return str(error)
    finally:
        del sharded
        unset_hf_deepspeed_config()
    return told.getvalue()


def error_while_reading(folder: Path, ds_config: str) -> str:
    """The error if the disk of rank 1 fails after some tensors."""
    real, calls = tensor_files.fill, []

    def failing(file, out):
        calls.append(out)
        if dist.get_rank() == 1 and len(calls) == 5:
            raise OSError("the disk gave up")
        real(file, out)

    tensor_files.fill = failing
    found = error_of(folder, ds_config)
    tensor_files.fill = real
    return found


def main() -> None:
    work = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    count(partition_parameters, "_dist_allgather_fn", gathers, 1)
    count(deepspeed.comm, "all_gather_into_tensor", gathers, 0)
    count(deepspeed.comm, "broadcast", sent, 0)
    settings = ModelSettings(dtype="bfloat16", quantization="nf4", lora_rank=4)
    name = str(work / "student")
    student = load_trained(name, settings, load_tokenizer(name))
    good, bad = (sorted((work / kind).iterdir()) for kind in ("good", "bad"))
    config = str(work / "teacher.json")
    found = {"bad": {folder.name: error_of(folder, config) for folder in bad}}
    found["good"] = {folder.name: compare(folder, student, config) for folder in good}
    students = sorted((work / "students").iterdir())
    found["students"] = {folder.name: student_error(folder) for folder in students}
    for profile in ("teacher_zero3", "teacher_zero3_offload"):
        found["good"][profile] = compare(good[0], student, f"ds_configs/{profile}.json")
    os.environ["GROUP_RANK"] = str(dist.get_rank() // (dist.get_world_size() - 1))
    found["good"]["node"] = compare(good[0], student, config, "node")  # the last rank has its own
    # Last, because DeepSpeed numbers parameters and the failing rank creates fewer than the others.
    found["bad"]["reading"] = error_while_reading(work / "good" / "qwen2-bf16", config)
    (work / f"{dist.get_world_size()}-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    dist.barrier()
    leave(0)
