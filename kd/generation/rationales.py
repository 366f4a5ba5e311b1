"""Distilling Step-by-Step: train on labels and rationales as two tasks.

Hsieh et al. 2023, section 3. The teacher reasons, then concludes after a marker. Every example
becomes "[label] question" -> gold answer and, if the teacher concludes with the gold answer,
"[rationale] question" -> reasoning.
"""

import re

LABEL, RATIONALE = "[label] ", "[rationale] "
NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
TOKEN = re.compile(r"(?<![\w.])-?(?:\d[\d,]*)?\.?\d+|[^\W_]+")
ARTICLES = {"a", "an", "the"}


def split_rationale(answer: str, marker: str) -> tuple[str, str] | None:
    """Split at the last marker into (reasoning, conclusion); None if either is missing."""
    reasoning, found, conclusion = answer.rpartition(marker)
    reasoning, conclusion = reasoning.strip(), conclusion.strip()
    return (reasoning, conclusion) if found and reasoning and conclusion else None


def gold_answer(completion: str, marker: str | None) -> str:
    """The text after the last marker of a worked solution, or the whole text without a marker."""
    return (completion.rpartition(marker)[2] if marker else completion).strip()


def same_answer(found: str, gold: str) -> bool:
    """Compare up to case, punctuation, articles and number format: $1,000.0 equals 1000."""
    return _normalized(found) == _normalized(gold)


def _normalized(answer: str) -> list[str | float]:
    tokens: list[str | float] = []
    for token in TOKEN.findall(answer.casefold()):
        if NUMBER.fullmatch(token):
            tokens.append(float(token.replace(",", "")))
        elif token not in ARTICLES:
            tokens.append(token)
    return tokens or [answer.strip()]


def task_row(prompt: list[dict], task: str, answer: str) -> dict:
    """A training row whose last user message starts with the task prefix."""
    *before, question = prompt
    prefixed = question | {"content": task + question["content"]}
    return {"messages": [*before, prefixed, {"role": "assistant", "content": answer}]}
