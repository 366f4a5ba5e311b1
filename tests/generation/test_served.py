"""The command line of train/generate.py against a faulty local server, killed repeatedly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from chat_server import ChatServer
from processes import ROOT, start
from scripts import run_main

from kd.generation.estimate import price
from kd.settings.generation import ServerSettings

HIDDEN = "answer as a careful expert would"
KEY = "sk-never-to-be-written"
SAMPLES = 39 * 3  # one of the forty prompts is in the evaluation data


@pytest.fixture(scope="module")
def folder(prompts, prompts_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    evaluated = prompts[7][-1]["content"]
    (folder / "evaluation.jsonl").write_text(json.dumps({"turns": [evaluated]}) + "\n")
    keys = {
        "model": "big",
        "prompts": [{"path": str(prompts_file)}],
        "system_prompt": HIDDEN,
        "samples_per_prompt": 3,
        "temperature": [0.5, 1.0],
        "max_new_tokens": 48,
        "concurrency": 4,
        "request_timeout": 60.0,
        "price_per_million_tokens": [2.5, 10],
        "evaluation_data": [{"path": str(folder / "evaluation.jsonl")}],
        "near_duplicate_similarity": 0.8,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return folder


def command(folder: Path, server: ChatServer, out: Path, *flags) -> list[str]:
    spelt = ["--config", folder / "recipe.yaml", "--server", server.url, "--output_dir", out]
    return [str(part) for part in (sys.executable, "train/generate.py", *spelt, *flags)]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(folder) -> tuple[Path, str]:
    with ChatServer(key=KEY) as server:
        done = start(*command(folder, server, folder / "whole"), OPENAI_API_KEY=KEY)
    assert (folder / "whole" / "done.json").is_file(), done.stdout
    return folder / "whole", done.stdout


def test_requests_have_the_hidden_prompt_and_training_rows_do_not(uninterrupted, prompts):
    out, printed = uninterrupted
    raw, train = rows(out / "raw.jsonl"), rows(out / "train.jsonl")
    assert len({row["key"] for row in raw}) == len(raw) == SAMPLES
    assert {row["config"]["system_prompt"] for row in raw} == {HIDDEN}
    assert [row["config"]["temperature"] for row in raw].count(0.5) == 2 * SAMPLES // 3
    assert {row["served_by"] for row in raw} == {"big-2026"}
    assert 0 < len(train) < SAMPLES and f"kept {len(train)};" in printed
    assert HIDDEN not in (out / "train.jsonl").read_text()
    contents = {message["content"] for row in train for message in row["messages"]}
    assert HIDDEN not in contents and prompts[7][-1]["content"] not in contents
    assert prompts[8][-1]["content"] in contents and "be kind 1" in contents


def test_tokens_and_price_are_estimated_before_the_run_and_counted_after_it(uninterrupted):
    printed = uninterrupted[1]
    assert f"to ask: {SAMPLES} requests of big" in printed
    most = SAMPLES * 48
    assert f"at most {most:,} in answers" in printed
    assert "1 dropped for overlap with the evaluation data" in printed
    prompt, answer = SAMPLES * 7, SAMPLES * 5  # as the server reports
    cost = (prompt * 2.5 + answer * 10) / 1e6
    assert f"used: {prompt} tokens in prompts, {answer} in answers; price {cost:,.2f}" in printed


def test_the_api_key_is_neither_written_nor_printed(uninterrupted):
    out, printed = uninterrupted
    assert KEY not in printed
    for file in out.iterdir():
        assert KEY not in file.read_text(), file


def test_a_run_killed_at_random_moments_writes_the_same_bytes(folder, uninterrupted, tmp_path):
    """SIGKILL at start, during requests or during writes, with a server that injects faults.

    The server stops answering three requests after the chosen moment, so that no process finishes
    before it is killed.
    """
    kills, moments = 3, random.Random(3)
    with ChatServer(key=KEY, faulty=0.3, slow=1.5, pause=0.02) as server:
        arguments = command(folder, server, tmp_path, "--request_timeout", 1.0)
        for kill in range(kills):
            before = len(server.requests)
            wait_for = 0 if kill == 1 else moments.randint(1, SAMPLES // (kills + 2))
            server.answers_up_to = before + wait_for + 3
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=os.environ | {"OPENAI_API_KEY": KEY},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 300
            while len(server.requests) < before + wait_for:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.1 if wait_for else 2.0))
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        server.answers_up_to = None
        assert not (tmp_path / "train.jsonl").exists() and not (tmp_path / "done.json").exists()
        answered = len(rows(tmp_path / "raw.jsonl"))
        with open(tmp_path / "raw.jsonl", "a") as file:
            file.write('{"key": "torn')
        done = start(*arguments, OPENAI_API_KEY=KEY)
        assert set(server.met) >= {"429", "500", "slow", "torn body", "broken connection"}
    assert "removed an incomplete last line of 13 bytes" in done.stdout
    assert 0 < answered < SAMPLES
    raw = rows(tmp_path / "raw.jsonl")
    assert len(raw) == len({row["key"] for row in raw}) == SAMPLES
    expected = (uninterrupted[0] / "train.jsonl").read_bytes()
    assert (tmp_path / "train.jsonl").read_bytes() == expected


def test_estimate_only_sends_no_request_and_needs_no_key(folder, tmp_path, capsys):
    with ChatServer() as server:
        run_main(*command(folder, server, tmp_path, "--estimate_only", "true")[1:])
        assert "price: at most" in capsys.readouterr().out
        assert not server.requests and not (tmp_path / "train.jsonl").exists()


def test_refused_requests_are_an_error_unless_skip_failed_is_set(folder, tmp_path, capsys):
    def picky(request: dict) -> dict:
        if request["messages"][-1]["content"].endswith(" 3?"):
            return {"refused": "not this one"}
        return {"message": {"content": f"a list {request['seed']}"}, "finish_reason": "stop"}

    with ChatServer(picky) as server:
        arguments = command(folder, server, tmp_path)[1:]
        wanted = f"3 of {SAMPLES} samples have no answer, the first because: .*not this one"
        with pytest.raises(ValueError, match=wanted):
            run_main(*arguments)
        asked = len(server.requests)
        run_main(*arguments, "--skip_failed", "true")
        assert "3 without an answer" in capsys.readouterr().out
        assert len(server.requests) == asked + 3  # each is requested once more
    train = (tmp_path / "train.jsonl").read_text()
    assert " 4?" in train and " 3?" not in train


def test_prompt_and_answer_tokens_have_different_prices():
    server = ServerSettings(price_per_million_tokens=[2.5, 10.0])
    assert price(1e6, 0, server) == 2.5 and price(0, 1e6, server) == 10.0
    assert price(1, 1, ServerSettings()) is None
