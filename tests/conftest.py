"""Fixtures and the one way in which tests start processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import save_small, small_tokenizer

ROOT = Path(__file__).parents[1]


def start(*command, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command from the repository's root to its end; stdout and stderr as one text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(*command, **options) -> str:
    """The output of a command that must end well."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a small student (tied head) and a wider teacher (head of its own)."""
    folder = tmp_path_factory.mktemp("models")
    save_small(folder / "student")
    save_small(folder / "teacher", hidden=48, seed=1, tie_word_embeddings=False)
    return folder
