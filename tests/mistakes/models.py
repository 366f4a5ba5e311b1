"""Bad models: folders that are absent, damaged or of another kind, and pairs that do not fit."""

import json

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
    Case(
        "tokenizer without its vocabulary",
        "train/sft.py",
        "HERE/model: the tokenizer has 2 tokens and keeps 0% of a plain sentence",
        {"model": "HERE/model"},
        files={
            "model/config.json": json.dumps(
                {
                    "model_type": "qwen2",
                    "vocab_size": 320,
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "intermediate_size": 64,
                }
            ),
            "model/tokenizer_config.json": '{"eos_token": "<|im_end|>"}',
        },
    ),
]
