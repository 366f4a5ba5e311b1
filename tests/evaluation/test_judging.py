"""What verdicts come to: means with their errors, and pairs of which one order has no verdict."""

import runpy

import pytest
from processes import ROOT

from kd.evaluation.judge.judging import Judge, Judgement, means, pair_result
from kd.evaluation.judge.questions import Question

PAIRS = Judge("gpt", "pair", "text", "both", 10, {})


def judged(*verdicts: tuple[str, str]) -> dict:
    """The result where order 0 and order 1 of question i got these words."""
    wanted, rows = [], {}
    for i, pair in enumerate(verdicts):
        question = Question(str(i), "all", ["What?"])
        for order, text in enumerate(pair):
            key = f"{i} {order}"
            wanted.append(Judgement("model", question, 1, order, {}, key))
            rows[key] = {"text": text, "top_log_probabilities": None}
    answers, others = ({str(i): [x] for i in range(len(verdicts))} for x in ("answer", "other one"))
    return pair_result(PAIRS, wanted, rows, answers, others)


def test_the_models_answer_stands_first_in_order_0_and_second_in_order_1():
    found = judged(("[[A]]", "[[B]]"), ("[[B]]", "[[A]]"), ("[[A]]", "[[A]]"), ("[[C]]", "[[C]]"))
    assert [item["preference"] for item in found["items"]] == [1.0, 0.0, 0.5, 0.5]
    assert found["overall"]["mean"] == 0.5 and found["ties"] == 2
    assert {(item["length"], item["baseline_length"]) for item in found["items"]} == {(6, 9)}
    assert found["consistency"] == 3 / 4  # twice the same letter is no one winner
    assert judged(("[[C]]", "[[B]]"))["consistency"] == 0.0  # neither are a tie and a win


def test_a_pair_with_one_verdict_of_two_is_counted_and_not_averaged():
    """Half of a pair has the judge's preference for a place in it."""
    found = judged(("[[A]]", "[[B]]"), ("[[A]]", "none"), ("none", "none"))
    assert [item["preference"] for item in found["items"]] == [1.0, None, None]
    assert (found["overall"]["n"], found["overall"]["without_verdict"]) == (1, 2)
    assert found["consistency"] == 1.0 and found["read_from"] == {"text": 3}


def test_the_error_of_a_mean_is_that_of_its_items():
    found = means([{"x": value} for value in (1.0, 2.0, None, 3.0, 6.0)], "x")
    deviation = ((4 + 1 + 0 + 9) / 3) ** 0.5
    assert found["mean"] == 3.0 and (found["n"], found["without_verdict"]) == (4, 1)
    assert found["standard_error"] == pytest.approx(deviation / 2)
    assert means([{"x": 1.0}], "x")["standard_error"] is None
    assert means([{"x": None}], "x")["mean"] is None


def test_difficulties_are_read_by_their_column_and_every_question_has_one(tmp_path):
    """Before the judge is asked anything."""
    read = runpy.run_path(str(ROOT / "eval/judge.py"))["read_difficulties"]
    questions = [Question(str(i), "all", ["What?"]) for i in range(2)]
    file = tmp_path / "difficulty.csv"
    file.write_text("index,model,instruction_difficulty\n0,none,0.5\n1,none,-2\n7,none,1\n")
    assert read(str(file), questions) == {"0": 0.5, "1": -2.0, "7": 1.0}
    assert read(None, questions) is None
    file.write_text("index,instruction_difficulty\n0,0.5\n")
    with pytest.raises(ValueError, match="nothing of 1 questions, the first 1; wanted"):
        read(str(file), questions)
    for text in ("", "index,difficulty\n0,0.5\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="wanted index and instruction_difficulty"):
            read(str(file), questions)
