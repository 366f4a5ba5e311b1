"""Split rationales and compare conclusions with gold answers."""

import pytest

from kd.generation.rationales import gold_answer, same_answer, split_rationale


@pytest.mark.parametrize(
    ("found", "gold"),
    [
        ("18", "18"),
        ("$18.", "18"),
        ("1,000.0 dollars", "1000 dollars"),
        ("The mitochondria.", "mitochondria"),
        ("(B)", "b"),
        ("**Yes**", "yes"),
        ("-5", "-5.0"),
        ("\u041c\u043e\u0441\u043a\u0432\u0430.", "\u043c\u043e\u0441\u043a\u0432\u0430"),
        ("1/2", "1/2"),
    ],
)
def test_answers_that_differ_only_in_spelling_are_equal(found, gold):
    assert same_answer(found, gold)


@pytest.mark.parametrize(
    ("found", "gold"),
    [
        ("18", "81"),
        ("-5", "5"),
        ("1.5", "15"),
        ("1/2", "2/1"),
        ("mitochondria and ribosomes", "mitochondria"),
        ("!", "?"),
        ("no", "yes"),
    ],
)
def test_different_answers_are_not_equal(found, gold):
    assert not same_answer(found, gold)


def test_the_last_marker_separates_reasoning_and_conclusion():
    told = "Answer: is what I must give. 2 + 2 is 4.\nAnswer: 4"
    assert split_rationale(told, "Answer:") == ("Answer: is what I must give. 2 + 2 is 4.", "4")
    for broken in ("4", "Answer: 4", "It is 4. Answer:", ""):
        assert split_rationale(broken, "Answer:") is None


def test_the_text_after_the_last_marker_is_the_gold_answer():
    assert gold_answer("5 #### of 6, so #### 30 eggs\n", "####") == "30 eggs"
    assert gold_answer(" 30 eggs ", None) == gold_answer("30 eggs", "####") == "30 eggs"
