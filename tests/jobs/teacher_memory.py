"""Measure the peak of anonymous memory (RssAnon), reads and mapped memory of loading a teacher.

torchrun --nproc-per-node 2 tests/jobs/teacher_memory.py FOLDER OUT

Each rank writes OUT/<rank>.json, in bytes.
"""

import json
import sys
import threading
import time
from pathlib import Path

import deepspeed
import torch.distributed as dist

from kd.models import sharding
from kd.run.exit import leave


def status(key: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def read_by_kernel() -> int:
    """Bytes that this process has requested with read(2) and similar calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def main() -> None:
    folder, out = sys.argv[1:]
    deepspeed.init_distributed("gloo")
    before, peak, done = status("RssAnon"), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], status("RssAnon"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    opened = sharding.open_checkpoint(folder, "sdpa", "auto")
    asked = read_by_kernel()
    mapped = status("RssFile")
    settings = sharding.engine_settings("ds_configs/teacher_zero3.json")
    _, module = sharding.shard(*opened, settings)
    asked = read_by_kernel() - asked
    mapped = status("RssFile") - mapped
    done.set()
    watcher.join()
    found = {
        "peak": peak[0] - before,
        "asked": asked,
        "mapped": mapped,
        "counted": opened[-1].bytes_read,
        "checkpoint": opened[-1].total_bytes,
        "shard": sum(p.ds_tensor.numel() * p.element_size() for p in module.parameters()),
        "largest": max(p.ds_numel * p.element_size() for p in module.parameters()),
    }
    (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    dist.barrier()
    leave(0)
