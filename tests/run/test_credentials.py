"""Tokens, keys and passwords are refused on command lines and hidden everywhere else."""

import json

import pytest
from mistakes import runs
from mistakes.frame import Case, command_line, make_work
from scripts import run_main

from kd.credentials import HIDDEN, without_credentials
from kd.recipe import parse
from kd.run.run_record import read_record, write_record
from kd.settings.generation import ServerSettings

SECRET = "a1b2c3"  # in the cases of tests/mistakes/runs.py


@pytest.mark.parametrize(
    "text",
    [
        "https://user:SECRET@host/x",
        "https://SECRET@host/x",
        "http://host/x?token=SECRET&split=train",
        "http://host/x?split=train&api_key=SECRET",
        "--hub_token SECRET --seed 1",
        '["--api-key",\n "SECRET"]',
        "{'Authorization': 'Bearer SECRETSECRETSECRET'}",
        "refused with header authorization: SECRETSECRETSECRET",
        f"hf_{'SECRET' * 4}",
        "sk-proj-SECRETSECRET",
        "the server said: no key named of-the-environment-SECRET",
    ],
)
def test_a_secret_is_hidden_and_the_rest_of_the_text_is_kept(text, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "of-the-environment-SECRET")
    hidden = without_credentials(text)
    assert "SECRET" not in hidden and HIDDEN in hidden
    assert without_credentials(hidden) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "--max_new_tokens 16 --key_variable OPENAI_API_KEY",
        "http://localhost:8000/v1",
        "git@github.com:a/b and https://x.com/a@b?page=2",
        "You are the bearer of news; authorization: none; a basic question",
        "sk-learn and hf_home",
    ],
)
def test_other_text_is_unchanged(text, monkeypatch):
    monkeypatch.setenv("SSH_KEY", "short")
    assert without_credentials(text) == text


CASES = [case for case in runs.CASES if SECRET in str(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_refused_secret_is_neither_shown_nor_recorded(
    case: Case, models, tmp_path_factory, tmp_path, capfd
):
    work = make_work(tmp_path_factory.mktemp("work"), models)
    tokens = command_line(case, work, tmp_path)
    given = {file for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError) as raised:
        run_main(case.script, *tokens)
    output = capfd.readouterr()
    assert SECRET not in str(raised.value) + output.out + output.err
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file not in given]
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]


def test_a_secret_of_the_environment_is_refused_as_a_value(monkeypatch):
    monkeypatch.setenv("MY_KEY", "the-value-of-my-key-7")
    with pytest.raises(ValueError, match="found a secret in .*HF_TOKEN for the hub"):
        parse(ServerSettings, argv=["--server", "http://host/the-value-of-my-key-7"])


def test_the_recorded_command_has_no_secret(tmp_path, monkeypatch):
    """Another program may have put it there: the parser refuses it before."""
    monkeypatch.setattr("sys.argv", ["x.py", "--hub_token", SECRET, json.dumps({"a": "?token=x"})])
    write_record(str(tmp_path), [])
    assert SECRET not in (tmp_path / "run.json").read_text()
    assert read_record(tmp_path)["command"] == [
        "x.py",
        "--hub_token",
        HIDDEN,
        f'{{"a": "?token={HIDDEN}"}}',
    ]
