"""eval/judge.py against a local server: verdict formats, faults, kills and reruns."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import ChatServer, digest
from held_out import command, inside, write_jsonl
from processes import ROOT

from kd.evaluation.judge.judge_prompts import default_prompts
from kd.evaluation.judge.verdicts import grade, preference_of_text, preference_of_token

CATEGORIES = ("writing", "math", "stem", "coding")
GRADES = [
    "Fine. Rating: [[7]]",
    "[[8.5]]",
    "I say [4].",
    "[[10]] of ten",
    "no grade",
    "[[3]] or [[5]]",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[ 8.5 ]]", 8.5),
        ("so [4]", 4.0),
        ("[2] at first, in the end [[6]]", 6.0),
        ("[[5]] ... again [[5]]", 5.0),
        ("[[5]] or [[6]]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[A]]", None),
        ("7", None),
        ("", None),
    ],
)
def test_a_grade_is_parsed_in_any_format_or_is_none(text, value):
    assert grade(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("so [[A]]", 0.0), ("[[b]]", 1.0), ("[[C]]", 0.5), ("[[A]] [[B]]", None), ("A", None)],
)
def test_a_verdict_on_a_pair_is_parsed_or_is_none(text, value):
    assert preference_of_text(text) == value


def test_a_one_token_verdict_uses_log_probabilities_or_else_the_text():
    import math

    top = {"m": math.log(0.6), "M": math.log(0.2), " M": math.log(0.1), "x": math.log(0.1)}
    found, source = preference_of_token("m", [top])
    assert (found, source) == (pytest.approx(0.3 / 0.9), "log-probabilities")
    assert preference_of_token("M", None) == (1.0, "text")
    assert preference_of_token("m.", [{"x": -0.1}]) == (0.0, "text")
    assert preference_of_token("neither", None) == (None, "text")


def test_every_prompt_shows_the_answers_references_and_turns_of_its_name():
    names = {"question", "answer", "ref_answer_1", "ref_answer_2", "question_1", "question_2"}
    names |= {f"answer{who}" for who in ("_a", "_b", "_1", "_2", "_a_1", "_a_2", "_b_1", "_b_2")}
    for name, prompt in default_prompts().items():
        text = prompt["prompt_template"].format(**{n: f"<{n}>" for n in names})
        expected = {
            "single": ["<answer"],
            "pair": ["<answer_a", "<answer_b"],
            "token": ["<answer_a>"],
        }
        assert all(field in text for field in expected[name.split("-")[0]])
        assert ("<ref_answer_1>" in text) == ("math" in name)
        assert ("<question_2>" in text) == ("multi" in name)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Small files in the formats of MT-Bench and AlpacaEval: questions, references, answers."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [
        {"question_id": 80 + i, "category": c, "turns": [f"What is {c}?", f"And {i}? {{braces}}"]}
        for i, c in enumerate(CATEGORIES * 2)
    ]
    write_jsonl(folder / "question.jsonl", rows)

    def answers(name, chosen):
        turns = lambda row: [f"{name} says {row['question_id']}.", f"{name} {{x}} again."]  # noqa: E731
        return [
            {"question_id": row["question_id"], "choices": [{"index": 0, "turns": turns(row)}]}
            for row in chosen
        ]

    write_jsonl(
        folder / "reference.jsonl", answers("truth", [r for r in rows if r["category"] == "math"])
    )
    for name in ("good", "bad"):
        write_jsonl(folder / f"{name}.jsonl", answers(name, rows))
    pairs = [
        {"instruction": f"Name {i} things.", "dataset": ("koala", "vicuna")[i % 2]}
        for i in range(12)
    ]
    (folder / "alpaca.json").write_text(json.dumps(pairs))
    for name, words in (("long", 9), ("short", 2)):
        rows = [p | {"output": f"{name} word " * (words + i % 3)} for i, p in enumerate(pairs)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def text_of(request) -> str:
    return "\n".join(message["content"] for message in request["messages"])


def graded(request) -> dict:
    text = GRADES[digest(text_of(request)) % len(GRADES)]
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "index": 0}


def score_flags(files, out, server, *names):
    return [
        *("--questions", files / "question.jsonl", "--references", files / "reference.jsonl"),
        *("--answers", *(f"{name}={files / name}.jsonl" for name in names)),
        *("--judge", "gpt-4o", "--server", server.url, "--out_dir", out),
    ]


def result(out, benchmark, name):
    return json.loads((out / "judge" / benchmark / "results" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def scored(files, tmp_path_factory):
    """Results, requests and output of a run whose server fails many first attempts."""
    out = tmp_path_factory.mktemp("scored")
    faults = ("429", "500", "torn body", "broken connection", "no json", "empty")
    with ChatServer(graded, faulty=0.5, faults=faults) as server:
        ran = inside("judge.py", *score_flags(files, out, server, "good", "bad"))
        assert server.met["429"] and server.met.total() > 5
        return out, server.requests, ran.stdout


def test_grades_are_averaged_by_turn_and_by_category(files, scored):
    out, requests, printed = scored
    assert "32 in total, 0 exist already, 32 to request" in printed
    by_text = {
        text_of(request): grade(graded(request)["message"]["content"]) for request in requests
    }
    assert len(by_text) == 32
    for name in ("good", "bad"):
        found = result(out, "mt_bench", name)
        texts = {text: value for text, value in by_text.items() if f"{name} says" in text}
        assert len(texts) == 16
        turns = {
            "1": [value for text, value in texts.items() if "again." not in text],
            "2": [value for text, value in texts.items() if "again." in text],
        }
        for turn, values in turns.items():
            counted = [value for value in values if value is not None]
            assert found["turns"][turn]["mean"] == pytest.approx(sum(counted) / len(counted))
            assert found["turns"][turn]["without_verdict"] == len(values) - len(counted)
        math = [text for text in texts if "What is math?" in text]
        assert all("truth says" in text for text in math)
        assert not any("truth" in text for text in set(texts) - set(math))
        counted = [texts[text] for text in math if texts[text] is not None]
        if counted:
            assert found["categories"]["math"]["mean"] == pytest.approx(sum(counted) / len(counted))
        assert found["served_by"] == ["gpt-4o-2026"]
    assert sum(result(out, "mt_bench", n)["overall"]["without_verdict"] for n in ("good", "bad"))


def test_a_rerun_requests_only_missing_judgements(files, scored):
    """First nothing is missing; then one answer has changed and the last line is torn."""
    out, _, _ = scored
    with ChatServer(graded) as server:
        ran = inside("judge.py", *score_flags(files, out, server, "good", "bad"))
        assert "0 to request" in ran.stdout and not server.requests
        file = out / "judge" / "mt_bench" / "judgements.jsonl"
        text = file.read_text()
        file.write_text(text + text[:200])
        lines = (files / "bad.jsonl").read_text().splitlines()
        (files / "new.jsonl").write_text(
            "\n".join([lines[0].replace("bad says", "Bad says"), *lines[1:]])
        )
        flags = score_flags(files, out, server, "good")
        flags[flags.index("--answers") + 1 : flags.index("--judge")] = [
            f"bad={files / 'new.jsonl'}"
        ]
        ran = inside("judge.py", *flags)
        # The prompt of the second turn contains the answer of the first.
        assert len(server.requests) == 2 and all("Bad says" in text_of(r) for r in server.requests)


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stopped(files, tmp_path):
    with ChatServer(graded) as server:
        flags = [*score_flags(files, tmp_path, server, "good", "bad"), "--concurrency", "2"]
        for least in (5, 14):
            server.answers_up_to = least  # of 32, so that it cannot finish before it is killed
            job = subprocess.Popen(
                [sys.executable, "eval/judge.py", *map(str, flags)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while len(server.requests) <= least:
                assert job.poll() is None
                time.sleep(0.02)
            os.kill(job.pid, signal.SIGKILL)
            job.wait()
        server.answers_up_to = None
        ran = command("judge.py", *flags)
        assert ran.returncode == 0, ran.stderr
        # Only the two requests in flight at a kill are repeated.
        assert 32 <= len(server.requests) <= 32 + 2 * 2
    assert result(tmp_path, "mt_bench", "good")["overall"]["n"] > 5


def prefers_long(request) -> dict:
    """A judge that prefers longer answers and has a slight position bias toward the first, m."""
    text = request["messages"][-1]["content"]
    first, second = text.split("Output of m:")[1].split("Output of M:")
    longer = 0.9 if len(second) > len(first) else 0.2
    if "Name 3 " in text:
        longer = 0.5
    if "Name 4 " in text:
        longer = 0.45  # the same letter in both orders: inconsistent
    import math

    probabilities = {"m": 1 - longer, "M": longer}
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in probabilities.items()]
    token = max(probabilities, key=probabilities.get)
    return {
        "message": {"role": "assistant", "content": token},
        "finish_reason": "length",
        "index": 0,
        "logprobs": {"content": [{**top[0], "token": token, "top_logprobs": top}]},
    }


def pair_flags(files, out, server, *more):
    return [
        *("--mode", "pair", "--questions", files / "alpaca.json", "--benchmark", "alpaca_eval"),
        *("--answers", *(f"{name}={files / name}.json" for name in ("long", "short"))),
        *(
            "--baseline",
            "short",
            "--judge",
            "gpt-4o",
            "--server",
            server.url,
            "--out_dir",
            out,
            *more,
        ),
    ]


def test_pairs_are_judged_in_both_orders_and_ties_are_counted(files, tmp_path):
    with ChatServer(prefers_long) as server:
        ran = inside("judge.py", *pair_flags(files, tmp_path, server))
        assert len(server.requests) == 24
        assert all(r["max_tokens"] == 1 and r["logprobs"] for r in server.requests)
    found = result(tmp_path, "alpaca_eval", "long")
    wins = [0.85] * 12  # 0.9 if it is shown second, 1 - 0.2 if first
    wins[3], wins[4] = 0.5, 0.5
    assert [item["preference"] for item in found["items"]] == pytest.approx(wins)
    assert found["overall"]["mean"] == pytest.approx(sum(wins) / 12)
    assert found["ties"] == 2 and found["consistency"] == pytest.approx(11 / 12)
    for subset, place in (("koala", 0), ("vicuna", 1)):
        assert found["categories"][subset]["mean"] == pytest.approx(sum(wins[place::2]) / 6)
    assert found["read_from"] == {"log-probabilities": 24}
    assert 0 < found["length_controlled_win_rate"] < 1
    assert "length-controlled win rate" in ran.stdout and "ties 2" in ran.stdout


def test_text_verdicts_in_one_seeded_order(files, tmp_path):
    def judge(request):
        text = request["messages"][-1]["content"]
        first, second = text.split("Answer of assistant A:")[1].split("Answer of assistant B:")
        verdict = "[[C]]" if "Name 3 " in text else "no idea" if "Name 5 " in text else None
        verdict = verdict or ("[[B]]" if len(second) > len(first) else "[[A]]")
        message = {"role": "assistant", "content": f"Because. {verdict}"}
        return {"message": message, "finish_reason": "stop", "index": 0}

    with ChatServer(judge) as server:
        flags = pair_flags(files, tmp_path, server, "--verdict", "text", "--orders", "seeded")
        inside("judge.py", *flags)
        assert len(server.requests) == 12
    found = result(tmp_path, "alpaca_eval", "long")
    assert found["overall"]["without_verdict"] == 1 and found["overall"]["n"] == 11
    assert found["overall"]["mean"] == pytest.approx(10.5 / 11)
    assert found["consistency"] is None and found["ties"] == 1
    assert {order for item in found["items"] for order in item["orders"]} == {"0", "1"}


def test_models_answer_and_a_local_model_judges(house, files, tmp_path):
    """The second prompt contains the first answer; a rerun neither answers nor judges."""
    flags = [
        *("--questions", files / "question.jsonl", "--models", f"student={house / 'student'}"),
        *("--judge", house / "teacher", "--max_new_tokens", 6, "--judge_max_new_tokens", 4),
        *("--out_dir", tmp_path),
    ]
    inside("judge.py", *flags)
    folder = tmp_path / "judge" / "mt_bench"
    answers = [
        json.loads(line) for line in (folder / "answers" / "student.jsonl").read_text().splitlines()
    ]
    assert [len(row["choices"][0]["turns"]) for row in answers] == [2] * 8
    rows = [json.loads(line) for line in (folder / "judgements.jsonl").read_text().splitlines()]
    second = [row for row in rows if row["turn"] == 2]
    by_id = {row["question_id"]: row["choices"][0]["turns"] for row in answers}
    for row in second:
        assert all(turn in text_of(row["request"]) for turn in by_id[row["question_id"]])
    before = (folder / "judgements.jsonl").read_bytes()
    again = inside("judge.py", *flags)
    assert "0 to request" in again.stdout and "Loading" not in again.stderr
    assert (folder / "judgements.jsonl").read_bytes() == before


def test_refused_judgements_end_the_run_with_the_reason_and_the_rest_is_kept(files, tmp_path):
    def refuses(request):
        return (
            {"refused": "no such policy"} if "good says 83" in text_of(request) else graded(request)
        )

    with ChatServer(refuses) as server:
        ran = command("judge.py", *score_flags(files, tmp_path, server, "good"))
    assert ran.returncode == 2
    assert "2 of 16 judgements have no verdict" in ran.stderr and "no such policy" in ran.stderr
    with ChatServer(graded) as server:
        inside("judge.py", *score_flags(files, tmp_path, server, "good"))
        assert len(server.requests) == 2


def test_one_token_verdicts_on_several_turns_are_an_error_before_any_request(files, tmp_path):
    with ChatServer(graded) as server:
        flags = [*score_flags(files, tmp_path, server, "good", "bad"), "--mode", "pair"]
        with pytest.raises(ValueError, match="8 questions have several turns.*verdict: text"):
            inside("judge.py", *flags, "--baseline", "bad")
    assert not server.requests
