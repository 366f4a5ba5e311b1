"""The command line of train/generate.py: killed, restarted, shared by two processes."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import Qwen2ForCausalLM

from kd.generation.engines import LocalEngine

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
HIDDEN = "answer briefly"
SAMPLES = 80


@pytest.fixture(scope="module")
def recipe(teacher, prompts_file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "generate.yaml"
    keys = {
        "model": str(teacher),
        "prompts": [{"path": str(prompts_file)}],
        "system_prompt": HIDDEN,
        "samples_per_prompt": 2,
        "max_new_tokens": 48,
        "batch_size": 3,
        "dtype": "float32",
    }
    path.write_text(yaml.safe_dump(keys))
    return path


def command(recipe: Path, out: Path, *flags: str) -> list[str]:
    script = str(ROOT / "train" / "generate.py")
    return [script, "--config", str(recipe), "--output_dir", str(out), *flags]


def generate(arguments: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, generate(command(recipe, out)).stdout


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_raw_jsonl_has_every_sample_and_train_jsonl_the_filtered_ones(uninterrupted, prompts):
    out, printed = uninterrupted
    raw, train = rows(out / "raw.jsonl"), rows(out / "train.jsonl")
    assert len({row["key"] for row in raw}) == len(raw) == SAMPLES
    assert 0 < len(train) < SAMPLES
    cut = sum(not row["stopped"] for row in raw)
    assert f"kept {len(train)};" in printed and f"{cut} truncated" in printed
    assert json.loads((out / "done.json").read_text())["kept"] == len(train)
    assert [row["messages"][:-1] for row in train] == sorted(
        (row["messages"][:-1] for row in train), key=prompts.index
    )


def test_no_row_has_the_hidden_system_prompt_and_the_rows_own_is_kept(uninterrupted, prompts):
    text = (uninterrupted[0] / "train.jsonl").read_text()
    assert HIDDEN not in text and "an old answer" not in text
    assert "be kind" in text


@pytest.mark.slow
def test_a_killed_run_restarted_by_two_processes_writes_the_same_bytes(
    recipe, uninterrupted, tmp_path
):
    """SIGKILL during the run, then a torn line, then two processes share the rest."""
    raw = tmp_path / "raw.jsonl"
    arguments = [sys.executable, *command(recipe, tmp_path)]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not raw.is_file() or raw.read_bytes().count(b"\n") < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 10 <= raw.read_bytes().count(b"\n") < SAMPLES
    assert not (tmp_path / "train.jsonl").exists() and not (tmp_path / "done.json").exists()
    with open(raw, "r+b") as file:  # a torn line leaves its batch unfinished
        file.truncate(raw.stat().st_size - 40)
    survived = raw.read_bytes()[: raw.read_bytes().rindex(b"\n") + 1]

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = generate([*torchrun, *command(recipe, tmp_path)]).stdout
    assert "removed an incomplete last line" in printed
    lines = survived.count(b"\n")
    assert f"{lines} exist already" in printed
    assert raw.read_bytes().startswith(survived)
    assert rows(tmp_path / "raw.1.jsonl")
    assert len(rows(raw)) + len(rows(tmp_path / "raw.1.jsonl")) == SAMPLES
    expected = uninterrupted[0] / "train.jsonl"
    assert (tmp_path / "train.jsonl").read_bytes() == expected.read_bytes()


def run_here(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run main() of the script in this process."""
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(arguments[0])["main"]()


def test_existing_answers_are_reused_without_loading_a_model(
    recipe, uninterrupted, tmp_path, monkeypatch, capsys
):
    (tmp_path / "raw.jsonl").write_bytes((uninterrupted[0] / "raw.jsonl").read_bytes())
    monkeypatch.setattr(LocalEngine, "__init__", lambda *_: pytest.fail("a model was loaded"))
    run_here(command(recipe, tmp_path, "--samples_per_prompt", "1"), monkeypatch)
    printed = capsys.readouterr().out
    assert "40 exist already" in printed
    assert "40 samples of other settings or prompts are not used" in printed
    assert json.loads((tmp_path / "done.json").read_text())["samples"] == 40


def test_other_settings_generate_again_and_the_model_sees_the_hidden_prompt(
    recipe, uninterrupted, prompts, tokenizer, tmp_path, monkeypatch, capsys
):
    old = (uninterrupted[0] / "raw.jsonl").read_text()
    (tmp_path / "raw.jsonl").write_text(old)
    seen, generate_of_model = [], Qwen2ForCausalLM.generate

    def spy(self, **inputs):
        seen.extend(tokenizer.batch_decode(inputs["input_ids"]))
        return generate_of_model(self, **inputs)

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", spy)
    run_here(command(recipe, tmp_path, "--seed", "1"), monkeypatch)
    assert f"{SAMPLES} samples of other settings" in capsys.readouterr().out
    assert len(seen) == SAMPLES
    assert all(text.count(f"<|im_start|>system\n{HIDDEN}<|im_end|>") == 1 for text in seen)
    assert not any("be kind" in text for text in seen)
    raw = (tmp_path / "raw.jsonl").read_text()
    assert raw.startswith(old)
    answers = {row["answer"] for row in map(json.loads, raw[len(old) :].splitlines())}
    train = {row["messages"][-1]["content"] for row in rows(tmp_path / "train.jsonl")}
    assert train <= answers
