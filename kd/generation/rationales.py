"""Distilling Step-by-Step: a student learns the label and the rationale, as two tasks.

Hsieh et al. 2023, section 3. The teacher is asked to reason and then to conclude behind a marker.
Of every example the student gets "[label] question" -> the gold answer, and, where the teacher's
conclusion is the gold answer, "[rationale] question" -> the reasoning.
"""

import re

LABEL, RATIONALE = "[label] ", "[rationale] "
NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
TOKEN = re.compile(r"(?<![\w.])-?(?:\d[\d,]*)?\.?\d+|[^\W_]+")
ARTICLES = {"a", "an", "the"}


def split_rationale(answer: str, marker: str) -> tuple[str, str] | None:
    """(reasoning, conclusion) around the last marker; None where one of them is missing."""
    reasoning, found, conclusion = answer.rpartition(marker)
    reasoning, conclusion = reasoning.strip(), conclusion.strip()
    return (reasoning, conclusion) if found and reasoning and conclusion else None


def gold_answer(completion: str, marker: str | None) -> str:
    """What stands behind the last `marker` of a worked answer, or all of it."""
    return (completion.rpartition(marker)[2] if marker else completion).strip()


def same_answer(found: str, gold: str) -> bool:
    """Equal but for case, punctuation, articles and the spelling of numbers: $1,000.0 is 1000."""
    return normal(found) == normal(gold)


def normal(answer: str) -> list[str | float]:
    tokens: list[str | float] = []
    for token in TOKEN.findall(answer.casefold()):
        if NUMBER.fullmatch(token):
            tokens.append(float(token.replace(",", "")))
        elif token not in ARTICLES:
            tokens.append(token)
    return tokens or [answer.strip()]


def task_row(prompt: list[dict], task: str, answer: str) -> dict:
    """The last question with its task in front, and what is to be said to it."""
    *before, question = prompt
    asked = question | {"content": task + question["content"]}
    return {"messages": [*before, asked, {"role": "assistant", "content": answer}]}
