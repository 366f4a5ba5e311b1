"""Bad models: folders that are absent, damaged or of another kind, and pairs that do not fit."""

import json

from mistakes.frame import Case

DISTILL = "train/distill.py"
TEACHER_ZERO3 = "ds_configs/teacher_zero3.json"
CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
PACKED = {"model_type": "qwen2", "quantization_config": {"quant_method": "awq", "bits": 4}}
IN_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
OUT = {"output_dir": "HERE/out"}
HELD_OUT = {"data": [{"path": "WORK/rows.jsonl"}], "out_dir": "HERE/out"}
# A folder whose name has a typo, in every script: (script, flags, the wrong name).
TYPOS = [
    (DISTILL, {"student": "WORK/studnet"}, "studnet"),
    (DISTILL, {"teacher": "WORK/techer"}, "techer"),
    ("train/sft.py", {"model": "WORK/studnet"}, "studnet"),
    ("train/cache_teacher.py", {"teacher": "WORK/techer"}, "techer"),
    ("train/quantize.py", {"model": "WORK/techer"} | OUT, "techer"),
    ("train/inherit.py", {"parent": "WORK/techer", "keep": 1} | OUT, "techer"),
    ("eval/perplexity.py", {"models": "a=WORK/studnet"} | HELD_OUT, "studnet"),
]


def model(config: dict) -> dict:
    """The files of a folder model/ in which only config.json is read."""
    return {"model/config.json": json.dumps(config)}


CASES = [
    Case("no launcher", DISTILL, "without a launcher", {"teacher_deepspeed": TEACHER_ZERO3}),
    Case("other tokenizer", DISTILL, "set align_tokenizers: true", {"teacher": "WORK/other"}),
    Case(
        "no kernels", DISTILL, "there is no GPU; set liger_kernels: auto", {"liger_kernels": True}
    ),
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
    *(
        Case(
            f"typo in {flags_of} of {script}",
            script,
            f"WORK/{name} (there is WORK/",
            flags,
        )
        for script, flags, name in TYPOS
        for flags_of in [next(iter(flags))]
    ),
    Case(
        "code that comes with a model",
        "train/sft.py",
        "HERE/model: its configuration needs code of its own (auto_map), which is never run here",
        {"model": "HERE/model"},
        files=model(CODE),
    ),
    Case(
        "half a config.json",
        "train/sft.py",
        "HERE/model/config.json: cannot be read as JSON",
        {"model": "HERE/model"},
        files={"model/config.json": '{"model_type": "qwen2", "vocab'},
    ),
    Case(
        "AWQ as student",
        "train/sft.py",
        "HERE/model: found awq weights, which cannot be trained",
        {"model": "HERE/model"},
        files=model(PACKED),
    ),
    Case(
        "NF4 without LoRA",
        "train/sft.py",
        "HERE/model: found bitsandbytes 4-bit weights, and without LoRA there is nothing to train",
        {"model": "HERE/model"},
        files=model({"model_type": "qwen2", "quantization_config": IN_NF4}),
    ),
    Case(
        "adapter as student",
        "train/sft.py",
        "It is an adapter: merge it first (python train/merge.py --adapter WORK/adapter",
        {"model": "WORK/adapter"},
    ),
    Case(
        "head with more layers",
        "train/sft.py",
        "modernbert-decoder: the loss computes logits itself",
        {"model": "HERE/model"},
        files=model({"model_type": "modernbert-decoder"}),
    ),
    Case(
        "model without logits",
        "train/sft.py",
        "HERE/model: vit has no causal language model in Transformers",
        {"model": "HERE/model"},
        files=model({"model_type": "vit"}),
    ),
    Case(
        "syntax of a chat template",
        "train/sft.py",
        "HERE/chat.jinja: the chat template has a syntax error in line 2",
        {"chat_template": "HERE/chat.jinja"},
        files={"chat.jinja": "{% for m in messages %}\n{{ m.content }\n{% endfor %}"},
    ),
    Case(
        "group size of NF4",
        "train/quantize.py",
        "group_size: 32, but NF4 has blocks of 64 numbers",
        {"model": "WORK/teacher", "format": "nf4", "group_size": 32} | OUT,
    ),
]
