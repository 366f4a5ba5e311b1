"""What a judge's answer says: a grade, a preference, or nothing that can be counted."""

import math
import re

NUMBER = r"(\d+(?:\.\d+)?)"
FIRST, SECOND = "m", "M"  # the labels of the two answers where one token is asked for


def grade(text: str) -> float | None:
    """1 to 10 in [[n]], or else in [n]; None where there is none, or several that differ."""
    for pattern in (rf"\[\[\s*{NUMBER}\s*\]\]", rf"\[\s*{NUMBER}\s*\]"):
        found = {float(value) for value in re.findall(pattern, text)}
        if found:
            value = found.pop()
            return value if not found and 1 <= value <= 10 else None
    return None


def preference_of_text(text: str) -> float | None:
    """Probability that the second answer is better: 0 of [[A]], 1 of [[B]], 0.5 of [[C]]."""
    found = set(re.findall(r"\[\[\s*([ABC])\s*\]\]", text, flags=re.IGNORECASE))
    found = {letter.upper() for letter in found}
    return {"A": 0.0, "B": 1.0, "C": 0.5}[found.pop()] if len(found) == 1 else None


def preference_of_token(
    text: str, top_log_probabilities: list[dict[str, float]] | None
) -> tuple[float | None, str]:
    """(probability that the second answer is better, what it was read from)."""
    if top_log_probabilities:
        weights = dict.fromkeys((FIRST, SECOND), 0.0)
        for token, value in top_log_probabilities[0].items():
            if token.strip() in weights:
                weights[token.strip()] += math.exp(value)
        if sum(weights.values()) > 0:
            return weights[SECOND] / sum(weights.values()), "log-probabilities"
    word = re.match(r"\W*(m|M)\b", text)
    return (float(word[1] == SECOND), "text") if word else (None, "text")
