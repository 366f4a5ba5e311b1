"""Fixtures shared by several folders."""

from pathlib import Path

import pytest
import torch
from processes import ROOT, succeed
from small import save_small, small_tokenizer


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a small student (tied head) and a wider teacher (untied head)."""
    folder = tmp_path_factory.mktemp("models")
    save_small(folder / "student")
    save_small(folder / "teacher", hidden=48, seed=1, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="session")
def docstrings() -> Path:
    """The text of the quickstart, which the small recipes read."""
    folder = ROOT / "runs/quickstart/data"
    if not (folder / "chat_heldout.jsonl").exists():
        succeed("python", "data/quickstart/docstrings.py", "--out_dir", folder)
    return folder


@pytest.fixture(scope="session")
def quickstart() -> None:
    """The models and rows that documented commands read; tests/launch has usually made them."""
    if not (ROOT / "runs" / "quickstart" / "report.json").exists():
        succeed("launch/quickstart.sh", timeout=3600)
