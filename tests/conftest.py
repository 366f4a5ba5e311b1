"""Fixtures shared by several folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, succeed
from small import save_small, small_tokenizer

# Files whose tests share folders below runs/, in an order in which later ones find runs finished.
IN_RUNS = [
    f"tests/{name}.py"
    for name in (
        "launch/test_quickstart",
        "train/test_recipes_run",
        "train/test_inherited_students",
        "train/test_other_tokenizer",
        "evaluation/test_compare",
        "test_commands",
        "test_guides",
        "benchmarks/test_inheritance",
        "benchmarks/test_on_policy_benchmark",
        "benchmarks/test_other_tokenizer_benchmark",
    )
]
SLURM = "tests/launch/test_slurm.py"  # waits for most of its time


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests between two processes: one file, or the files of IN_RUNS, stay in one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return IN_RUNS[0] if file in IN_RUNS else file

    config.option.loadscopereorder = False  # xdist would begin with the file that has most tests
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that both processes end together."""
    first = [ROOT / file for file in (*IN_RUNS, SLURM)]
    for item in items:
        if {"docstrings", "quickstart"} & set(item.fixturenames):
            assert item.path in first, f"{item.path} reads folders below runs/: add it to IN_RUNS"
    items.sort(key=lambda item: first.index(item.path) if item.path in first else len(first))


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
def quickstart() -> str:
    """What the quickstart prints; one seed instead of three, each costs three trainings."""
    return succeed("launch/quickstart.sh", timeout=3600, SEEDS="0")
