"""Means and standard errors of verdicts, pairs without a verdict, and difficulties."""

import pytest

from kd.evaluation.judge.judge_results import means, pair_result
from kd.evaluation.judge.judgements import Judge, Judgement
from kd.evaluation.judge.questions import Question, read_difficulties

PAIRS = Judge("gpt", "pair", "text", "both", 10, {})


def judged(*texts: tuple[str, str]) -> dict:
    """The result if the judge answers question i with these texts, in order 0 and order 1."""
    judgements, verdicts = [], {}
    for i, pair in enumerate(texts):
        question = Question(str(i), "all", ["What?"])
        for order, text in enumerate(pair):
            key = f"{i} {order}"
            judgements.append(Judgement("model", question, 1, order, {}, key))
            verdicts[key] = {"text": text, "top_log_probabilities": None}
    answers, others = ({str(i): [x] for i in range(len(texts))} for x in ("answer", "other one"))
    return pair_result(PAIRS, judgements, verdicts, answers, others)


def test_the_models_answer_is_first_in_order_0_and_second_in_order_1():
    found = judged(("[[A]]", "[[B]]"), ("[[B]]", "[[A]]"), ("[[A]]", "[[A]]"), ("[[C]]", "[[C]]"))
    assert [item["preference"] for item in found["items"]] == [1.0, 0.0, 0.5, 0.5]
    assert found["overall"]["mean"] == 0.5 and found["ties"] == 2
    assert {(item["length"], item["baseline_length"]) for item in found["items"]} == {(6, 9)}
    assert found["consistency"] == 3 / 4  # the same letter twice: two winners
    assert judged(("[[C]]", "[[B]]"))["consistency"] == 0.0  # a tie and a win are inconsistent


def test_a_pair_with_one_verdict_of_two_counts_as_without_verdict():
    """A single order would include the position bias of the judge."""
    found = judged(("[[A]]", "[[B]]"), ("[[A]]", "none"), ("none", "none"))
    assert [item["preference"] for item in found["items"]] == [1.0, None, None]
    assert (found["overall"]["n"], found["overall"]["without_verdict"]) == (1, 2)
    assert found["consistency"] == 1.0 and found["read_from"] == {"text": 3}


def test_the_standard_error_of_a_mean_is_that_of_its_items():
    found = means([{"x": value} for value in (1.0, 2.0, None, 3.0, 6.0)], "x")
    deviation = ((4 + 1 + 0 + 9) / 3) ** 0.5
    assert found["mean"] == 3.0 and (found["n"], found["without_verdict"]) == (4, 1)
    assert found["standard_error"] == pytest.approx(deviation / 2)
    assert means([{"x": 1.0}], "x")["standard_error"] is None
    assert means([{"x": None}], "x")["mean"] is None


def test_difficulties_are_read_by_column_and_every_question_needs_one(tmp_path):
    questions = [Question(str(i), "all", ["What?"]) for i in range(2)]
    file = tmp_path / "difficulty.csv"
    file.write_text("index,model,instruction_difficulty\n0,none,0.5\n1,none,-2\n7,none,1\n")
    assert read_difficulties(str(file), questions) == {"0": 0.5, "1": -2.0, "7": 1.0}
    assert read_difficulties(None, questions) is None
    file.write_text("index,instruction_difficulty\n0,0.5\n")
    with pytest.raises(ValueError, match="lacks 1 questions, the first is 1; wanted"):
        read_difficulties(str(file), questions)
    for text in ("", "index,difficulty\n0,0.5\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="wanted index and instruction_difficulty"):
            read_difficulties(str(file), questions)
