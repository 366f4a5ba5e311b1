"""PyTorch's allocator on CUDA gets its settings before torch is imported."""

import pytest
from processes import succeed

PRINT = "import os, kd; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
ALLOCATE = """
import kd, torch
kept = torch.zeros(2**20, device="cuda")
print(all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()))
"""


def setting(*given: str, program: str = PRINT) -> str:
    """What a process prints last that is started with these variables alone."""
    unset = ("-u", "PYTORCH_ALLOC_CONF", "-u", "PYTORCH_CUDA_ALLOC_CONF")
    return succeed("env", *unset, *given, "python", "-c", program).split()[-1]


def test_every_process_has_expandable_segments_unless_the_user_says_otherwise():
    assert setting(program=f"{PRINT}; import torch; torch.zeros(1)") == "expandable_segments:True"
    assert setting("PYTORCH_ALLOC_CONF=max_split_size_mb:64") == "max_split_size_mb:64"
    assert setting("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64") == "None"


@pytest.mark.gpu
def test_segments_of_a_gpu_expand():
    assert setting(program=ALLOCATE) == "True"
