"""Small versions of experiments C and D, from training to the report that compares the students."""

import json
import shutil
from pathlib import Path

import pytest
from chat_server import ChatServer, digest
from held_out import section, write_jsonl
from processes import ROOT, start, succeed

from kd.evaluation.judge.questions import read_questions

DATA, SMALL = ROOT / "runs" / "quickstart" / "data", ROOT / "runs" / "small"


def trained(recipe: str, script: str) -> None:
    """Train a recipe unless it is done; gloo may abort a process that has finished."""
    if not (SMALL / recipe / "done.json").exists():
        config = f"recipes/small/{recipe}.yaml"
        if script == "inherit":
            succeed("python", "train/inherit.py", "--config", config)
        else:
            start("launch/cpu.sh", f"train/{script}.py", "--config", config)
    assert (SMALL / recipe / "done.json").exists()


@pytest.mark.slow
def test_experiment_c_reports_parent_inherited_and_trained_students(docstrings, tmp_path):
    shutil.rmtree(SMALL / "c_results", ignore_errors=True)
    for recipe, script in (("c_inherit", "inherit"), ("c_text", "sft"), ("c_distill", "distill")):
        trained(recipe, script)
    rows = {
        "boolq": [
            {"passage": f"A list holds {n} names.", "question": f"does it hold {n}", "label": n % 2}
            for n in range(8)
        ],
        "winogrande": [
            {
                **{
                    "sentence": f"Caller {n} waits because the _ is busy.",
                    "answer": str(1 + n % 2),
                },
                **{"option1": "server", "option2": "client"},
            }
            for n in range(8)
        ],
        "piqa": [
            {
                "goal": f"Sort {n} names.",
                "sol1": "Call sort.",
                "sol2": "Delete them.",
                "label": n % 2,
            }
            for n in range(8)
        ],
    }
    for task, of_task in rows.items():
        write_jsonl(tmp_path / f"{task}.jsonl", of_task)
    data = json.dumps({task: str(tmp_path / f"{task}.jsonl") for task in rows})
    succeed("recipes/small/c_compare.sh", data, timeout=1200)
    text = (SMALL / "c_report.md").read_text()
    numbers = json.loads((SMALL / "c_report.json").read_text())["items"]
    for task in rows:
        settings = numbers[f"{task} acc"]["settings"]
        assert set(settings) == {"parent", "inherited", "text", "distill"}
        for name in ("inherited", "text", "distill"):
            assert settings[name]["items"] == 8 and "loss" in settings[name]
            assert f"| {task} acc | {name} |" in text
    assert (SMALL / "size_and_speed.png").exists() and "KL to teacher" in numbers


@pytest.mark.slow
def test_experiment_d_grades_and_compares_students_teacher_and_start(docstrings, tmp_path):
    shutil.rmtree(SMALL / "d_results", ignore_errors=True)  # else the judge would be asked nothing
    for recipe, script in (
        ("d_sft", "sft"),
        ("d_distill", "distill"),
        ("d_distill_sft", "distill"),
    ):
        trained(recipe, script)
    write_questions(tmp_path)

    def answer(request: dict) -> dict:
        number = digest(json.dumps(request["messages"]))
        text = "mM"[number % 2] if request.get("logprobs") else f"Grade: [[{1 + number % 10}]]"
        return {
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "index": 0,
        }

    with ChatServer(answer, faulty=0.2, faults=("429", "500")) as server:
        succeed("recipes/small/d_compare.sh", tmp_path, server.url, "judge", timeout=1200)
        # 5 models x 4 questions x 2 turns are graded, 4 models x 6 pairs x 2 orders compared.
        assert len(server.requests) == 40 + 48 + server.met.total()
    text = (SMALL / "d_report.md").read_text()
    numbers = json.loads((SMALL / "d_report.json").read_text())["items"]
    assert {"KL to teacher", "chat perplexity", "mt_bench grade", "alpaca_eval win rate"} <= set(
        numbers
    )
    judged = section(text, "Judged")
    assert "| distill | math |" in judged and "win rate over start, by judge" in judged
    assert "| distill+sft |" in judged and "koala" in judged


def write_questions(folder: Path) -> None:
    rows = [
        {"question_id": i, "category": c, "turns": [f"What is {c}?", "Say it again."]}
        for i, c in enumerate(("math", "writing", "stem", "coding"))
    ]
    write_jsonl(folder / "question.jsonl", rows)
    reference = {"question_id": 0, "choices": [{"turns": ["Numbers.", "Numbers."]}]}
    write_jsonl(folder / "reference_gpt-4.jsonl", [reference])
    pairs = [
        {"instruction": f"Name {i} lists.", "dataset": ("koala", "vicuna")[i % 2]} for i in range(6)
    ]
    (folder / "alpaca_eval.json").write_text(json.dumps(pairs))
    assert len(read_questions(str(folder / "alpaca_eval.json"))) == 6
