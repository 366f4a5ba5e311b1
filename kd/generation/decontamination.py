"""n-gram decontamination: find training text that overlaps with the evaluation data."""

from kd.data.conversations import Fields
from kd.data.near_duplicates import Overlap
from kd.data.sources import load_rows

PROMPT_KEYS = ("prompt", "turns", "instruction", "question")


def evaluation_texts(sources: list[dict], seed: int) -> list[str]:
    """Read the texts that an evaluation asks: user messages, prompt, turns, instruction, question.

    Raises ValueError with file and line for a row without any of these fields.
    """

    def convert(raw: dict, source: dict, place: str) -> dict:
        get = Fields(raw, source)
        for key in ("messages", "conversations"):
            if get[key] is not None:
                messages = get.messages(key, place)
                return {"texts": [m["content"] for m in messages if m["role"] == "user"]}
        for key in PROMPT_KEYS:
            found = get[key]
            texts = found if isinstance(found, list) else [found]
            if found and all(isinstance(text, str) for text in texts):
                return {"texts": texts}
        raise ValueError(
            f"{place}: fields {sorted(raw)}; wanted messages, prompt, turns, instruction or "
            "question (columns: {prompt: its_name} maps other names)"
        )

    rows = [row for source in sources for row in load_rows([source], seed, convert=convert)]
    return [text for row in rows for text in row["texts"]]


def is_contaminated(messages: list[dict], evaluation: Overlap) -> bool:
    """Whether any of the messages overlaps with the evaluation data."""
    return any(evaluation.found_in(message["content"]) for message in messages)
