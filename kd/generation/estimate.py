"""Requests, tokens and cost of a run on a server: the estimate before it, the usage after it."""

from kd.generation.sampling import Sample
from kd.settings.generation import GenerationSettings, ServerSettings

# UTF-8 bytes per token. About right for English; overestimates the tokens of Russian (7 bytes) and
# matches Chinese (4). The server's tokenizer is not available here.
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4  # for the role and the special tokens of a message
MIN_ANSWERS = 20  # answers needed before their mean length is printed


def prompt_tokens(sample: Sample) -> int:
    """The estimated number of prompt tokens of a sample."""
    return sum(
        TOKENS_PER_MESSAGE + -(-len(message["content"].encode()) // BYTES_PER_TOKEN)
        for message in sample.conversation
    )


def price(prompt: float, answer: float, server: ServerSettings) -> float | None:
    """The price of so many prompt and answer tokens; None if the recipe has no prices."""
    if not server.price_per_million_tokens:
        return None
    per_prompt, per_answer = server.price_per_million_tokens
    return (prompt * per_prompt + answer * per_answer) / 1e6


def estimate(
    missing: list[Sample],
    answers: dict[str, dict],
    settings: GenerationSettings,
    server: ServerSettings,
) -> str:
    """Describe the requests, tokens and price of the missing samples.

    The mean length of the existing answers gives the expected number of tokens.
    """
    prompt = sum(map(prompt_tokens, missing))
    most = len(missing) * settings.max_new_tokens
    lines = [
        f"to ask: {len(missing)} requests of {settings.model} at {server.server}",
        f"tokens: about {prompt:,} in prompts (4 bytes per token), at most {most:,} in answers "
        f"({settings.max_new_tokens} each)",
    ]
    expected = None
    if len(answers) >= MIN_ANSWERS:
        mean = sum(row["tokens"] for row in answers.values()) / len(answers)
        expected = mean * len(missing)
        lines[-1] += f"; about {expected:,.0f} by the mean of {len(answers)} answers so far"
    highest = price(prompt, most, server)
    if highest is None:
        lines.append("price: unknown; set price_per_million_tokens: [prompt, answer]")
    else:
        about = "" if expected is None else f"; about {price(prompt, expected, server):,.2f}"
        lines.append(f"price: at most {highest:,.2f}{about}")
    return "\n".join(lines)


def usage(answers: dict[str, dict], server: ServerSettings) -> str:
    """Describe the tokens that the server reported for all answers, and their price."""
    prompt = sum(row.get("prompt_tokens", 0) for row in answers.values())
    answer = sum(row["tokens"] for row in answers.values())
    cost = price(prompt, answer, server)
    return f"used: {prompt:,} tokens in prompts, {answer:,} in answers" + (
        "" if cost is None else f"; price {cost:,.2f}"
    )
