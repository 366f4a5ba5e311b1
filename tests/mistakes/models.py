"""Bad models: folders that are absent, damaged or of another kind, and pairs that do not fit."""

from mistakes.frame import Case

DISTILL = "train/distill.py"
TEACHER_ZERO3 = "ds_configs/teacher_zero3.json"
CASES = [
    Case("other tokenizer", DISTILL, "set align_tokenizers: true", {"teacher": "WORK/other"}),
    Case("teacher's format", DISTILL, "AWQ with {'bits': 8", {"teacher": "WORK/packed"}),
    Case(
        "hidden layer",
        DISTILL,
        "the teacher 0 to 2",
        {"hidden_weight": 1, "hidden_layers": "2:9"},
    ),
    Case(
        "sharded adapter",
        DISTILL,
        "merge it first: python train/merge.py --adapter",
        {"teacher": "WORK/adapter", "teacher_deepspeed": TEACHER_ZERO3},
    ),
]
