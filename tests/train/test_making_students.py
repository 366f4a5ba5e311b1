"""train/inherit.py by its command line."""

import json

import pytest
from processes import start, succeed
from scripts import run_main
from small import save_small, small_rows
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inherit")
    save_small(folder / "parent", num_hidden_layers=4)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in small_rows(12)))
    return folder


def test_a_measured_student_is_saved_with_its_tokenizer_and_the_measurements(folder, capsys):
    data = json.dumps([{"path": str(folder / "rows.jsonl")}])
    call = ("python", "train/inherit.py", "--parent", folder / "parent", "--keep", 2)
    call = (*call, "--output_dir", folder / "student", "--choice", "perplexity", "--data", data)
    call = (*call, "--tokens", 300)
    printed = succeed(*call)
    done = json.loads((folder / "student" / "done.json").read_text())
    assert f"layers {done['layers']} of 4" in printed
    assert len(done["perplexity_without"]) == 2 and done["of"] == 4
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert student.config.num_hidden_layers == 2
    assert student.config.inherited["layers"] == done["layers"]
    assert AutoTokenizer.from_pretrained(folder / "student").chat_template
    run_main(*call[1:])
    assert "finished already" in capsys.readouterr().out  # not measured again


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--layers 2 7", "wanted increasing numbers from 0 to 3"),
        ("--layers 0 2 --keep 2", "layers, keep: both given"),
        ("", "layers, keep: neither given"),
        ("--keep 5", "keep: 5; wanted 1 to 4"),
        ("--keep 2 --choice angular", "choice: angular is measured on text; give data"),
        ("--keep 2 --data ROWS", "data: given, but nothing is measured on it"),
        ("--keep 2 --choice angular --data ROWS --tokens 1", "tokens: 1; wanted 2 or more"),
    ],
)
def test_wrong_flags_are_rejected_before_the_parent_is_loaded(folder, flags, message, monkeypatch):
    source = json.dumps([{"path": str(folder / "rows.jsonl")}]).replace(" ", "")
    flags = flags.replace("ROWS", source).split()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        run_main(
            *("train/inherit.py", "--parent", folder / "parent", "--output_dir", folder / "x"),
            *flags,
        )


def test_a_wrong_flag_ends_the_script_with_one_line(folder):
    done = start("python", "train/inherit.py", "--parent", folder / "parent", "--keep", 9)
    assert done.returncode == 2 and "error: output_dir: not given" in done.stdout
