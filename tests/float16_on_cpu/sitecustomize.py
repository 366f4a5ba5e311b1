"""Put this folder on PYTHONPATH, and DeepSpeed computes in float16 on a CPU, as on a T4.

It is slow there, and DeepSpeed refuses it only because its accelerator says so. No script of the
repository imports this file.
"""

import importlib.machinery
import sys

ACCELERATOR = "deepspeed.accelerator.cpu_accelerator"


class Float16OnCpu(importlib.machinery.PathFinder):
    """Finds DeepSpeed's accelerator for CPUs, whose answer is changed after it is loaded."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != ACCELERATOR:
            return None
        spec = super().find_spec(name, path, target)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            module.CPU_Accelerator.is_fp16_supported = lambda self: True

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, Float16OnCpu)
