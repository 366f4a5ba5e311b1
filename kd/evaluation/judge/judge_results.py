"""Mean grades and win rates: a pure function of the recorded verdicts."""

import statistics

from kd.evaluation.judge.judgements import Answers, Judge, Judgement
from kd.evaluation.judge.length_control import FOLDS, length_controlled_win_rate
from kd.evaluation.judge.verdicts import grade, preference_of_text, preference_of_token


def summarize(
    judge: Judge,
    judgements: list[Judgement],
    verdicts: dict[str, dict],
    answers: dict[str, Answers],
    baseline: str | None,
    difficulties: dict[str, float] | None,
) -> dict:
    """The result of one model: mean grades in score mode, win rates in pair mode."""
    served_by = sorted({verdicts[judgement.key]["served_by"] for judgement in judgements})
    if judge.mode == "score":
        return {"served_by": served_by, **score_result(judgements, verdicts)}
    model_answers, baseline_answers = answers[judgements[0].model], answers[baseline]
    return {
        "served_by": served_by,
        **pair_result(judge, judgements, verdicts, model_answers, baseline_answers, difficulties),
    }


def score_result(judgements: list[Judgement], verdicts: dict[str, dict]) -> dict:
    """Mean grades overall, by turn and by category, and the grade of every item."""
    items = [
        {
            "question_id": j.question.id,
            "category": j.question.category,
            "turn": j.turn,
            "score": grade(verdicts[j.key]["text"]),
        }
        for j in judgements
    ]
    categories = dict.fromkeys(item["category"] for item in items)
    return {
        "overall": means(items, "score"),
        "turns": means_by(items, "turn", "score"),
        "categories": {
            name: means(part, "score") | {"turns": means_by(part, "turn", "score")}
            for name in categories
            if (part := [item for item in items if item["category"] == name])
        },
        "items": items,
    }


def pair_result(
    judge: Judge,
    judgements: list[Judgement],
    verdicts: dict[str, dict],
    answers: Answers,
    baseline_answers: Answers,
    difficulties: dict[str, float] | None = None,
) -> dict:
    """Win rates against the baseline, overall, by turn and by category.

    The preference of an item is the mean over the orders of its pair; without a verdict in every
    order it is None.
    """
    pairs: dict[tuple[str, int], list[tuple[Judgement, float | None]]] = {}
    sources = []
    for judgement in judgements:
        value, source = preference(judge, judgement, verdicts[judgement.key])
        pairs.setdefault((judgement.question.id, judgement.turn), []).append((judgement, value))
        if value is not None:
            sources.append(source)
    items = []
    for (id_, turn), found in pairs.items():
        values = [value for _, value in found]
        items.append(
            {
                "question_id": id_,
                "category": found[0][0].question.category,
                "turn": turn,
                "preference": None if None in values else statistics.fmean(values),
                "orders": {str(judgement.order): value for judgement, value in found},
                "length": len(answers[id_][turn - 1]),
                "baseline_length": len(baseline_answers[id_][turn - 1]),
            }
        )
    return {
        "overall": means(items, "preference"),
        "length_controlled_win_rate": length_control(items, difficulties),
        "turns": means_by(items, "turn", "preference"),
        "categories": means_by(items, "category", "preference"),
        "ties": sum(item["preference"] == 0.5 for item in items),
        "consistency": consistency(items),
        "read_from": {name: sources.count(name) for name in sorted(set(sources))},
        "items": items,
    }


def preference(judge: Judge, judgement: Judgement, verdict: dict) -> tuple[float | None, str]:
    """The probability that the model's answer is better, and where it was read from."""
    if judge.verdict == "token":
        second, source = preference_of_token(verdict["text"], verdict["top_log_probabilities"])
    else:
        second, source = preference_of_text(verdict["text"]), "text"
    if second is None:
        return None, source
    return (second if judgement.order == 1 else 1.0 - second), source


def means(items: list[dict], key: str) -> dict[str, float | int | None]:
    """Mean and standard error over the items with a value, and the number of items without."""
    values = [item[key] for item in items if item[key] is not None]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {
        "mean": statistics.fmean(values) if values else None,
        "standard_error": error,
        "n": len(values),
        "without_verdict": len(items) - len(values),
    }


def means_by(items: list[dict], group: str, key: str) -> dict[str, dict]:
    """The means of every group of items."""
    names = dict.fromkeys(item[group] for item in items)
    return {str(n): means([item for item in items if item[group] == n], key) for n in names}


def consistency(items: list[dict]) -> float | None:
    """The share of pairs with the same verdict in both orders; None if no pair has both.

    Low consistency means position bias. Two ties are the same verdict, a tie and a win are not.
    """
    pairs = [list(item["orders"].values()) for item in items if len(item["orders"]) == 2]
    pairs = [pair for pair in pairs if None not in pair]

    def winner(value: float) -> int:
        return (value > 0.5) - (value < 0.5)

    return statistics.fmean(winner(a) == winner(b) for a, b in pairs) if pairs else None


def length_control(items: list[dict], difficulties: dict[str, float] | None) -> float | None:
    """The length-controlled win rate; None with fewer judgements than cross-validation folds."""
    judged = [item for item in items if item["preference"] is not None]
    if len(judged) < FOLDS:
        return None
    return length_controlled_win_rate(
        [item["preference"] for item in judged],
        [item["length"] for item in judged],
        [item["baseline_length"] for item in judged],
        None if difficulties is None else [difficulties[item["question_id"]] for item in judged],
    )
