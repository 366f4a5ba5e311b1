"""A teacher with another tokenizer: its loss next to TRL's GOLD, and its effect on a student.

PYTHONPATH=TRL python benchmarks/other_tokenizer.py --json runs/other_tokenizer.json

TRL is the folder of its package (pip install --no-deps --target TRL trl==1.16.0); without it the
first part is skipped. The first part uses the quickstart's two models, which share a tokenizer, so
every token maps. GOLD's "bayesian" merge then equals our divergence row by row, except that it
clamps probabilities at 1e-8. Its default, "observed", reads the logits one position late.

In the second part, students learn from the quickstart's text with or without the teacher's
distributions, on the same rows. One has its own tokenizer with half as many ids (--start writes it,
with random weights). The other has the teacher's tokenizer and needs no alignment; the difference
is the cost of the other tokenizer. Bits per byte of held-out text are comparable across tokenizers.
Finished students stay in --out_dir; run the command again to continue.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kd.data.alignment import AlignedCollator, AlignedEncoder
from kd.data.encoding import IGNORE_INDEX, EncodedRow, Encoder, encode_rows
from kd.data.packing import Collator
from kd.data.tokenizer import load_tokenizer
from kd.data.vocabularies import shared_vocabulary
from kd.models.heads import LossInputs, return_loss
from kd.recipe import as_flags, parse, setting
from kd.run.run_record import commit
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.aligned_teacher import AlignedTeacher
from kd.teachers.live import LiveTeacher

TEACHER, STUDENT = "data/quickstart/teacher", "data/quickstart/student"
DATA = "runs/quickstart/data"
BETA = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
WAYS = {"text alone": 0.0, "text and teacher": 0.5, "teacher alone": 1.0}  # soft_weight


@dataclass
class OtherTokenizerBenchmark:
    start: str | None = setting(
        None, "Only write the student with its own tokenizer into this folder."
    )
    rows: int = setting(8, "Held-out rows of the comparison with TRL.")
    steps: int = setting(300, "Steps of 16 rows of 256 tokens per method; 0 trains no students.")
    ways: list[str] = setting(list(WAYS), "Methods to train students with.")
    heldout: int = setting(200, "Number of held-out texts, and of conversations.")
    vocabulary: int = setting(2048, "Vocabulary size of the student; the teacher has 4 096.")
    out_dir: str = setting("runs/other_tokenizer", "Folder of the students.")
    json: str | None = setting(None, "Output file.")


def main() -> None:
    (settings,) = parse(OtherTokenizerBenchmark, description=__doc__)
    torch.set_num_threads(1)
    if settings.start:
        make_student(Path(settings.start), own_tokenizer(settings.vocabulary))
        return
    report = {
        **({"beside_trl": beside_trl(settings.rows)} if importlib.util.find_spec("trl") else {}),
        **({"students": students(settings)} if settings.steps else {}),
        "settings": {k: v for k, v in vars(settings).items() if k not in ("json", "start")},
        "command": " ".join(["python", *sys.argv]),
        "device": "cpu",
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(json.dumps(report, indent=1))
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")


def read(name: str, count: int | None = None) -> list[dict]:
    with open(f"{DATA}/{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def own_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the quickstart's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|turn|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in read("text_train", 4000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}",
    )


def make_student(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a small model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(  # a qwen2 model would not read this tokenizer
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def beside_trl(count: int) -> list[dict]:
    """For each divergence: TRL's mean loss per row with both merges, ours, and the difference."""
    tokenizer = load_tokenizer(TEACHER)
    encoder = AlignedEncoder(
        Encoder(tokenizer, 256), Encoder(tokenizer, 256), shared_vocabulary(tokenizer, tokenizer)
    )
    rows = encoder([("", row) for row in read("chat_heldout", count)])
    found = []
    for divergence, beta in BETA.items():
        trl = {way: gold_losses(rows, tokenizer, beta, way) for way in ("bayesian", "observed")}
        ours = our_losses(rows, tokenizer, divergence)
        apart = [abs(a - b) / b for a, b in zip(trl["bayesian"], ours, strict=True)]
        found.append(
            {
                "divergence": divergence,
                "trl_bayesian": sum(trl["bayesian"]) / len(rows),
                "trl_observed": sum(trl["observed"]) / len(rows),
                "ours": sum(ours) / len(rows),
                "relative_difference_to_bayesian_at_most": max(apart),
            }
        )
    return found


def whole_logits(name: str, row: EncodedRow, vocab_size: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(row.input_ids)[None]).logits[..., :vocab_size]


