"""Pretrain the two small models of the quickstart, teacher and student, on docstrings.

python data/quickstart/docstrings.py --out_dir runs/quickstart/data
python data/quickstart/pretrain.py --data_dir runs/quickstart/data --out_dir data/quickstart

First a byte-level BPE tokenizer, then two Llama models from random weights. The teacher is trained
on text and chat. The student is trained on less text and no chat, so that it is a base model with
something to learn. They are not of type qwen2, for which Transformers 5 ignores the pre-tokenizer
of tokenizer.json and cuts text as Qwen does.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE, BLOCK = 4096, 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {
    "teacher": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6},
    "student": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[name],
    )
    return LlamaForCausalLM(config)


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Texts, each followed by <|endoftext|>, as rows of BLOCK ids: (rows, BLOCK)."""
    ids = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [*encoded[:1024], tokenizer.pad_token_id]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor, steps: int, batch: int, lr: float):
    """Train with AdamW and cosine decay after a short warm-up. Every token is a target."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / 50, 0.05 + 0.475 * (1 + math.cos(math.pi * s / steps))),
    )
    order = torch.cat([torch.randperm(len(rows)) for _ in range(steps * batch // len(rows) + 1)])
    start = time.time()
    for step in range(steps):
        ids = rows[order[step * batch : (step + 1) * batch]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            rate = (step + 1) * batch * BLOCK / (time.time() - start)
            print(f"step {step}/{steps} loss {loss.item():.3f} {rate:.0f} tokens/s", flush=True)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    losses = [model(input_ids=part, labels=part).loss for part in rows.split(16)]
    return torch.stack(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--only", choices=list(SHAPES))
    parser.add_argument("--teacher_steps", type=int, default=2400)
    parser.add_argument("--student_steps", type=int, default=250)
    args = parser.parse_args()

    text = [row["text"] for row in read(args.data_dir / "text_train.jsonl")]
    chat = [row["messages"] for row in read(args.data_dir / "chat_train.jsonl")]
    heldout = [row["text"] for row in read(args.data_dir / "text_heldout.jsonl")]
    tokenizer = train_tokenizer(text)
    chat = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in chat]
    heldout_rows = blocks(heldout, tokenizer)[:512]
    jobs = {
        "teacher": (text + chat, args.teacher_steps, 1.5e-3),
        "student": (text, args.student_steps, 2e-3),
    }
    for name in [args.only] if args.only else jobs:
        texts, steps, lr = jobs[name]
        rows = blocks(texts, tokenizer)
        model = new_model(name, tokenizer)
        print(f"{name}: {model.num_parameters():,} parameters, {rows.numel():,} tokens", flush=True)
        pretrain(model, rows, steps, batch=32, lr=lr)
        print(f"{name}: held-out perplexity {perplexity(model, heldout_rows):.1f}")
        model.to(torch.bfloat16).save_pretrained(args.out_dir / name)
        tokenizer.save_pretrained(args.out_dir / name)


if __name__ == "__main__":
    main()
