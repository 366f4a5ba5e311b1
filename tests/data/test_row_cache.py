"""Tokenised rows on disk: prepared once, by the first process, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import ROOT
from scripts import run_main
from small import CHATML, save_small, small_rows, small_tokenizer

from kd.data import row_cache as cache
from kd.data.encoding import IGNORE_INDEX, encode_rows
from kd.data.files import BadRow
from kd.data.packing import pack
from kd.data.row_cache import RowSettings, fingerprint, is_whole, tokenised_rows
from kd.data.sources import load_rows
from kd.data.tokenised_rows import TokenisedRows

SETTINGS = RowSettings(max_length=48)


@pytest.fixture
def source(tmp_path) -> dict:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(40))))
    return {"path": str(tmp_path / "rows.jsonl")}


def made(source, tmp_path, tokenizer, **changes) -> TokenisedRows:
    settings = replace(SETTINGS, **changes)
    return tokenised_rows([source], settings, tokenizer, str(tmp_path / "cache"), progress=False)


def test_rows_equal_those_of_encode_rows_and_are_prepared_once(
    source, tmp_path, tokenizer, monkeypatch
):
    rows = made(source, tmp_path, tokenizer)
    wanted, report = encode_rows(load_rows([source], 0), tokenizer, 48)
    assert [documents for documents in rows] == [[row] for row in wanted]
    assert rows.report == report and str(report).startswith("rows: 40 read, 40 kept")
    assert rows.lengths == list(map(len, wanted)) and rows.targets == [r.targets for r in wanted]
    assert list(rows.packed(48)) == pack(wanted, 48)
    assert sum(rows.packed(48).targets) == report.targets
    assert rows.subset([3, 3, 0])[1] == rows[3] and rows[-1] == [wanted[-1]]
    monkeypatch.setattr(cache, "prepare", None)
    assert list(made(source, tmp_path, tokenizer)) == list(rows)


def test_the_fingerprint_depends_on_everything_that_determines_the_rows(source, tmp_path):
    def mark(tokenizer=None, source=source, **changes) -> str:
        return fingerprint([source], replace(SETTINGS, **changes), tokenizer or small_tokenizer())

    first, path = mark(), Path(source["path"])
    other_template, other_end = small_tokenizer(), small_tokenizer(eos_token="<|endoftext|>")
    other_template.chat_template += " "
    marks = [
        mark(max_length=47),
        mark(on_long_row="drop"),
        mark(on_bad_row="drop"),
        mark(seed=1),
        mark(train_rows=5),
        mark(control_tokens="keep"),
        mark(source=source | {"count": 5}),
        mark(source=source | {"system": "Be brief."}),
        mark(small_tokenizer(310)),
        mark(other_template),
        mark(other_end),
    ]
    content = path.read_bytes()
    path.write_bytes(content.replace(b"log", b"dog"))
    marks.append(mark())
    assert len({first, *marks}) == len(marks) + 1
    path.write_bytes(content)  # with another modification time
    used = small_tokenizer()
    used(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert mark(used) == first


def test_several_workers_write_the_same_bytes(source, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "ENCODE_BATCH", 3)
    folders = []
    for workers in (1, 3):
        rows = tokenised_rows(
            [source], SETTINGS, tokenizer, str(tmp_path / f"cache{workers}"), workers, False
        )
        folders.append(rows.folder)
    for name in ("ids", "mask", "ends", "report.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_row_that_the_template_rejects_is_reported_by_a_worker_or_dropped(tmp_path, monkeypatch):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}{% endfor %}" + tokenizer.chat_template
    )
    rows = small_rows(60)
    rows[50] = {"messages": [*rows[50]["messages"], {"role": "tool", "content": "x"}]}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "rows.jsonl")}
    monkeypatch.setattr(cache, "ENCODE_BATCH", 4)
    with pytest.raises(
        BadRow, match="rows.jsonl, line 51: the chat template rejects this row: no tools"
    ):
        made(source, tmp_path, tokenizer)
    kept = made(source, tmp_path, tokenizer, on_bad_row="drop")
    assert kept.report.dropped == {"refused by the chat template": 1} and len(kept) == 59


@pytest.mark.parametrize("choice, kept", [("cut", 40), ("cut_left", 40), ("drop", 27)])
def test_long_rows_are_cut_at_either_end_or_dropped_and_counted(source, tmp_path, choice, kept):
    tokenizer = small_tokenizer()
    whole, _ = encode_rows(load_rows([source], 0), tokenizer, 10**6)
    limit = sorted(map(len, whole))[26]
    long = [row for row in whole if len(row) > limit]
    rows = made(source, tmp_path, tokenizer, max_length=limit, on_long_row=choice)
    found = [document for (document,) in rows]
    assert len(found) == kept == rows.report.kept and rows.report.read == 40
    if choice == "drop":
        assert rows.report.dropped == {"longer than max_length": len(long)}
        assert found == [row for row in whole if len(row) <= limit]
        return
    assert rows.report.cut == len(long)
    part = slice(limit) if choice == "cut" else slice(-limit, None)
    assert [row.input_ids.tolist() for row in found] == [
        (row.input_ids[part] if len(row) > limit else row.input_ids).tolist() for row in whole
    ]
    last = [[label for label in row.labels if label != IGNORE_INDEX][-1] for row in found]
    ended = [label for label in last if label == tokenizer.eos_token_id]
    assert (len(ended) == 40) == (choice == "cut_left")  # every row still ends with a target
    lost = sum(row.targets for row in whole) - rows.report.targets
    assert 0 < rows.report.targets_cut <= len(long) and lost >= rows.report.targets_cut


def test_a_truncated_folder_is_prepared_again(source, tmp_path, tokenizer):
    rows = made(source, tmp_path, tokenizer)
    wanted = deepcopy(list(rows))  # documents are views of the files that are truncated here
    for name in ("ids", "ends", "report.json"):
        with open(rows.folder / name, "r+b") as file:
            file.truncate(5)
        assert not is_whole(rows.folder)
        assert list(made(source, tmp_path, tokenizer)) == wanted


PREPARE = """
import sys
from kd.data import row_cache as cache
from kd.data.tokenizer import load_tokenizer
sources, tokenizer, folder = [{"path": sys.argv[1]}], load_tokenizer(sys.argv[2]), sys.argv[3]
rows = cache.tokenised_rows(sources, cache.RowSettings(512), tokenizer, folder, 2, False)
print(len(rows), rows.report.targets)
"""


@pytest.fixture
def big(tmp_path, models) -> list[str]:
    """A command that runs PREPARE on rows that take some seconds."""
    with open(tmp_path / "big.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in small_rows(12_000))
    paths = [tmp_path / "big.jsonl", models / "student", tmp_path / "cache"]
    return [sys.executable, "-c", PREPARE, *map(str, paths)]


def alive(process: psutil.Process) -> bool:
    """A container's first process may not reap an orphan, so a zombie counts as ended."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_kill_leaves_no_partial_cache_and_no_worker_and_others_continue(big, tmp_path):
    """One process prepares, a second one waits. After kill -9 of the first, the second prepares."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "cache"
    first = subprocess.Popen(big, cwd=ROOT, env=env)
    wait_for(lambda: any(f.stat().st_size for f in folder.glob("*.tmp-*/ids")))
    os.kill(first.pid, signal.SIGSTOP)  # so that it does not finish before the second has started
    second = subprocess.Popen(big, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert any("waiting for the process that prepares" in line for line in second.stdout)
    workers = psutil.Process(first.pid).children()
    assert len(workers) == 2
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not [path for path in folder.iterdir() if is_whole(path)]
    wait_for(lambda: not any(map(alive, workers)))
    printed = second.communicate(timeout=400)[0]
    assert second.returncode == 0 and printed.split()[-2] == "12000"
    (whole,) = (path for path in folder.iterdir() if path.is_dir())
    assert is_whole(whole)


def test_show_rows_marks_the_targets(models, tmp_path, capsys):
    rows = [*small_rows(4), {"messages": [{"role": "user", "content": "no answer"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(tmp_path / "rows.jsonl")}
    command = [
        *("train/sft.py", "--model", models / "student", "--use_cpu", "true"),
        *("--data", json.dumps([source]), "--global_batch_size", "4", "--data_cache"),
        *(tmp_path / "cache", "--output_dir", tmp_path / "out", "--show_rows", "3"),
    ]
    run_main(*command, "--on_bad_row", "drop")
    printed = capsys.readouterr().out
    assert "rows: 5 read, 4 kept" in printed and "1 dropped (no answer)" in printed
    answer = rows[0]["messages"][1]["content"]
    assert f"<|im_start|>assistant\n[[{answer}<|im_end|>]]\n" in printed
    assert printed.count("--- row ") == 3 and not (tmp_path / "out").exists()
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 1


def test_show_rows_of_a_distillation_shows_what_both_tokenizers_see(models, tmp_path, capsys):
    other = small_tokenizer(340)
    other.chat_template = CHATML.replace("<|im_start|>", "> ")
    save_small(tmp_path / "other", other)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(3))))
    flags = {
        "student": models / "student",
        "teacher": tmp_path / "other",
        "align_tokenizers": True,
        "use_cpu": True,
        "data": [{"path": str(tmp_path / "rows.jsonl")}],
        "global_batch_size": 4,
        "data_cache": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "show_rows": 1,
    }
    tokens = [text for key, value in flags.items() for text in (f"--{key}", as_text(value))]
    run_main("train/distill.py", *tokens)
    printed = capsys.readouterr().out
    answer = small_rows(1)[0]["messages"][1]["content"]
    ours, theirs = printed.split("the teacher: ")
    assert f"<|im_start|>assistant\n[[{answer}<|im_end|>]]\n" in ours
    assert f"> assistant\n[[{answer}<|im_end|>]]" in theirs
    segments = theirs.split("segments (= where the tokens differ): ")[1].split("; ")
    sides = [segment.strip().split(" = ") for segment in segments]
    for side, tokenizer in ((0, small_tokenizer()), (-1, other)):
        tokens = " ".join(pair[side] for pair in sides).split()
        assert tokens == tokenizer.tokenize(f"{answer}<|im_end|>")
    assert any(len(pair) == 2 for pair in sides) and not (tmp_path / "out").exists()


def as_text(value) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
