"""Sample keys, batches, records, prompts, and invalid settings."""

import itertools
import json

import pytest

from kd.generation.answering import chat_request, served_row
from kd.generation.prompts import Prompt, load_prompts
from kd.generation.records import cut_torn_lines, read_raw_answers, record_file
from kd.generation.sampling import Sample, compose_batches, plan_samples
from kd.generation.server import Completion
from kd.settings.generation import GenerationSettings, ServerSettings


def settings(**changed) -> GenerationSettings:
    given = {"model": "m", "prompts": '[{"path": "p.jsonl"}]', "output_dir": "out"}
    lists = ("temperature", "top_p", "seed", "system_prompt")
    spelt = {k: [v] if k in lists and not isinstance(v, list) else v for k, v in changed.items()}
    return GenerationSettings(**(given | spelt))


def planned(prompts, **changed) -> list[Sample]:
    return plan_samples([Prompt(prompt) for prompt in prompts], settings(**changed))


def keys(prompts, **changed) -> set[str]:
    return {sample.key for sample in planned(prompts, **changed)}


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "n"},
        {"system_prompt": "be kind"},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_new_tokens": 7},
        {"seed": 1},
        {"template_arguments": '{"enable_thinking": false}'},
    ],
)
def test_each_setting_that_determines_answers_changes_every_key(prompts, changed):
    assert not keys(prompts) & keys(prompts, **changed)


