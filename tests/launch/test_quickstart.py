"""The quickstart runs from its first line to its report, and the report shows a gain."""

import json

import pytest
from processes import ROOT

OUT = ROOT / "runs" / "quickstart"


@pytest.fixture(scope="module")
def report(quickstart) -> dict:
    assert "wrote runs/quickstart/report.md" in quickstart and "tensorboard" in quickstart
    return json.loads((OUT / "report.json").read_text())


@pytest.mark.slow
def test_quickstart_leaves_report_plots_and_tensorboard_logs(report):
    text = (OUT / "report.md").read_text()
    assert "<summary>What the numbers say" in text
    measured = text.split("<summary>Judged")[0]
    measured += text.split("<summary>Training curves")[1].split("<summary>Where")[0]
    assert not [cell for cell in ("| not run", ": not run", "\nnot run") if cell in measured]
    assert len(list(OUT.glob("*.png"))) >= 2
    for name in ("sft", "distill", "distill+sft"):
        student = OUT / "students" / f"{name}-seed0"
        assert list((student / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_hidden_system_prompt_is_in_no_training_row(report):
    rows = (OUT / "answers" / "train.jsonl").read_text().splitlines()
    raw = (OUT / "answers" / "raw.jsonl").read_text()
    assert len(rows) > 500 and "Answer in full." in raw
    assert not [row for row in rows if "Answer in full." in row or '"system"' in row]


@pytest.mark.slow
def test_teacher_is_better_and_distillation_removes_more_of_the_kl_than_its_text(report):
    metrics = {name: entry["metrics"] for name, entry in report["settings"].items()}
    teacher, start_ = (metrics[name]["text_perplexity"]["mean"] for name in ("teacher", "start"))
    assert teacher <= 0.75 * start_
    removed = {name: metrics[name]["kl_removed"]["mean"] for name in ("sft", "distill")}
    assert removed["distill"] >= 0.45 and removed["distill"] - removed["sft"] >= 0.08, removed
    trained = {metrics[name]["forward_kl"]["n"] for name in ("sft", "distill", "distill+sft")}
    assert trained == {1}


@pytest.mark.slow
def test_answers_of_the_teacher_are_sentences(report):
    lines = (OUT / "results" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answers"]["teacher"] for line in lines]
    sentences = [a for a in answers if a[:1].isupper() and a.endswith(".") and len(a.split()) > 3]
    assert len(sentences) >= 0.75 * len(answers) > 0, answers
