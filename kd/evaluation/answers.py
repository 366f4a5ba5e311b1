"""Greedy answers of several models to the same held-out prompts: to be read, matched and judged."""

import copy
import re
import string

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def prompts_of(rows: list[dict], count: int) -> list[dict]:
    """The first `count` chat rows as {"prompt": messages before the answer, "reference": answer}.

    Raises ValueError where fewer rows start with a prompt.
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
            f"data: {len(prompts)} chat rows with a prompt, wanted {count}; give a chat source, or "
            "a smaller count"
        )
    return prompts[:count]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    max_new_tokens: int = 64,
    description: str = "model",
) -> list[str]:
    """The most probable continuation, token by token, of each prompt's messages.

    It ends where the model's own generation_config says, so that a model that never stops shows.
    One prompt at a time: no padding can change an answer. Raises ValueError without a template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{description}: {tokenizer.name_or_path} has no chat template; give chat_template: "
            "a file with one"
        )
    config = greedy(model.generation_config, max_new_tokens, tokenizer.pad_token_id)
    answers = []
    for messages in tqdm(prompts, desc=description, unit="answer"):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        ids = model.generate(**inputs, generation_config=config)  # (1, T + new)
        new = ids[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def greedy(own: GenerationConfig, max_new_tokens: int, pad_token_id: int) -> GenerationConfig:
    """The model's settings without sampling."""
    config = copy.deepcopy(own)
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


def normalised(text: str) -> list[str]:
    """Words in small letters without punctuation and articles. SQuAD, Rajpurkar et al. 2016."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def contains(answer: str, reference: str) -> bool:
    """Whether the reference's words stand in the answer, one behind the other."""
    words, wanted = normalised(answer), normalised(reference)
    width = len(wanted)
    return width > 0 and any(words[i : i + width] == wanted for i in range(len(words) - width + 1))


def match_result(rows: list[dict], answers: list[str]) -> dict:
    """Share of answers that have their reference in them, and of those that are nothing else."""
    items = [
        {
            "id": str(i),
            "match": contains(answer, row["reference"]),
            "exact": normalised(answer) == normalised(row["reference"]) != [],
            "reference": row["reference"],
            "answer": answer,
        }
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    shares = {key: sum(item[key] for item in items) / len(items) for key in ("match", "exact")}
    return {"overall": shares | {"n": len(items)}, "items": items}


def for_the_judge(rows: list[dict], answers: dict[str, list[str]]) -> dict[str, list[dict]]:
    """{file: rows} in MT-Bench's format, with which eval/judge.py grades the same answers."""

    def given(texts: list[str]) -> list[dict]:
        return [{"question_id": i, "choices": [{"turns": [t]}]} for i, t in enumerate(texts)]

    asked = ["\n\n".join(message["content"] for message in row["prompt"]) for row in rows]
    return {
        "questions": [
            {"question_id": i, "category": "open", "turns": [text]} for i, text in enumerate(asked)
        ],
        "references": given([row["reference"] for row in rows]),
        **{name: given(texts) for name, texts in answers.items()},
    }
