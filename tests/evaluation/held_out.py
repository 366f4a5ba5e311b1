"""Shared by the tests of kd/evaluation: held-out rows, tiny models, and running a script."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from small import small_config
from transformers import Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "The teacher gives its distribution, the student learns it.",
    "Zw\u00f6lf Boxk\xe4mpfer jagen Viktor quer \xfcber den gro\xdfen Sylter Deich. "
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "Short text.",
    "A longer text that says the same thing over and over, " * 12,
]
CHATS = [
    [("user", "What is it?"), ("assistant", "A thing.")],
    [("system", "Be brief."), ("user", "And this?"), ("assistant", "Another thing of its kind.")],
    [("user", "a question so long that nothing of its answer is left " * 6), ("assistant", "No.")],
    [("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "Yes, two.")],
]
MAX_LENGTH = 64  # truncates one text, and removes the answer of one chat row


def new_model(vocab_size: int, hidden: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = small_config(
        vocab_size,
        hidden,
        tie_word_embeddings=True,
        initializer_range=0.2,  # distributions far from uniform
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sources(house: Path) -> list[dict]:
    return [{"path": str(house / "text.jsonl")}, {"path": str(house / "chat.jsonl")}]


def command(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run an entry point in a new process, from the root of the repository."""
    return subprocess.run(
        [sys.executable, f"eval/{script}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def section(text: str, title: str) -> str:
    """The folded section of a report whose title starts with `title`."""
    return text.split(f"<summary>{title}")[1].split("</details>")[0]


def inside(script: str, *arguments: object) -> SimpleNamespace:
    """Run an entry point in this process, which saves the imports; raise what main raises."""
    out, err = io.StringIO(), io.StringIO()
    argv = [script, *map(str, arguments)]
    printed = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with mock.patch.object(sys, "argv", argv), printed[0], printed[1]:
        runpy.run_path(str(ROOT / "eval" / script))["main"]()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())
