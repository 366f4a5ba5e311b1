"""Filter answers into training rows."""

import pytest

from kd.data.near_duplicates import Overlap
from kd.generation.decontamination import evaluation_texts
from kd.generation.filters import training_rows
from kd.generation.prompts import Prompt
from kd.generation.sampling import Sample
from kd.settings.generation import FilterSettings

PROMPT = [{"role": "user", "content": "a?"}]
ANSWERS = [
    ("good", True),
    ("good", True),  # a duplicate
    ("other", True),
    ("", True),
    (" \n", True),
    ("too lo", False),
    ("", False),  # counted as truncated, not as empty
]


def sampled(answers: list[tuple[str, bool]]) -> tuple[list[Sample], dict[str, dict]]:
    samples = [Sample(Prompt(PROMPT), i, {}, str(i)) for i in range(len(answers))]
    raw = {str(i): {"answer": text, "stopped": end} for i, (text, end) in enumerate(answers)}
    return samples, raw


def test_empty_truncated_and_duplicate_answers_are_dropped_and_counted():
    rows, report = training_rows(*sampled(ANSWERS))
    assert [row["messages"][-1]["content"] for row in rows] == ["good", "other"]
    assert (report.samples, report.kept) == (7, 2)
    assert (report.empty, report.cut, report.duplicate) == (2, 2, 1)


def test_equal_answers_to_different_prompts_are_not_duplicates():
    samples, raw = sampled(ANSWERS[:1])
    other = Sample(Prompt([{"role": "user", "content": "b?"}]), 0, {}, "b")
    rows, report = training_rows([*samples, other], raw | {"b": raw["0"]})
    assert len(rows) == 2 and report.duplicate == 0


def test_rows_do_not_depend_on_the_order_of_raw_jsonl():
    samples, raw = sampled(ANSWERS)
    assert training_rows(samples, raw) == training_rows(samples, dict(reversed(raw.items())))


def test_an_empty_result_is_an_error():
    with pytest.raises(ValueError, match="2 truncated at max_new_tokens"):
        training_rows(*sampled(ANSWERS[-2:]))


def answered(texts: list[str], answers: list[str], gold: list[str] | None = None):
    """One sample and one answer per prompt."""
    samples = [
        Sample(Prompt([{"role": "user", "content": text}], gold and gold[i]), 0, {}, str(i))
        for i, text in enumerate(texts)
    ]
    raw = {str(i): {"answer": answer, "stopped": True} for i, answer in enumerate(answers)}
    return samples, raw


def answers_of(rows: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def test_answers_that_repeat_themselves_are_dropped():
    loop = "and then it goes on " * 20
    plain = "every word of this answer is said one time only, as it should be, to the end"
    rows, report = training_rows(
        *answered(["a?", "b?"], [loop, plain]), FilterSettings(max_repetition=0.3)
    )
    assert answers_of(rows) == [plain] and report.repetitive == 1


ENGLISH = "The river was low that summer, and the mill stood still for nine weeks on end."
RUSSIAN = (
    "\u0412 \u0442\u043e \u043b\u0435\u0442\u043e \u0440\u0435\u043a\u0430 \u043e\u0431\u043c"
    "\u0435\u043b\u0435\u043b\u0430, \u0438 \u043c\u0435\u043b\u044c\u043d\u0438\u0446\u0430 "
    "\u0441\u0442\u043e\u044f\u043b\u0430"
)
OTHER_RUSSIAN = (
    "\u041d\u0438\u043a\u0442\u043e \u043d\u0435 \u0447\u0438\u0442\u0430\u0435\u0442 \u0436"
    "\u0443\u0440\u043d\u0430\u043b \u0434\u043e \u0442\u043e\u0433\u043e \u0434\u043d\u044f"
)
CHINESE = (
    "\u90a3\u5e74\u590f\u5929\u6cb3\u6c34\u5f88\u4f4e\u78e8\u574a\u505c\u4e86\u4e5d\u4e2a\u661f"
    "\u671f\u6ca1\u6709\u8f6c\u52a8"
)


@pytest.mark.parametrize("text", [ENGLISH, RUSSIAN, CHINESE])
def test_near_duplicates_are_dropped_in_any_script(text):
    near_duplicate = text.replace("end", "it") if text == ENGLISH else f"{text}!"
    settings = FilterSettings(near_duplicate_similarity=0.6)
    rows, report = training_rows(
        *answered(["a?", "a?", "a?"], [text, near_duplicate, OTHER_RUSSIAN]), settings
    )
    assert answers_of(rows) == [text, OTHER_RUSSIAN]
    assert report.near_duplicate == 1 and report.duplicate == 0


@pytest.mark.parametrize("text", [ENGLISH, RUSSIAN, CHINESE])
def test_rows_that_overlap_with_the_evaluation_data_are_dropped(text):
    asked = answered(["a?", f"Tell me: {text}", "b?"], [OTHER_RUSSIAN, "x", f"They say: {text}"])
    rows, report = training_rows(*asked, evaluation=Overlap([text]))
    assert answers_of(rows) == [OTHER_RUSSIAN] and report.evaluation == 2


def test_a_short_evaluation_prompt_drops_only_equal_texts():
    rows, report = training_rows(
        *answered(["Say hello!", "Why do people say hello?"], ["Hello.", "Because."]),
        evaluation=Overlap(["say hello", ""]),
    )
    assert answers_of(rows) == ["Because."] and report.evaluation == 1


def test_evaluation_prompts_are_read_from_the_formats_of_common_benchmarks(tmp_path):
    lines = [
        '{"turns": ["one", "two"]}',
        '{"instruction": "three"}',
        '{"prompt": "four"}',
        '{"messages": [{"role": "user", "content": "five"}, '
        '{"role": "assistant", "content": "no"}]}',
    ]
    path = tmp_path / "evaluation.jsonl"
    path.write_text("\n".join(lines) + "\n")
    found = evaluation_texts([{"path": str(path)}], 0)
    assert found == ["one", "two", "three", "four", "five"]
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="line 1: fields.*wanted messages, prompt, turns"):
        evaluation_texts([{"path": str(path)}], 0)


