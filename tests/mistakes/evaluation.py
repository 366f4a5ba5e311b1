"""Bad input of the scripts in eval/."""

from mistakes.frame import DATA, Case

STUDENT = ("--models", "student=WORK/student")
OUT = {"out_dir": "HERE/results"}
HELD_OUT = {"data": DATA} | OUT
CASES = [
    Case(
        "benchmark rows with other fields",
        "eval/benchmarks.py",
        "HERE/rows.jsonl, line 1 has no field label; found passage, question, answer; wanted label",
        {"task_data": {"boolq": "HERE/rows.jsonl"}} | OUT,
        (*STUDENT, "--tasks", "boolq"),
        files={"rows.jsonl": [{"passage": "a", "question": "b", "answer": 1}]},
    ),
    Case(
        "a damaged result of a benchmark",
        "eval/benchmarks.py",
        "HERE/results/benchmarks/boolq/student.json: damaged, not JSON",
        {"task_data": {"boolq": "HERE/rows.jsonl"}} | OUT,
        (*STUDENT, "--tasks", "boolq"),
        files={
            "rows.jsonl": [{"passage": "a", "question": "b", "label": 1}],
            "results/benchmarks/boolq/student.json": "{",
        },
    ),
    Case(
        "a damaged result of a perplexity",
        "eval/perplexity.py",
        "HERE/results/perplexity/student.json: damaged, not JSON",
        HELD_OUT,
        STUDENT,
        files={"results/perplexity/student.json": '{"settings": '},
    ),
    Case(
        "a perplexity on an empty file",
        "eval/perplexity.py",
        "HERE/empty.jsonl: the file is empty; wanted at least one row",
        {"data": [{"path": "HERE/empty.jsonl"}]} | OUT,
        STUDENT,
        files={"empty.jsonl": ""},
    ),
    Case(
        "a perplexity of an empty text",
        "eval/perplexity.py",
        "HERE/rows.jsonl, line 1: text is empty",
        {"data": [{"path": "HERE/rows.jsonl"}]} | OUT,
        STUDENT,
        files={"rows.jsonl": [{"text": ""}]},
    ),
    Case(
        "a perplexity of a folder that does not exist",
        "eval/perplexity.py",
        "student: no folder ./nowhere/student",
        HELD_OUT,
        ("--models", "student=./nowhere/student"),
    ),
    Case(
        "an agreement with a teacher of another tokenizer",
        "eval/agreement.py",
        "different tokenizers",
        {"teacher": "WORK/other"} | HELD_OUT,
        STUDENT,
    ),
    Case(
        "a negative limit",
        "eval/benchmarks.py",
        "limit: -1; wanted",
        {"limit": -1} | OUT,
        (*STUDENT, "--tasks", "boolq"),
    ),
    Case(
        "a report without results",
        "eval/report.py",
        "results: no measurement in HERE/none",
        {},
        ("--results", "HERE/none"),
    ),
    Case(
        "a report of a truncated result",
        "eval/report.py",
        "HERE/results/speed/student.json: damaged, not JSON",
        {},
        ("--results", "HERE/results"),
        files={"results/speed/student.json": '{"settings": {"model"'},
    ),
    Case(
        "a report of another kind of file",
        "eval/report.py",
        "HERE/results/perplexity/student.json: found no result of perplexity (KeyError: 'kind')",
        {},
        ("--results", "HERE/results"),
        files={"results/perplexity/student.json": '{"rows": [{"tokens": 3}]}'},
    ),
    Case(
        "a report of samples without answers",
        "eval/report.py",
        "HERE/samples.jsonl, line 1: wanted the fields prompt and answers",
        {"samples": "HERE/samples.jsonl"},
        ("--results", "HERE/results"),
        files={"samples.jsonl": [{"question": "a"}]},
    ),
    Case(
        "sample answers to more prompts than there are",
        "eval/answers.py",
        "data: 8 chat rows with a prompt; wanted 9",
        {"data": DATA, "count": 9, "out": "HERE/answers.jsonl"},
        STUDENT,
    ),
    Case(
        "speed without a batch",
        "eval/speed.py",
        "batch_sizes",
        OUT,
        (*STUDENT, "--batch_sizes", "0"),
    ),
]
