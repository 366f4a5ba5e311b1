"""Keys, batches, the raw file, and the settings that are refused."""

import pytest

from kd.data.sources import load_prompts
from kd.generation.sampling import (
    GenerationSettings,
    compose_batches,
    cut_torn_lines,
    raw_file,
    read_raw,
    wanted_samples,
)


def settings(**changed) -> GenerationSettings:
    given = {"model": "m", "prompts": '[{"path": "p.jsonl"}]', "output_dir": "out"}
    return GenerationSettings(**(given | changed))


def keys(prompts, **changed) -> set[str]:
    return {sample.key for sample in wanted_samples(prompts, settings(**changed))}


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "n"},
        {"system_prompt": "be kind"},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"max_new_tokens": 7},
        {"seed": 1},
        {"dtype": "float32"},
    ],
)
def test_each_decisive_setting_changes_every_key(prompts, changed):
    assert not keys(prompts) & keys(prompts, **changed)


def test_more_samples_more_prompts_and_other_batches_keep_the_old_keys(prompts):
    assert keys(prompts[:9]) < keys(prompts[:9], samples_per_prompt=3)
    assert keys(prompts[:9]) < keys(prompts)
    assert keys(prompts) == keys(prompts, batch_size=3, output_dir="elsewhere")


def test_a_repeated_prompt_is_asked_once(prompts):
    assert len(wanted_samples(prompts[:5] * 2, settings(samples_per_prompt=2))) == 10


def test_batches_hold_every_sample_once_and_do_not_depend_on_what_is_finished(prompts):
    samples = wanted_samples(prompts, settings(samples_per_prompt=2))
    batches = compose_batches(samples, 7)
    assert sorted(s.key for batch in batches for s in batch) == sorted(s.key for s in samples)
    assert batches == compose_batches(wanted_samples(prompts, settings(samples_per_prompt=2)), 7)


def test_the_hidden_system_prompt_replaces_the_prompts_own(prompts):
    with_own, without = (
        next(s for s in wanted_samples(prompts, settings()) if len(s.prompt) == n) for n in (2, 1)
    )
    hidden = {"role": "system", "content": "answer briefly"}
    for sample in (with_own, without):
        assert sample.conversation("answer briefly") == [hidden, sample.prompt[-1]]
        assert sample.conversation(None) == sample.prompt


def test_a_torn_last_line_is_cut_and_whole_lines_stay(tmp_path):
    raw_file(tmp_path, 0).write_text('{"key": "a"}\n{"key": "b"}\n{"key": "c", "answer": "half a')
    raw_file(tmp_path, 1).write_text('{"key": "d"}\n')
    raw_file(tmp_path, 2).write_text('{"k')
    assert cut_torn_lines(tmp_path) == len('{"key": "c", "answer": "half a') + len('{"k')
    assert set(read_raw(tmp_path)) == {"a", "b", "d"}
    assert cut_torn_lines(tmp_path) == 0


def test_prompts_are_what_precedes_the_first_answer(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a?"}\n'
        '{"prompt": "b?", "completion": "dropped"}\n'
        '{"messages": [{"role": "user", "content": "c?"}]}\n'
        '{"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "d?"}, '
        '{"role": "assistant", "content": "dropped"}, {"role": "user", "content": "dropped"}]}\n'
    )
    found = load_prompts([{"path": str(path), "system": "given"}], 0)
    assert [[message["content"] for message in prompt] for prompt in found] == [
        ["given", "a?"],
        ["given", "b?"],
        ["given", "c?"],
        ["own", "d?"],
    ]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ('{"text": "a"}', "wanted messages or prompt"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no user message"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content string"),
    ],
)
def test_a_row_without_a_question_is_refused_with_its_line(tmp_path, row, found):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a?"}\n' + row + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{found}"):
        load_prompts([{"path": str(path)}], 0)


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
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        settings(**changed)
