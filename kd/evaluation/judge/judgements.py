"""Plan the judgements: which answers the judge sees, in which order and with which prompt.

The key of a judgement hashes the model, the question, the order and the complete request, so a
changed answer or prompt is judged again.
"""

import random
from dataclasses import dataclass

from kd.evaluation.judge.judge_prompts import read_prompts
from kd.evaluation.judge.questions import Question
from kd.generation.records import digest
from kd.settings.judge import JudgeSettings

TOP_LOGPROBS = 5  # tokens requested for a one-token verdict, as in AlpacaEval 2.0
Answers = dict[str, list[str]]  # {question id: one answer per turn}


@dataclass(frozen=True)
class Judgement:
    """One request to the judge."""

    model: str
    question: Question
    turn: int  # from 1
    order: int | None  # 0: the model's answer is shown first; 1: second; None: alone
    request: dict
    key: str


@dataclass(frozen=True)
class Judge:
    """How the judge is asked; every field affects the verdicts."""

    model: str
    mode: str  # score or pair
    verdict: str  # of a pair: token or text
    orders: str  # of a pair: both or seeded
    max_new_tokens: int
    prompts: dict[str, dict[str, str]]

    def request(self, name: str, fields: dict[str, str]) -> dict:
        """Fill the prompt `name` and return the arguments of a chat completion."""
        prompt = self.prompts[name]
        messages = [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**fields)},
        ]
        request = {"model": self.model, "messages": messages, "temperature": 0.0}
        if name.startswith("token"):
            return request | {"max_new_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return request | {"max_new_tokens": self.max_new_tokens}


def make_judge(settings: JudgeSettings, questions: list[Question]) -> Judge:
    """The judge of the settings. Raises ValueError if its verdict does not fit the questions."""
    several = sum(len(question.turns) > 1 for question in questions)
    if settings.mode == "pair" and settings.verdict == "token" and several:
        raise ValueError(
            f"verdict: token, but {several} questions have several turns; wanted questions of one "
            "turn (AlpacaEval). Set verdict: text"
        )
    return Judge(
        settings.judge,
        settings.mode,
        settings.verdict,
        settings.orders,
        settings.judge_max_new_tokens,
        read_prompts(settings.judge_prompts),
    )


def plan_judgements(
    judge: Judge,
    questions: list[Question],
    answers: dict[str, Answers],
    references: Answers,
    baseline: str | None,
) -> dict[str, list[Judgement]]:
    """{model: judgements} of every turn of every question.

    In pair mode the baseline is not judged itself, and a pair is judged in both orders or in one
    order derived from the question.
    """
    baseline = baseline if judge.mode == "pair" else None
    return {
        name: [
            judgement
            for question in questions
            for turn in range(1, len(question.turns) + 1)
            for judgement in _judgements(
                judge, name, question, turn, answers, references.get(question.id), baseline
            )
        ]
        for name in answers
        if name != baseline
    }


def _judgements(
    judge: Judge,
    model: str,
    question: Question,
    turn: int,
    answers: dict[str, Answers],
    reference: list[str] | None,
    baseline: str | None,
) -> list[Judgement]:
    if baseline is None:
        shown = {None: {"": answers[model][question.id]}}
    else:
        pair = (answers[model][question.id], answers[baseline][question.id])
        orders = (0, 1)
        if judge.orders == "seeded":
            orders = (random.Random(question.id + question.turns[0]).randint(0, 1),)
        shown = {order: {"_a": pair[order], "_b": pair[1 - order]} for order in orders}
    judgements = []
    for order, by_suffix in shown.items():
        fields = prompt_fields(question, turn, reference, by_suffix)
        request = judge.request(prompt_name(judge, turn, reference), fields)
        key = digest([model, baseline, question.id, turn, order, request])
        judgements.append(Judgement(model, question, turn, order, request, key))
    return judgements


def prompt_name(judge: Judge, turn: int, reference: list[str] | None) -> str:
    """FastChat's name of the prompt for a turn, with or without a reference."""
    if judge.mode == "pair" and judge.verdict == "token":
        return "token-v1"
    kind = "single" if judge.mode == "score" else "pair"
    middle = "math-v1" if reference else "v2" if kind == "pair" else "v1"
    return f"{kind}-{middle}" + ("-multi-turn" if turn > 1 else "")


def prompt_fields(
    question: Question, turn: int, reference: list[str] | None, answers: dict[str, list[str]]
) -> dict[str, str]:
    """The fields of the prompt templates, under FastChat's names.

    `answers` maps a suffix of the field `answer` ("", "_a" or "_b") to the answers of one model.
    """
    fields = {"question": question.turns[turn - 1]}
    for i in range(turn):
        fields[f"question_{i + 1}"] = question.turns[i]
        if reference:
            fields[f"ref_answer_{i + 1}"] = reference[i]
        for suffix, turns in answers.items():
            fields[f"answer{suffix}_{i + 1}"] = turns[i]
    return fields | {f"answer{suffix}": turns[turn - 1] for suffix, turns in answers.items()}
