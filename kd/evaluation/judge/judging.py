"""What a judge is to be asked, which of it was answered, and what the verdicts come to.

judgements.jsonl is append-only; a judgement is known by its key: who is judged on what, in which
order, and the whole request. Numbers are a pure function of that file.
"""

import random
import statistics
from dataclasses import dataclass

from kd.evaluation.judge.length_control import FOLDS, length_controlled_win_rate
from kd.evaluation.judge.questions import Question
from kd.evaluation.judge.verdicts import grade, preference_of_text, preference_of_token
from kd.generation.sampling import digest

TOP = 5  # most probable tokens that a judge of one token is asked for: what OpenAI's API gives


@dataclass(frozen=True)
class Judgement:
    """One request to the judge."""

    model: str
    question: Question
    turn: int  # from 1
    order: int | None  # 0: the model's answer is shown first, 1: second; None: it stands alone
    request: dict
    key: str


@dataclass(frozen=True)
class Judge:
    """How judgements are asked for; all of it decides the verdicts."""

    model: str
    mode: str  # score, pair
    verdict: str  # token, text: of a pair
    orders: str  # both, seeded: of a pair
    max_new_tokens: int
    prompts: dict[str, dict[str, str]]

    def request(self, name: str, fields: dict[str, str]) -> dict:
        prompt = self.prompts[name]
        messages = [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**fields)},
        ]
        request = {"model": self.model, "messages": messages, "temperature": 0.0}
        if name.startswith("token"):
            return request | {"max_new_tokens": 1, "logprobs": True, "top_logprobs": TOP}
        return request | {"max_new_tokens": self.max_new_tokens}


def wanted_judgements(
    judge: Judge,
    model: str,
    questions: list[Question],
    answers: dict[str, list[str]],
    references: dict[str, list[str]],
    baseline: str | None = None,
    baseline_answers: dict[str, list[str]] | None = None,
) -> list[Judgement]:
    """Every turn of every question; of a pair in both orders, or in one drawn by the question."""
    wanted = []
    for question in questions:
        reference = references.get(question.id)
        for turn in range(1, len(question.turns) + 1):
            name = prompt_name(judge, turn, reference)
            if baseline_answers is None:
                shown = {None: {"": answers[question.id]}}
            else:
                pair = (answers[question.id], baseline_answers[question.id])
                orders = (0, 1)
                if judge.orders == "seeded":
                    orders = (random.Random(question.id + question.turns[0]).randint(0, 1),)
                shown = {o: {"_a": pair[o], "_b": pair[1 - o]} for o in orders}
            for order, said in shown.items():
                request = judge.request(name, fields(question, turn, reference, said))
                key = digest([model, baseline, question.id, turn, order, request])
                wanted.append(Judgement(model, question, turn, order, request, key))
    return wanted


def prompt_name(judge: Judge, turn: int, reference: list[str] | None) -> str:
    if judge.mode == "pair" and judge.verdict == "token":
        return "token-v1"
    kind = "single" if judge.mode == "score" else "pair"
    middle = "math-v1" if reference else "v2" if kind == "pair" else "v1"
    return f"{kind}-{middle}" + ("-multi-turn" if turn > 1 else "")


def fields(
    question: Question, turn: int, reference: list[str] | None, said: dict[str, list[str]]
) -> dict[str, str]:
    """What the templates name, with FastChat's names."""
    found = {"question": question.turns[turn - 1]}
    for i in range(turn):
        found[f"question_{i + 1}"] = question.turns[i]
        if reference:
            found[f"ref_answer_{i + 1}"] = reference[i]
        for who, answers in said.items():
            found[f"answer{who}_{i + 1}"] = answers[i]
    return found | {f"answer{who}": answers[turn - 1] for who, answers in said.items()}


