"""Parse the judge's answer: a grade, a preference, or None without a clear verdict."""

import math
import re

NUMBER = r"(\d+(?:\.\d+)?)"
FIRST, SECOND = "m", "M"  # labels of the two answers for a one-token verdict


def grade(text: str) -> float | None:
    """The grade 1 to 10 in [[n]], else in [n]; None without a grade or with different grades."""
    for pattern in (rf"\[\[\s*{NUMBER}\s*\]\]", rf"\[\s*{NUMBER}\s*\]"):
        found = {float(value) for value in re.findall(pattern, text)}
        if found:
            value = found.pop()
            return value if not found and 1 <= value <= 10 else None
    return None


def preference_of_text(text: str) -> float | None:
    """The probability that the second answer is better: [[A]] 0, [[B]] 1, [[C]] 0.5, else None."""
    found = set(re.findall(r"\[\[\s*([ABC])\s*\]\]", text, flags=re.IGNORECASE))
    found = {letter.upper() for letter in found}
    return {"A": 0.0, "B": 1.0, "C": 0.5}[found.pop()] if len(found) == 1 else None


def preference_of_token(
    text: str, top_log_probabilities: list[dict[str, float]] | None
) -> tuple[float | None, str]:
    """The probability that the second answer is better, and where it was read from.

    The log-probabilities of the two labels decide; without them, the text.
    """
    if top_log_probabilities:
        weights = dict.fromkeys((FIRST, SECOND), 0.0)
        for token, value in top_log_probabilities[0].items():
            if token.strip() in weights:
                weights[token.strip()] += math.exp(value)
        if sum(weights.values()) > 0:
            return weights[SECOND] / sum(weights.values()), "log-probabilities"
    word = re.match(r"\W*(m|M)\b", text)
    return (float(word[1] == SECOND), "text") if word else (None, "text")