def test_the_type_of_the_weights_changes_every_key_and_auto_is_one_of_them(prompts):
    """Which one depends on the device."""
    types = [keys(prompts, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    assert not any(a & b for a, b in itertools.combinations(types, 2))
    assert keys(prompts) in types


def test_more_samples_more_prompts_and_other_batches_keep_existing_keys(prompts):
    assert keys(prompts[:9]) < keys(prompts[:9], samples_per_prompt=3)
    assert keys(prompts[:9]) < keys(prompts)
    assert keys(prompts) == keys(prompts, batch_size=3, output_dir="elsewhere")


def test_a_duplicate_prompt_is_sampled_once(prompts):
    assert len(planned(prompts[:5] * 2, samples_per_prompt=2)) == 10


def test_batches_hold_every_sample_once_with_one_temperature_and_top_p(prompts):
    samples = planned(prompts, samples_per_prompt=2, temperature=[0.5, 1.0])
    batches = compose_batches(samples, 7)
    assert sorted(s.key for batch in batches for s in batch) == sorted(s.key for s in samples)
    assert all(len({s.sampling for s in batch}) == 1 for batch in batches)


def test_the_hidden_system_prompt_replaces_the_rows_own(prompts):
    for hidden in ("answer briefly", None):
        samples = planned(prompts, system_prompt=hidden or "")
        with_own, without = (
            next(s for s in samples if len(s.prompt.messages) == n) for n in (2, 1)
        )
        for sample in (with_own, without):
            shown = [{"role": "system", "content": hidden}, sample.prompt.messages[-1]]
            assert sample.conversation == (shown if hidden else sample.prompt.messages)


def test_each_source_may_have_its_own_hidden_system_prompt(prompts):
    two = '[{"path": "p.jsonl"}, {"path": "q.jsonl"}, {"path": "r.jsonl"}]'
    by_source = settings(prompts=two, system_prompt=["be kind", "", "be brief"])
    asked = [Prompt(prompt, source=i % 3) for i, prompt in enumerate(prompts[:3])]
    found = [s.config["system_prompt"] for s in plan_samples(asked, by_source)]
    assert found == ["be kind", None, "be brief"]
    with pytest.raises(ValueError, match="system_prompt: 2 for 3 sources"):
        settings(prompts=two, system_prompt=["be kind", "be brief"])


def test_samples_of_a_prompt_cycle_through_temperatures_top_ps_and_seeds(prompts):
    found = planned(
        prompts[:1], samples_per_prompt=4, temperature=[0.5, 0.7, 1.0], top_p=[1.0, 0.9], seed=[5]
    )
    drawn = [(s.config["temperature"], s.config["top_p"], s.config["seed"]) for s in found]
    assert drawn == [(0.5, 1.0, 5), (0.7, 0.9, 5), (1.0, 1.0, 5), (0.5, 0.9, 5)]
    assert len({s.seed for s in found}) == 4


def test_a_torn_last_line_is_removed_and_complete_lines_stay(tmp_path):
    a, b = (f'{{"key": "{key}", "answer": ""}}\n' for key in "ab")
    record_file(tmp_path, "raw", 0).write_text(a + b + '{"key": "c", "answer": "half a')
    record_file(tmp_path, "raw", 1).write_text('{"key": "d", "answer": ""}\n')
    record_file(tmp_path, "raw", 2).write_text('{"k')
    assert cut_torn_lines(tmp_path, "raw") == len('{"key": "c", "answer": "half a') + len('{"k')
    assert set(read_raw_answers(tmp_path)[0]) == {"a", "b", "d"}
    assert cut_torn_lines(tmp_path, "raw") == 0


def test_the_first_answer_of_a_key_counts_and_an_error_is_not_an_answer(tmp_path):
    lines = [
        '{"key": "a", "error": "later"}',
        '{"key": "a", "answer": "first"}',
        '{"key": "a", "answer": "second"}',
        '{"key": "b", "error": "refused"}',
    ]
    record_file(tmp_path, "raw", 0).write_text("\n".join(lines) + "\n")
    answers, errors = read_raw_answers(tmp_path)
    assert answers["a"]["answer"] == "first" and errors == {"b": "refused"}


def load(path, **source):
    return load_prompts(settings(prompts=json.dumps([{"path": str(path)} | source])))


def test_a_prompt_precedes_the_first_answer_and_that_answer_is_the_gold_one(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a?"}\n'
        '{"prompt": "b?", "completion": "dropped"}\n'
        '{"messages": [{"role": "user", "content": "c?"}]}\n'
        '{"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "d?"}, '
        '{"role": "assistant", "content": "dropped"}, {"role": "user", "content": "dropped"}]}\n'
    )
    found = load(path, system="given")
    assert [[message["content"] for message in prompt.messages] for prompt in found] == [
        ["given", "a?"],
        ["given", "b?"],
        ["given", "c?"],
        ["own", "d?"],
    ]
    assert [prompt.gold for prompt in found] == [None, "dropped", None, "dropped"]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"text": "a"}', "wanted messages, conversations, prompt or instruction"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no user message"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content string"),
    ],
)
def test_a_row_without_a_prompt_is_an_error_that_names_its_line(tmp_path, row, found):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a?"}\n' + row + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{found}"):
        load(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"model": ""},
        {"prompts": ""},
        {"output_dir": ""},
        {"samples_per_prompt": 0},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"temperature": 0.0, "samples_per_prompt": 2},
        {"temperature": 0.0, "top_p": 0.9},
        {"seed": [0, 1]},
    ],
)
def test_invalid_generation_settings_are_an_error(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        settings(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"concurrency": 0},
        {"retries": -1},
        {"request_timeout": 0.0},
        {"price_per_million_tokens": [1.0]},
    ],
)
def test_invalid_server_settings_are_an_error(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        ServerSettings(**changed)


def test_template_arguments_are_sent_to_a_server(prompts):
    (sample,) = planned(prompts[:1], template_arguments='{"enable_thinking": false}')
    assert chat_request(sample)["extra_body"] == {
        "chat_template_kwargs": {"enable_thinking": False}
    }
    (sample,) = planned(prompts[:1])
    assert "extra_body" not in chat_request(sample)


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter", "tool_calls"])
def test_only_the_finish_reason_stop_means_a_complete_answer(prompts, finish):
    (sample,) = planned(prompts[:1])
    row = served_row(sample, Completion("so", finish, 3, 2, "big", None))
    assert row["stopped"] == (finish == "stop")


def test_keys_of_served_samples_do_not_depend_on_dtype(prompts):
    asked = [Prompt(prompts[0])]
    ours, other = settings(), settings(dtype="float32")
    (here,) = plan_samples(asked, ours)
    (there,), (again,) = (plan_samples(asked, s, served=True) for s in (ours, other))
    assert here.key != there.key == again.key