def score_result(wanted: list[Judgement], rows: dict[str, dict]) -> dict:
    """Mean grade by turn, by category and turn, and every item's; without a grade: counted."""
    items = [
        {
            "question_id": j.question.id,
            "category": j.question.category,
            "turn": j.turn,
            "score": grade(rows[j.key]["text"]),
        }
        for j in wanted
    ]
    categories = dict.fromkeys(item["category"] for item in items)
    return {
        "overall": means(items, "score"),
        "turns": by(items, "turn", "score"),
        "categories": {
            name: means(part, "score") | {"turns": by(part, "turn", "score")}
            for name in categories
            if (part := [item for item in items if item["category"] == name])
        },
        "items": items,
    }


def pair_result(
    judge: Judge,
    wanted: list[Judgement],
    rows: dict[str, dict],
    answers: dict[str, list[str]],
    baseline_answers: dict[str, list[str]],
    difficulties: dict[str, float] | None = None,
) -> dict:
    """Win rates over the baseline, in all and by subset; a pair's orders are averaged."""
    pairs: dict[tuple[str, int], list[tuple[Judgement, float | None, str]]] = {}
    for judgement in wanted:
        found, source = preference(judge, judgement, rows[judgement.key])
        pairs.setdefault((judgement.question.id, judgement.turn), []).append(
            (judgement, found, source)
        )
    items, sources = [], []
    for (id_, turn), found in pairs.items():
        values = [value for _, value, _ in found]
        sources += [source for _, value, source in found if value is not None]
        whole = None not in values
        items.append(
            {
                "question_id": id_,
                "category": found[0][0].question.category,
                "turn": turn,
                "preference": statistics.fmean(values) if whole else None,
                "orders": {str(j.order): value for j, value, _ in found},
                "length": len(answers[id_][turn - 1]),
                "baseline_length": len(baseline_answers[id_][turn - 1]),
            }
        )
    return {
        "overall": means(items, "preference"),
        "length_controlled_win_rate": length_control(items, difficulties),
        "turns": by(items, "turn", "preference"),
        "categories": by(items, "category", "preference"),
        "ties": sum(item["preference"] == 0.5 for item in items),
        "consistency": consistency(items),
        "read_from": {name: sources.count(name) for name in sorted(set(sources))},
        "items": items,
    }


def preference(judge: Judge, judgement: Judgement, row: dict) -> tuple[float | None, str]:
    """(probability that the model's answer is the better one, what it was read from)."""
    if judge.verdict == "token":
        second, source = preference_of_token(row["text"], row["top_log_probabilities"])
    else:
        second, source = preference_of_text(row["text"]), "text"
    if second is None:
        return None, source
    return (second if judgement.order == 1 else 1.0 - second), source


def means(items: list[dict], key: str) -> dict[str, float | int | None]:
    """Mean over the items that have a value, its standard error, and how many have none."""
    values = [item[key] for item in items if item[key] is not None]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values) if values else None,
        "standard_error": error,
        "n": len(values),
        "without_verdict": len(items) - len(values),
    }


def by(items: list[dict], group: str, key: str) -> dict[str, dict]:
    names = dict.fromkeys(item[group] for item in items)
    return {str(n): means([item for item in items if item[group] == n], key) for n in names}


def consistency(items: list[dict]) -> float | None:
    """Of the pairs that were judged in both orders, the share with one winner, or two ties."""
    both = [list(item["orders"].values()) for item in items if len(item["orders"]) == 2]
    both = [pair for pair in both if None not in pair]
    side = lambda value: (value > 0.5) - (value < 0.5)  # noqa: E731
    return statistics.fmean(side(a) == side(b) for a, b in both) if both else None


def length_control(items: list[dict], difficulties: dict[str, float] | None) -> float | None:
    """None where there are too few judgements for its folds."""
    judged = [item for item in items if item["preference"] is not None]
    if len(judged) < FOLDS:
        return None
    return length_controlled_win_rate(
        [item["preference"] for item in judged],
        [item["length"] for item in judged],
        [item["baseline_length"] for item in judged],
        None if difficulties is None else [difficulties[item["question_id"]] for item in judged],
    )
