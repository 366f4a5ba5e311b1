"""eval/benchmarks.py equals lm-evaluation-harness's own command line on the same local files."""

import json

import pytest
from held_out import inside, write_jsonl
from processes import start, succeed
from scripts import run_main

from kd.evaluation.harness import find_tasks, write_task_files
from kd.evaluation.task_rows import check_rows

BOOLQ = [
    {"passage": f"{name} is {what}.", "question": f"is {name} {asked}", "label": int(what == asked)}
    for name, what, asked in [
        ("a list", "long", "long"),
        ("a map", "short", "long"),
        ("a tree of names", "tall", "tall"),
        ("the mill", "still", "old"),
        ("a river", "low", "low"),
    ]
]
WINOGRANDE = [
    {
        "sentence": f"The {a} met the {b} because the _ was {c}.",
        "option1": a,
        "option2": b,
        "answer": str(1 + i % 2),
    }
    for i, (a, b, c) in enumerate(
        [("cat", "dog", "late"), ("list", "map", "old"), ("king", "poet", "kind")]
    )
]
SCIQ = [
    {
        "support": "Water boils when it is hot." if i % 2 else "",
        "question": f"What boils{'?' * i}",
        "distractor1": "stone",
        "distractor2": "a long iron bar",
        "distractor3": "sand",
        "correct_answer": "water",
    }
    for i in range(4)
]
GSM8K = [
    {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
    for i in range(1, 10)
]
TASKS = {"boolq": BOOLQ, "winogrande": WINOGRANDE, "sciq": SCIQ}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(task_data, folder)."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, rows in TASKS.items():
        write_jsonl(folder / f"{task}.jsonl", rows)
    write_jsonl(folder / "train.jsonl", GSM8K[3:])
    write_jsonl(folder / "gsm8k.jsonl", GSM8K[:3])
    data = {task: str(folder / f"{task}.jsonl") for task in TASKS}
    gsm8k = {"train": str(folder / "train.jsonl"), "test": str(folder / "gsm8k.jsonl")}
    return data | {"gsm8k": gsm8k}, folder


def arguments(house, files, out, *names):
    return [
        *("--models", *(f"{name}={house / name}" for name in names)),
        *("--tasks", *files[0], "--task_data", json.dumps(files[0])),
        *("--batch_size", "3", "--out_dir", out),
    ]


@pytest.fixture(scope="module")
def measured(house, files):
    out = files[1] / "results"
    inside("benchmarks.py", *arguments(house, files, out, "student", "adapter"))
    return out


def read(out, task, name):
    return json.loads((out / "benchmarks" / task / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["student", pytest.param("adapter", marks=pytest.mark.slow)])
def test_metrics_equal_those_of_the_harness_command_line(house, files, measured, name, tmp_path):
    peft = f",peft={house / name}" if name == "adapter" else ""
    succeed(
        *("lm_eval", "--model", "hf", "--tasks", ",".join(files[0])),
        *("--model_args", f"pretrained={house / 'student'}{peft},dtype=float32"),
        *("--include_path", measured / "benchmarks" / "task_files", "--device", "cpu"),
        *("--batch_size", "3", "--output_path", tmp_path),
    )
    (file,) = tmp_path.rglob("results_*.json")
    wanted = json.loads(file.read_text())["results"]
    for task in files[0]:
        found = read(measured, task, name)["tasks"][task]["metrics"]
        numbers = {k: v for k, v in wanted[task].items() if isinstance(v, int | float)}
        assert found == numbers and len(found) >= 2


def test_metrics_are_the_means_of_the_item_scores(files, measured):
    for task, rows in (TASKS | {"gsm8k": GSM8K[:3]}).items():
        found = read(measured, task, "student")["tasks"][task]
        assert len(set(found["items"]["hashes"])) == len(rows)
        for metric, values in found["items"]["values"].items():
            assert len(values) == len(rows)
            assert found["metrics"][metric] == pytest.approx(sum(values) / len(rows))
    chances = [read(measured, t, "student")["tasks"][t]["chance"] for t in files[0]]
    assert chances == [0.5, 0.5, 0.25, None]


def test_an_adapter_is_not_measured_as_its_base(measured):
    base, adapter = (
        read(measured, "sciq", name)["tasks"]["sciq"] for name in ("student", "adapter")
    )
    assert base["items"]["hashes"] == adapter["items"]["hashes"]
    both = [
        read(measured, t, n)["tasks"][t]["items"]["values"]
        for t in TASKS
        for n in ("student", "adapter")
    ]
    assert both[::2] != both[1::2]


def test_two_processes_write_what_one_writes_and_a_rerun_measures_nothing(house, files, measured):
    out = files[1] / "two"
    job = start("launch/cpu.sh", "eval/benchmarks.py", *arguments(house, files, out, "student"))
    for task in files[0]:
        one, two = read(measured, task, "student"), read(out, task, "student")
        assert (one["settings"].pop("processes"), two["settings"].pop("processes")) == (1, 2)
        assert one["settings"] == two["settings"], job.stdout[-3000:]
        if task == "gsm8k":  # every process draws its own few-shot examples
            one, two = (r["tasks"][task]["items"]["hashes"] for r in (one, two))
        assert one == two
    again = inside("benchmarks.py", *arguments(house, files, measured, "student"))
    assert again.stdout.count("measured already") == len(files[0])
    assert "Loading weights" not in again.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "boolq", "--task_data", '{"boolq": "no.jsonl"}'], "boolq: no file no.jsonl"),
        (["--tasks", "boolq", "--task_data", "{"], "task_data: found {, which is not JSON"),
        ([], "tasks: none given"),
    ],
)
def test_wrong_settings_are_named_in_the_error(house, flags, message):
    with pytest.raises(ValueError, match=message):
        inside("benchmarks.py", "--models", f"student={house / 'student'}", *flags)


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """(a file for the rows of each task, tasks that read them, folder of the task files)."""
    folder = tmp_path_factory.mktemp("task_files")
    files = {task: {"test": str(folder / f"{task}.jsonl")} for task in [*TASKS, "gsm8k"]}
    write_task_files(files, folder)
    return files, find_tasks(list(files), files, folder), folder


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "boolq",  # without a label lm_eval takes the word "label" for the answer
            [{"passage": "a", "question": "b", "answer": 1}],
            "line 1 has no field label; found passage, question, answer; wanted label, passage, q",
        ),
        ("boolq", [*BOOLQ, {"passage": "a"}], "line 6 has no field label, question; found passage"),
        ("winogrande", [{"question": "a"}], "cannot read rows with the fields question .*'answer'"),
        ("boolq", [BOOLQ[0], BOOLQ[1] | {"label": 2}], "row 2: the answer is 2; wanted one of"),
        ("gsm8k", "{", "line 1: only '{' on the line"),
        ("gsm8k", "", "the file is empty; wanted at least one row"),
    ],
)
def test_rows_that_do_not_fit_their_task_are_refused(task_files, task, rows, message):
    files, tasks, folder = task_files
    file = folder / f"{task}.jsonl"
    file.write_text(rows) if isinstance(rows, str) else write_jsonl(file, rows)
    with pytest.raises(ValueError, match=message) as error:
        check_rows(task, files[task], tasks, folder)
    assert str(error.value).startswith(f"task_data: {task}: ") and "\n" not in str(error.value)


def test_an_unknown_task_is_named_before_a_model_is_loaded(house, capsys):
    models = ("--models", f"student={house / 'student'}")
    with pytest.raises(ValueError, match="has no bolq"):
        run_main("eval/benchmarks.py", *models, "--tasks", "bolq")
    assert "Loading weights" not in capsys.readouterr().err
