"""What a rank is without a process group."""

import pytest
import torch

from kd.distributed import default_dtype


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "dtype"),
    [(False, False, "float32"), (True, True, "bfloat16"), (True, False, "float16")],
)
def test_the_default_dtype_is_one_that_the_device_computes_in(monkeypatch, gpu, bfloat16, dtype):
    """Emulated bfloat16, which a T4 has, does not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    supported = lambda including_emulation: bfloat16 or including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert default_dtype() == dtype
