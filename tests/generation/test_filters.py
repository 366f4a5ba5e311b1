"""Raw answers to training rows."""

import pytest

from kd.generation.filters import training_rows
from kd.generation.sampling import Sample

QUESTION = [{"role": "user", "content": "a?"}]
ANSWERS = [
    ("good", True),
    ("good", True),  # a duplicate
    ("other", True),
    ("", True),
    (" \n", True),
    ("too lo", False),
    ("", False),  # cut first: it had not ended
]


def sampled(answers: list[tuple[str, bool]]) -> tuple[list[Sample], dict[str, dict]]:
    samples = [Sample(QUESTION, i, str(i)) for i in range(len(answers))]
    raw = {str(i): {"answer": text, "stopped": end} for i, (text, end) in enumerate(answers)}
    return samples, raw


def test_empty_cut_and_repeated_answers_are_dropped_and_counted():
    rows, report = training_rows(*sampled(ANSWERS))
    assert [row["messages"][-1]["content"] for row in rows] == ["good", "other"]
    assert (report.samples, report.kept) == (7, 2)
    assert (report.empty, report.cut, report.duplicate) == (2, 2, 1)


def test_equal_answers_to_other_questions_are_no_duplicates():
    samples, raw = sampled(ANSWERS[:1])
    other = Sample([{"role": "user", "content": "b?"}], 0, "b")
    rows, report = training_rows([*samples, other], raw | {"b": raw["0"]})
    assert len(rows) == 2 and report.duplicate == 0


def test_rows_do_not_depend_on_the_order_of_the_raw_file():
    samples, raw = sampled(ANSWERS)
    assert training_rows(samples, raw) == training_rows(samples, dict(reversed(raw.items())))


def test_no_row_left_is_an_error():
    with pytest.raises(ValueError, match="2 cut at max_new_tokens"):
        training_rows(*sampled(ANSWERS[-2:]))