def rewards(*values: float) -> dict[str, float]:
    return {str(i): value for i, value in enumerate(values)}


def test_the_best_answer_per_prompt_is_kept_and_the_first_of_equal_rewards():
    samples, raw = answered(["a?", "a?", "b?", "b?", "b?"], list("uvxyz"))
    settings = FilterSettings(reward_model="r", keep_best=1)
    rows, report = training_rows(samples, raw, settings, rewards(0.1, 0.2, 5.0, -1.0, 5.0))
    assert answers_of(rows) == ["v", "x"] and report.not_best == 3


def test_answers_below_min_reward_are_dropped():
    samples, raw = answered(["a?", "b?", "c?"], list("xyz"))
    settings = FilterSettings(reward_model="r", min_reward=0.0)
    rows, report = training_rows(samples, raw, settings, rewards(-0.1, 0.0, 3.0))
    assert answers_of(rows) == ["y", "z"] and report.low_reward == 1


def test_rationales_must_conclude_with_the_gold_answer_and_labels_are_the_gold_answer():
    answers = [
        "Nine less four is five. Answer: 5 eggs.",
        "Nine less four is six. Answer: 6",
        "I do not know.",
        "Answer: 5",
    ]
    samples, raw = answered(
        ["How many eggs?", "How many?", "And?", "So?"], answers, ["... #### 5 eggs"] * 4
    )
    settings = FilterSettings(rationales=True, gold_marker="####", label_copies=2)
    rows, report = training_rows(samples, raw, settings)
    assert rows[0]["messages"] == [
        {"role": "user", "content": "[rationale] How many eggs?"},
        {"role": "assistant", "content": "Nine less four is five."},
    ]
    assert (report.wrong, report.no_conclusion, report.kept) == (1, 2, 1)
    assert answers_of(rows[1:]) == ["5 eggs"] * 8 and report.label_rows == 8
    assert all(row["messages"][0]["content"].startswith("[label] ") for row in rows[1:])


@pytest.mark.parametrize("hidden", ["be brief", ENGLISH, RUSSIAN])
def test_answers_that_quote_the_hidden_system_prompt_are_dropped(hidden):
    answers = [f"I was told: {hidden.upper()}", f"My rule is, {hidden}", "good"]
    samples, raw = answered(["a?", "b?", "c?"], answers)
    samples = [Sample(s.prompt, 0, {"system_prompt": hidden}, s.key) for s in samples]
    rows, report = training_rows(samples, raw)
    assert answers_of(rows) == ["good"] and report.leaked == 2


def test_samples_without_an_answer_are_counted_as_failed():
    samples, raw = sampled(ANSWERS[:3])
    del raw["0"]
    assert training_rows(samples, raw)[1].failed == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"max_repetition": 1.0},
        {"near_duplicate_similarity": 0.0},
        {"keep_best": 1},
        {"min_reward": 1.0},
        {"reward_model": "r"},
        {"reward_model": "r", "keep_best": 0},
        {"label_copies": 0},
        {"rationales": True, "answer_marker": " "},
    ],
)
def test_invalid_filter_settings_are_an_error(changed):
    with pytest.raises(ValueError, match=list(changed)[-1]):
        FilterSettings(**changed)


def test_each_prompt_has_one_label_row_unless_it_overlaps_with_the_evaluation_data():
    """The number of samples per prompt does not matter."""
    samples, raw = [], {}
    for i, text in enumerate(("How many eggs?", ENGLISH)):
        for index in range(3):
            sample = Sample(
                Prompt([{"role": "user", "content": text}], "5"), index, {}, f"{i}{index}"
            )
            samples.append(sample)
            raw[sample.key] = {"answer": f"{'so ' * index}it is. Answer: 5", "stopped": True}
    rows, report = training_rows(
        samples, raw, FilterSettings(rationales=True), evaluation=Overlap([ENGLISH])
    )
    labels = [row for row in rows if row["messages"][0]["content"].startswith("[label] ")]
    assert [row["messages"][0]["content"] for row in labels] == ["[label] How many eggs?"]
    assert (report.label_rows, report.kept, report.evaluation) == (1, 3, 3)


def test_a_quote_of_the_hidden_prompt_is_found_without_its_surrounding_whitespace():
    samples, raw = answered(["a?", "b?"], ["My rule: be brief.", "good"])
    samples = [Sample(s.prompt, 0, {"system_prompt": " be brief\n"}, s.key) for s in samples]
    rows, report = training_rows(samples, raw)
    assert answers_of(rows) == ["good"] and report.leaked == 1
    assert rows[0]["messages"][0]["role"] == "user"


def test_one_answer_to_two_prompts_is_not_a_near_duplicate():
    samples, raw = answered([ENGLISH, RUSSIAN], ["Yes, so it is.", "Yes, so it is."])
    rows, report = training_rows(samples, raw, FilterSettings(near_duplicate_similarity=0.6))
    assert len(rows) == 2 and report.near_duplicate == 0
