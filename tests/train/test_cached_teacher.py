"""A teacher cache: training from it equals training live; interrupted and wrong caches."""

import json
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import start
from safetensors.torch import load_file
from scripts import run_main
from small import save_small, small_tokenizer

from kd.data.tokenizer import load_tokenizer
from kd.recipe import as_flags
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.cache_files import TeacherCache
from kd.teachers.cached import open_cache

ROWS = 160
WORDS = [
    "list",
    "dictionary",
    "order",
    "name",
    "log",
    "witness",
    "river",
    "mill",
    "machine",
    "rumour",
    "work",
    "cache",
    "key",
]


@pytest.fixture(scope="module")
def work(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    generator = random.Random(0)

    def text(count: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(count))

    def row(i: int) -> dict:
        if i % 2:
            return {"text": text(generator.randint(10, 60))}
        return {"prompt": text(5), "completion": text(generator.randint(10, 40))}

    for name, count in (("rows", ROWS), ("heldout", 5)):
        lines = [json.dumps(row(i)) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flags(models: Path, work: Path, **changes) -> list[str]:
    """Every step has all rows, so that their order does not matter."""
    settings = {
        "student": models / "student",
        "teacher": models / "teacher",
        "teacher_dtype": "float32",
        "data": json.dumps([{"path": str(work / "rows.jsonl")}]),
        "eval_data": json.dumps([{"path": str(work / "heldout.jsonl")}]),
        "soft_weight": 0.7,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "global_batch_size": ROWS,
        "num_train_epochs": 4,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "cache_top_k": 0,
        "cache_dtype": "float32",
        "cache_shard_mb": 1,
        "data_cache": work / "tokenised",
    } | changes
    return as_flags(settings)


@pytest.fixture(scope="module")
def whole_cache(models, work) -> tuple[Path, str]:
    """A cache with every id in float32, scored by two processes that share a sharded teacher."""
    folder = work / "cache"
    arguments = flags(models, work, teacher_cache=folder, output_dir=work / "none")
    done = start("launch/cpu.sh", "train/cache_teacher.py", *arguments)
    assert f"saved to {folder}" in done.stdout, done.stdout[-6000:]
    return folder, done.stdout


def trained(models: Path, work: Path, name: str, *launcher, **changes) -> dict:
    out = work / name
    done = start(*launcher, "train/distill.py", *flags(models, work, output_dir=out, **changes))
    assert (out / "done.json").is_file(), done.stdout[-6000:]
    return {
        "weights": load_file(out / "model.safetensors"),
        "done": json.loads((out / "done.json").read_text()),
        "log": done.stdout,
    }


def test_a_full_cache_trains_the_same_student_as_the_live_teacher(models, work, whole_cache):
    """To 1e-6, every trained tensor: live 1 process x 8 x 20, cached 2 processes x 4 x 20."""
    cpu = {"use_cpu": "true", "max_per_device_train_batch_size": 8}
    live = trained(models, work, "live", "python", **cpu)
    cpu |= {"max_per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    two = ("torchrun", "--nproc-per-node", "2")
    cached = trained(models, work, "cached", *two, teacher_cache=whole_cache[0], **cpu)
    assert "no model" in cached["log"]
    start_weights = load_file(models / "student" / "model.safetensors")
    for name, expected in live["weights"].items():
        moved = (expected - start_weights[name]).norm()
        assert moved > 0
        assert (cached["weights"][name] - expected).norm() / expected.norm() < 1e-6, name
    names = ("divergence", "teacher_cross_entropy", "teacher_label_probability", "top1_agreement")
    for name in (*names, "cross_entropy", "student_entropy", "teacher_entropy"):
        found, expected = (run["done"][f"eval_{name}"] for run in (cached, live))
        assert found == pytest.approx(expected, rel=1e-5), name


def test_the_size_of_a_cache_and_its_error_are_printed(whole_cache):
    printed = whole_cache[1]
    assert "x 320 ids in float32" in printed and "mass of the 320 ids: 100.000%" in printed
    assert "(+0.000%); gradients differ by 0.000% (by norm)" in printed.replace("-0.0", "+0.0")


def all_records(folder: Path) -> dict[bytes, bytes]:
    cache = TeacherCache(str(folder))
    return {
        key: np.asarray(cache.shards[shard][first:last]).tobytes()
        for key, (shard, first, last, _) in cache.places.items()
    }


KILLED = """
import os, runpy, signal, sys
rename = os.rename
def rename_or_die(source, target):
    if str(target).endswith("000-000001.index.npy"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = rename_or_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # a kill from outside would have to hit the milliseconds between two shards


@pytest.mark.slow
def test_an_interrupted_cache_that_two_processes_finish_has_the_same_bits(
    models, work, whole_cache
):
    folder = work / "killed"
    keys = {"teacher_cache": folder, "use_cpu": "true", "max_per_device_train_batch_size": 8}
    arguments = flags(models, work, output_dir=work / "none", **keys)
    killed = start(sys.executable, "-c", KILLED, "train/cache_teacher.py", *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    survived = all_records(folder)
    expected = all_records(whole_cache[0])
    assert 0 < len(survived) < len(expected)

    again = flags(models, work, output_dir=work / "partial", **keys)
    partial = start("python", "train/distill.py", *again)  # names the first missing document
    assert partial.returncode == 2 and "Traceback" not in partial.stdout, partial.stdout
    assert f"of {ROWS} training documents; the first is number" in partial.stdout
    assert "Loading weights" not in partial.stdout

    done = start("launch/cpu.sh", "train/cache_teacher.py", *arguments)
    assert f"saved to {folder}" in done.stdout, done.stdout[-6000:]
    assert f"{len(survived)} scored already" in done.stdout
    assert "removed 2 unfinished files of an interrupted run" in done.stdout
    assert all_records(folder) == expected


def test_a_cache_that_was_made_with_other_settings_is_refused(models, work, whole_cache, tmp_path):
    tokenizer = load_tokenizer(str(models / "student"))
    settings = TeacherSettings(teacher=str(models / "teacher"), teacher_cache=str(whole_cache[0]))
    objective, model = Objective(), ModelSettings()
    open_cache(settings, objective, model, tokenizer)

    def refused(settings=settings, objective=objective, model=model, tokenizer=tokenizer) -> str:
        with pytest.raises(ValueError) as error:
            open_cache(settings, objective, model, tokenizer)
        return str(error.value)

    assert "a different temperature: 1.0" in refused(objective=Objective(temperature=2.0))
    assert "no hidden states" in refused(objective=Objective(hidden_weight=1.0))
    assert "a different vocabulary" in refused(tokenizer=small_tokenizer(330))
    other = save_small(tmp_path / "teacher", hidden=48, seed=2, tie_word_embeddings=False)
    moved = TeacherSettings(teacher=str(other), teacher_cache=str(whole_cache[0]))
    assert "a different teacher" in refused(settings=moved)
    assert "a different template_arguments" in refused(
        model=ModelSettings(template_arguments='{"a": 1}')
    )
    changed = load_tokenizer(str(models / "student"))
    changed.chat_template += " "
    assert "a different chat_template" in refused(tokenizer=changed)
    changed.chat_template = None  # a base model takes the template of the cache
    open_cache(settings, objective, model, changed)
    assert changed.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("teacher", "self", "wanted a model to score with"),
        ("gpu_memory_gb", "0.1", "the teacher does not fit"),
    ],
)
def test_a_teacher_that_cannot_score_is_refused_before_it_is_loaded(
    models, work, tmp_path, flag, value, message, capsys
):
    changes = {"teacher_cache": tmp_path / "cache", "output_dir": tmp_path / "out", flag: value}
    with pytest.raises(ValueError, match=message):
        run_main("train/cache_teacher.py", *flags(models, work, **changes))
    assert "scoring" not in capsys.readouterr().out
