"""The prompts of a generation run: loaded, deduplicated and decontaminated."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kd.data.conversations import to_prompt
from kd.data.near_duplicates import Overlap
from kd.data.sources import load_rows
from kd.distributed import print_rank0
from kd.generation.decontamination import is_contaminated
from kd.generation.records import digest
from kd.settings.generation import FilterSettings, GenerationSettings


@dataclass(frozen=True)
class Prompt:
    """The messages to answer, with the gold answer if the source has one."""

    messages: list[dict]  # including the row's own system prompt
    gold: str | None = None
    source: int = 0  # index into the recipe's sources

    @cached_property
    def id(self) -> str:
        """A hash of the messages."""
        return digest(self.messages)


def load_prompts(settings: GenerationSettings) -> list[Prompt]:
    """Load the prompts of every source, each with the answer of its row.

    Raises ValueError with file and line for a row that has no prompt.
    """
    return [
        Prompt(row["messages"], row["answer"], index)
        for index, source in enumerate(settings.sources)
        for row in load_rows([source], settings.mixture_seed, convert=to_prompt)
    ]


def unique_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Keep the first of equal prompts."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.id, prompt)
    return list(first.values())


def select_prompts(
    settings: GenerationSettings, filters: FilterSettings, evaluation: Overlap
) -> list[Prompt]:
    """Load the prompts to answer: each once, and none that overlaps with the evaluation data.

    Raises ValueError if no prompt is left, or if rationales are requested and a prompt has no gold
    answer.
    """
    loaded = load_prompts(settings)
    unique = unique_prompts(loaded)
    prompts = [prompt for prompt in unique if not is_contaminated(prompt.messages, evaluation)]
    for prompt in prompts if filters.rationales else []:
        if not isinstance(prompt.gold, str) or not prompt.gold.strip():
            raise ValueError(
                f"rationales: the prompt {prompt.messages[-1]['content'][:80]!r} has no gold "
                "answer; wanted prompt and completion (columns: {completion: its_name})"
            )
    print_rank0(
        f"prompts: {len(loaded)} read, {len(loaded) - len(unique)} duplicates dropped, "
        f"{len(unique) - len(prompts)} dropped for overlap with the evaluation data"
    )
    if not prompts:
        raise ValueError("prompts: all of them overlap with evaluation_data; use other prompts")
    return prompts
