"""Cases of benchmarks/step.py, and their models, tokenizer and rows."""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from random_checkpoint import qwen_config, write_random
from texts import read_docs
from transformers import PreTrainedTokenizerFast

TOKENIZER = Path(__file__).parents[1] / "data/quickstart/student/tokenizer.json"
# Nothing follows the end of an answer: TRL's collator would count it as a target.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {  # Qwen2.5: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "32B": (5120, 27648, 64, 40, 8, 152_064, False),
    "14B": (5120, 13824, 48, 40, 8, 152_064, False),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
    "1.5B": (1536, 8960, 28, 12, 2, 152_064, True),
    "0.5B": (896, 4864, 24, 14, 2, 152_064, True),
    "1.5B/4": (384, 2240, 28, 6, 2, 152_064, True),
    "0.5B/4": (224, 1216, 24, 4, 2, 152_064, True),
    "tiny teacher": (48, 96, 2, 2, 1, 8192, True),
    "tiny": (32, 64, 2, 2, 1, 8192, True),
    "tiny, 128 wide": (128, 256, 2, 2, 1, 8192, False),  # AWQ packs groups of 128
}


@dataclass(frozen=True)
class Case:
    """One training set-up; without a teacher it is plain fine-tuning."""

    name: str
    student: str
    teacher: str | None
    divergence: str = "forward_kl"
    lora_rank: int = 16
    quantization: str = "none"  # quantization of the student
    teacher_format: str = "plain"  # format of the teacher's checkpoint
    packing: bool = False
    checkpointing: bool = False
    rows: int = 4  # rows per optimizer step
    micro: int = 4  # rows per micro-batch
    max_length: int = 256

    @property
    def accumulation(self) -> int:
        return self.rows // self.micro


ON_GPU = {"rows": 16, "micro": 4, "max_length": 2048, "checkpointing": True}
CPU_CASES = [
    Case("distil_lora", "0.5B/4", "1.5B/4"),
    Case("distil_full", "0.5B/4", "1.5B/4", "jensen_shannon", lora_rank=0),
    Case("distil_accumulated", "0.5B/4", "1.5B/4", rows=8, micro=2),
    Case("distil_packed", "0.5B/4", "1.5B/4", packing=True),
    Case("sft_lora", "0.5B/4", None, packing=True),
    Case("sft_full", "0.5B/4", None, lora_rank=0, packing=True),
]
GPU_CASES = [
    Case("distil_0.5b_lora", "0.5B", "1.5B", **ON_GPU),
    Case("distil_1.5b_qlora", "1.5B", "7B", quantization="nf4", **ON_GPU),
    Case("distil_14b_qlora", "14B", "32B", quantization="nf4", teacher_format="awq", **ON_GPU),
    Case("sft_0.5b_lora", "0.5B", None, packing=True, **ON_GPU),
]
TINY = {"rows": 4, "micro": 2, "max_length": 64}
TINY_CASES = [
    Case("tiny_distil", "tiny", "tiny teacher", **TINY),
    Case("tiny_sft", "tiny", None, lora_rank=0, packing=True, **TINY),
    Case(
        *("tiny_qlora", "tiny, 128 wide", "tiny, 128 wide"),
        **{"quantization": "nf4", "teacher_format": "awq", "checkpointing": True} | TINY,
    ),
]


def make_inputs(case: Case, folder: Path, steps: int) -> None:
    """Write student/, teacher/ and rows.jsonl into a folder."""
    tokenizer = make_tokenizer(SHAPES[case.student][5])
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    for role, shape, form in (
        ("student", case.student, case.quantization),
        ("teacher", case.teacher, case.teacher_format),
    ):
        if shape:
            write_random(qwen_config(*SHAPES[shape], dtype), form, folder / role)
            tokenizer.save_pretrained(folder / role)
    count = case.rows * (steps + 1) * (4 if case.packing else 1)
    rows = make_rows(tokenizer, count, case.max_length)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The shipped tokenizer, padded with unused ids up to `vocab_size`."""
    described = json.loads(TOKENIZER.read_text())
    ids = described["model"]["vocab"]
    ids |= {f"unused {i}": i for i in range(len(ids), vocab_size)}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(described, file)
        file.flush()
        return PreTrainedTokenizerFast(
            tokenizer_file=file.name,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=TEMPLATE,
        )


def make_rows(tokenizer: PreTrainedTokenizerFast, count: int, max_length: int) -> list[dict]:
    """Questions about docstrings, half of them with a docstring to read; answers are docstrings.

    Lengths are uniform between an eighth of max_length and max_length.
    """
    draw, rows = random.Random(0), []
    docs = read_docs(60)
    lengths = [len(ids) for ids in tokenizer([doc.text for doc in docs])["input_ids"]]
    while len(rows) < count:
        room = draw.randint(max_length // 8, max_length) - 16  # tokens of the template
        question, answer = "What do you know of it?", []
        for i in draw.sample(range(len(docs)), 40):
            if lengths[i] > room:
                continue
            if not answer and len(rows) % 2 and question[0] == "W":
                question = f"{docs[i].text}\n\n{question}"
            else:
                answer.append(docs[i].text)
            room -= lengths[i] + 1
        messages = [{"role": "user", "content": question}]
        messages.append({"role": "assistant", "content": "\n".join(answer)})
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        if answer and len(ids) <= max_length:
            rows.append({"messages": messages})
    return rows
