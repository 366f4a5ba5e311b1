"""Greedy answers of several models to the same held-out prompts: to read, to match, to judge.

T tokens.
"""

import copy
import json
import re
import string
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kd.data.control_tokens import ControlTokens
from kd.evaluation.models import model_for, tokenizer_for
from kd.evaluation.results import describe, is_measured, write_result, write_text
from kd.evaluation.rows import text_hash
from kd.settings.evaluation import AnswerSettings, HeldoutSettings

MATCH = "the reference's words in the answer, without case, punctuation and articles"


def select_prompts_with_references(rows: list[dict], count: int) -> list[dict]:
    """The first `count` chat rows as {"prompt": messages before the answer, "reference": answer}.

    Raises ValueError if fewer rows start with a prompt.
    """
    prompts = []
    for row in rows:
        messages = row.get("messages", [])
        roles = [message["role"] for message in messages]
        if "assistant" in roles[1:]:
            turn = roles.index("assistant")
            prompts.append({"prompt": messages[:turn], "reference": messages[turn]["content"]})
    if len(prompts) < count:
        raise ValueError(
            f"data: {len(prompts)} chat rows with a prompt; wanted {count}. Give a chat source or "
            "a smaller count"
        )
    return prompts[:count]


def answer_prompts(
    settings: HeldoutSettings, answering: AnswerSettings, name: str, path: str, rows: list[dict]
) -> list[str]:
    """Answer the prompts with one model; with out_dir, also match the references.

    The answers of an existing result file with the same settings are reused.
    """
    tokenizer = tokenizer_for(settings, path)
    prompts = [row["prompt"] for row in rows]
    limit, in_text = answering.max_new_tokens, settings.control_tokens_in_text
    if not answering.out_dir:
        return sample_answers(model_for(settings, path), tokenizer, prompts, limit, name, in_text)
    file = Path(answering.out_dir) / "open_answers" / f"{name}.json"
    rows_hash = text_hash(json.dumps(rows))
    description = describe(settings, path, rows_hash, tokenizer, max_new_tokens=limit, match=MATCH)
    if is_measured(file, description):
        return [item["answer"] for item in json.loads(file.read_text())["items"]]
    texts = sample_answers(model_for(settings, path), tokenizer, prompts, limit, name, in_text)
    result = match_result(rows, texts)
    write_result(file, description, result)
    shares = result["overall"]
    print(
        f"{name}: {shares['match']:.1%} of {shares['n']} answers contain the reference, "
        f"{shares['exact']:.1%} are equal to it\nwrote {file}",
        flush=True,
    )
    return texts


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    max_new_tokens: int = 64,
    description: str = "model",
    control_tokens: str = "split",
) -> list[str]:
    """Answer each prompt by greedy decoding, one prompt at a time, so without padding.

    The model's own generation_config decides where an answer ends, so a model that never stops is
    visible. `control_tokens` is that of `kd.data.encoding.Encoder`. Raises ValueError if the
    tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{description}: {tokenizer.name_or_path} has no chat template; set chat_template to a "
            "file with one"
        )
    tokens = ControlTokens(tokenizer, control_tokens)
    config = greedy_config(model.generation_config, max_new_tokens, tokenizer.pad_token_id)
    answers = []
    for messages in tqdm(prompts, desc=description, unit="answer"):
        prompt = tokens.conversation_ids(messages, add_generation_prompt=True)
        inputs = torch.tensor([prompt], device=model.device)  # (1, T)
        mask = torch.ones_like(inputs)
        ids = model.generate(input_ids=inputs, attention_mask=mask, generation_config=config)
        new = ids[0, len(prompt) :]  # of (1, T + new)
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def greedy_config(
    config: GenerationConfig, max_new_tokens: int, pad_token_id: int
) -> GenerationConfig:
    """A copy of a generation config with greedy decoding."""
    config = copy.deepcopy(config)
    config.update(
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_length=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
    )
    return config


def contains(answer: str, reference: str) -> bool:
    """Whether the answer contains the words of the reference, contiguously and in order."""
    words, expected = _normalized(answer), _normalized(reference)
    n = len(expected)
    return n > 0 and any(words[i : i + n] == expected for i in range(len(words) - n + 1))


def _normalized(text: str) -> list[str]:
    """Lowercase words without punctuation and articles: SQuAD, Rajpurkar et al. 2016."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def match_result(rows: list[dict], answers: list[str]) -> dict:
    """The shares of answers that contain their reference (match) or are equal to it (exact)."""
    items = [
        {
            "id": str(i),
            "match": contains(answer, row["reference"]),
            "exact": _normalized(answer) == _normalized(row["reference"]) != [],
            "reference": row["reference"],
            "answer": answer,
        }
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    shares = {key: sum(item[key] for item in items) / len(items) for key in ("match", "exact")}
    return {"overall": shares | {"n": len(items)}, "items": items}


def write_judge_files(folder: Path, rows: list[dict], answers: dict[str, list[str]]) -> None:
    """Write questions, references and answers in MT-Bench's format, as files for eval/judge.py."""

    def in_choices(texts: list[str]) -> list[dict]:
        return [{"question_id": i, "choices": [{"turns": [t]}]} for i, t in enumerate(texts)]

    prompts = ["\n\n".join(message["content"] for message in row["prompt"]) for row in rows]
    files = {
        "questions": [
            {"question_id": i, "category": "open", "turns": [text]}
            for i, text in enumerate(prompts)
        ],
        "references": in_choices([row["reference"] for row in rows]),
        **{name: in_choices(texts) for name, texts in answers.items()},
    }
    for name, lines in files.items():
        write_jsonl(folder / f"{name}.jsonl", lines)


def write_jsonl(file: Path, rows: list[dict]) -> None:
    """Write rows as JSON lines, atomically."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
