"""What a run on a server will ask and cost, before it starts, and what it has cost after it."""

from kd.generation.sampling import Sample
from kd.settings.generation import GenerationSettings, ServerSettings

# Bytes of UTF-8 a token: about right for English, and more than enough tokens for Russian (7) and
# Chinese (4); no tokenizer of the server is at hand.
BYTES_PER_TOKEN = 4
TOKENS_AROUND = 4  # a message, for its role and marks
ENOUGH = 20  # answers from which a mean is worth printing


def prompt_tokens(sample: Sample) -> int:
    return sum(
        TOKENS_AROUND + -(-len(message["content"].encode()) // BYTES_PER_TOKEN)
        for message in sample.conversation
    )


def price(prompt: float, answer: float, server: ServerSettings) -> float | None:
    if not server.price_per_million_tokens:
        return None
    of_prompt, of_answer = server.price_per_million_tokens
    return (prompt * of_prompt + answer * of_answer) / 1e6


def estimate(
    missing: list[Sample],
    answers: dict[str, dict],
    settings: GenerationSettings,
    server: ServerSettings,
) -> str:
    """Requests, tokens and price of the samples that are `missing`; answers so far give the mean."""
    asked = sum(map(prompt_tokens, missing))
    most = len(missing) * settings.max_new_tokens
    lines = [
        f"to ask: {len(missing)} requests of {settings.model} at {server.server}",
        f"tokens: about {asked:,} of prompts (4 bytes each), at most {most:,} of answers "
        f"({settings.max_new_tokens} each)",
    ]
    expected = None
    if len(answers) >= ENOUGH:
        mean = sum(row["tokens"] for row in answers.values()) / len(answers)
        expected = mean * len(missing)
        lines[-1] += f"; about {expected:,.0f} by the mean of {len(answers)} answers so far"
    highest = price(asked, most, server)
    if highest is None:
        lines.append("price: not known; price_per_million_tokens: [prompt, answer] estimates it")
    else:
        about = "" if expected is None else f"; about {price(asked, expected, server):,.2f}"
        lines.append(f"price: at most {highest:,.2f}{about}")
    return "\n".join(lines)


def used(answers: dict[str, dict], server: ServerSettings) -> str:
    """The tokens that the server itself counted for all answers that are there."""
    prompt = sum(row.get("prompt_tokens", 0) for row in answers.values())
    answer = sum(row["tokens"] for row in answers.values())
    cost = price(prompt, answer, server)
    return f"used: {prompt:,} tokens of prompts, {answer:,} of answers" + (
        "" if cost is None else f"; price {cost:,.2f}"
    )
