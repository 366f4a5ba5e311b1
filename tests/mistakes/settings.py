"""Bad settings: unknown and repeated keys, wrong types, values out of range, combinations."""

from mistakes.frame import Case

DISTILL = "train/distill.py"
TEACHER_ZERO3 = "ds_configs/teacher_zero3.json"
CASES = [
    Case(
        "unknown key",
        DISTILL,
        "unknown key learning_rat; did you mean learning_rate",
        {"learning_rat": 1},
    ),
    Case("fine-tuning on-policy", "train/sft.py", "unknown key", {"student_fraction": 0.5}),
    Case(
        "aligned cache",
        DISTILL,
        "align_tokenizers: true with teacher_cache",
        {"align_tokenizers": True, "teacher_cache": "HERE/cache"},
    ),
    Case(
        "aligned hidden states",
        DISTILL,
        "align_tokenizers: true with hidden_weight",
        {"align_tokenizers": True, "hidden_weight": 1},
    ),
    Case(
        "aligned on-policy",
        DISTILL,
        "with align_tokenizers: generated text cannot be aligned in advance",
        {"align_tokenizers": True, "student_fraction": 0.5},
    ),
    Case(
        "aligned to itself",
        DISTILL,
        "align_tokenizers: true with teacher: self",
        {"align_tokenizers": True, "teacher": "self", "lora_rank": 2},
    ),
    Case(
        "micro-batch",
        DISTILL,
        "3 does not divide the 8 rows per process",
        {"per_device_train_batch_size": 3},
    ),
    Case("no launcher", DISTILL, "without a launcher", {"teacher_deepspeed": TEACHER_ZERO3}),
    Case("no adapters", DISTILL, "teacher: self is the student without its", {"teacher": "self"}),
    Case(
        "on-policy, packed",
        DISTILL,
        "a packed row has no room for it; set packing: false",
        {"student_fraction": 0.5, "packing": True},
    ),
    Case(
        "on-policy, cached teacher",
        DISTILL,
        "remove teacher_cache, so that the teacher runs in every step",
        {"student_fraction": 0.5, "teacher_cache": "WORK"},
    ),
    Case("half weights", DISTILL, "set dtype: float32", {"dtype": "bfloat16"}),
]