def gold_losses(rows: list[EncodedRow], tokenizer, beta: float, merge: str) -> list[float]:
    """TRL's loss of each row."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=None,  # weight by the share of the vocabulary that maps: 1 here
        uld_hybrid_unmatched_weight=None,
        beta=beta,
    )
    loss, found = ULDLoss(config, tokenizer, tokenizer), []
    for row in rows:
        labels, ids = (torch.tensor(x)[None] for x in (row.labels, row.input_ids))
        ends = torch.arange(1, len(row) + 1)
        # One byte per token: only the boundaries count.
        offsets = torch.stack([ends - 1, ends], -1)[None]
        logits = [whole_logits(name, row, len(tokenizer)) for name in (STUDENT, TEACHER)]
        found.append(loss(*logits, labels, labels, ids, ids, offsets, offsets).item())
    return found


def our_losses(rows: list[EncodedRow], tokenizer, divergence: str) -> list[float]:
    student = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    return_loss(student)
    settings = TeacherSettings(teacher=TEACHER, teacher_dtype="float32")
    live = LiveTeacher(settings, ModelSettings(), torch.device("cpu"))
    teacher = AlignedTeacher(live, shared_vocabulary(tokenizer, tokenizer))
    collate, found = AlignedCollator(Collator(0), 0), []
    batches = [collate([[row]]) for row in rows]
    for context, batch, row in zip(teacher.outputs(batches), batches, rows, strict=True):
        with context as (outputs, _), torch.no_grad():
            objective = Objective(1.0, divergence)
            inputs = LossInputs(batch["labels"], objective, len(tokenizer), outputs)
            out = student(batch["input_ids"], batch["position_ids"], inputs)
        found.append(out["loss"].item() / row.targets)
    return found


def students(settings: OtherTokenizerBenchmark) -> list[dict]:
    """Bits per byte of held-out texts and conversations after training with each method."""
    tokenizers = {
        "its own": own_tokenizer(settings.vocabulary),
        "the teacher's": load_tokenizer(TEACHER),
    }
    found = []
    for (whose, tokenizer), way in product(tokenizers.items(), settings.ways):
        parent, weight = Path(settings.out_dir) / whose.replace(" ", "_"), WAYS[way]
        folder, aligned = parent / way.replace(" ", "_"), whose == "its own"
        if not (parent / "start" / "config.json").exists():
            make_student(parent / "start", tokenizer)
        printed = train(parent / "start", folder, weight, aligned, settings.steps)
        (folder / "printed.txt").write_text(printed) if printed else None
        told = (folder / "printed.txt").read_text().splitlines()
        found.append(
            {"tokenizer": whose, "way": way, "soft_weight": weight}
            | {part: bits_per_byte(folder, part, settings.heldout) for part in ("text", "chat")}
            | {"alignment": next((x for x in told if x.startswith("alignment:")), None)}
        )
    return found


def train(start: Path, folder: Path, weight: float, aligned: bool, steps: int) -> str:
    """Train by the real command line and return its output; "" if it was finished."""
    if (folder / "done.json").exists():
        return ""
    sources = [
        {"path": f"{DATA}/text_train.jsonl", "count": 6000},
        {"path": f"{DATA}/chat_train.jsonl", "count": 2000},
    ]
    script = ["train/sft.py", "--model", start]
    if weight:
        script = ["train/distill.py", "--student", start, "--teacher", TEACHER]
        script += ["--align_tokenizers", aligned, "--soft_weight", weight]
    flags = {
        "data": json.dumps(sources),
        "max_length": 256,
        "packing": True,
        "global_batch_size": 16,
        "max_per_device_train_batch_size": 16,
        "max_steps": steps,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": folder,
    }
    command = [sys.executable, *map(str, script), *as_flags(flags)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


@torch.no_grad()
def bits_per_byte(folder: Path, part: str, count: int) -> float:
    """Bits per byte of the targets: whole texts, answers of conversations."""
    tokenizer = load_tokenizer(str(folder))
    rows, _ = encode_rows(read(f"{part}_heldout", count), tokenizer, 512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, size = 0.0, 0
    for row in rows:
        logits = model(torch.tensor(row.input_ids)[None]).logits[0, :-1, : len(tokenizer)]
        labels = torch.tensor(row.labels[1:])
        nats += torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
        ).item()
        size += len(
            tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True).encode()
        )
    return nats / size / torch.log(torch.tensor(2.0)).item()


if __name__ == "__main__":
    main()
