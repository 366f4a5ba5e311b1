"""Bad data: files that are absent or unreadable, and rows that cannot be trained on."""

from mistakes.frame import Case

DISTILL = "train/distill.py"
CASES = [
    Case("missing data", DISTILL, "no file no.jsonl", {"data": [{"path": "no.jsonl"}]}),
    Case(
        "row without fields",
        DISTILL,
        "bad.jsonl, line 2: fields",
        {"data": [{"path": "WORK/bad.jsonl"}]},
    ),
]
