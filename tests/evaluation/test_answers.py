"""eval/answers.py: answers side by side, and answers matched with their references."""

import json

import pytest
from chat_server import ChatServer
from held_out import command, inside, sources, write_jsonl

from kd.evaluation.answers import contains, match_result


def test_answers_are_written_side_by_side(house, tmp_path):
    out = tmp_path / "answers.jsonl"
    ran = command(
        *("answers.py", "--models", f"a={house / 'teacher'}", f"b={house / 'adapter'}"),
        *("--data", json.dumps(sources(house)[1:]), "--count", 2, "--max_new_tokens", 4),
        *("--out", out),
    )
    assert ran.returncode == 0, ran.stderr
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"][-1]["content"] for row in written] == ["What is it?", "And this?"]
    assert [row["reference"] for row in written][0] == "A thing."
    assert all(set(row["answers"]) == {"a", "b"} for row in written)


@pytest.mark.parametrize(
    ("answer", "reference", "inside"),
    [
        ("It is the Water, I think.", "water", True),
        ("Ice-cream!", "ice-cream", True),
        ("watery", "water", False),
        ("carbon and dioxide", "carbon dioxide", False),
        ("a carbon dioxide gas", "The carbon dioxide", True),
        ("anything", "the", False),
        ("", "water", False),
    ],
)
def test_an_answer_matches_by_whole_words_without_articles(answer, reference, inside):
    assert contains(answer, reference) == inside


def test_match_and_exact_are_shares_of_all_items():
    rows = [{"prompt": [], "reference": r} for r in ("water", "the ice", "sand")]
    found = match_result(rows, ["Water.", "It is ice", "stone"])
    assert found["overall"] == {"match": 2 / 3, "exact": 1 / 3, "n": 3}


def test_answers_are_matched_reused_and_written_for_the_judge(house, tmp_path):
    """Rows have the fields of sciq without its options. A rerun does not generate again."""
    questions = [
        {"question": f"What boils {i} times?", "correct_answer": "water", "distractor1": "sand"}
        for i in range(3)
    ]
    write_jsonl(tmp_path / "sciq.jsonl", questions)
    columns = {"prompt": "question", "completion": "correct_answer"}
    source = [{"path": str(tmp_path / "sciq.jsonl"), "columns": columns}]
    flags = [
        *("answers.py", "--models", f"student={house / 'student'}", "--data", json.dumps(source)),
        *(
            "--count",
            3,
            "--max_new_tokens",
            5,
            "--out_dir",
            tmp_path,
            "--out",
            tmp_path / "all.jsonl",
        ),
    ]
    inside(*flags)
    found = json.loads((tmp_path / "open_answers" / "student.json").read_text())
    assert [item["reference"] for item in found["items"]] == ["water"] * 3
    again = inside(*flags)
    assert "measured already" in again.stdout
    assert "Loading weights" not in again.stderr

    def grade_five(_):
        message = {"role": "assistant", "content": "[[5]]"}
        return {"message": message, "finish_reason": "stop", "index": 0}

    judge = tmp_path / "open_answers" / "judge"
    with ChatServer(grade_five) as server:
        inside(
            *("judge.py", "--questions", judge / "questions.jsonl", "--benchmark", "sciq"),
            *("--references", judge / "references.jsonl", "--judge", "j", "--server", server.url),
            *("--answers", f"student={judge / 'student.jsonl'}", "--out_dir", tmp_path),
        )
        contents = [request["messages"][-1]["content"] for request in server.requests]
    # Requests arrive in any order.
    asked = next(text for text in contents if "What boils 0 times" in text)
    first = found["items"][0]
    assert all(text in asked for text in ("What boils", "water", first["answer"]))
    assert "sand" not in asked
