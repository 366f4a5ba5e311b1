"""Which samples a run wants, and in which batches they are drawn.

A sample is known by its key: a hash of what decides its answer (model, hidden system prompt, prompt,
sample index, sampling settings). Its seed comes from the key, so its random numbers depend neither
on order nor on batches, and a restart asks only for keys that are missing. A model is known by its
name alone: where other weights were put into the same folder, take another output_dir.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from kd.data.conversations import to_prompt
from kd.data.sources import source_rows
from kd.settings.generation import GenerationSettings


@dataclass(frozen=True)
class Question:
    """A prompt and what is known beside it."""

    prompt: list[dict]  # messages, its own system prompt included
    gold: str | None = None  # the right answer, where the source has one
    source: int = 0  # its place among the sources

    @cached_property
    def id(self) -> str:
        return digest(self.prompt)


@dataclass(frozen=True)
class Sample:
    """One answer that is wanted."""

    question: Question
    index: int  # 0 to samples_per_prompt - 1
    config: dict  # what decides the answer beside the prompt
    key: str

    @property
    def seed(self) -> int:
        return int(self.key[:15], 16)  # 60 bits: a torch.Generator takes 63

    @property
    def drawing(self) -> tuple[float, float]:
        return self.config["temperature"], self.config["top_p"]

    @property
    def conversation(self) -> list[dict]:
        """What the model is asked: the hidden system prompt in place of the prompt's own."""
        prompt, hidden = self.question.prompt, self.config["system_prompt"]
        if hidden is None:
            return prompt
        own = prompt[0]["role"] == "system"
        return [{"role": "system", "content": hidden}, *prompt[own:]]


def load_questions(settings: GenerationSettings) -> list[Question]:
    """The prompts of every source, each with the answer that its row has.

    Raises ValueError naming file and line where a row is no prompt.
    """
    found = []
    for place, source in enumerate(settings.sources):
        for row in source_rows(source, settings.mixture_seed, to_prompt):
            found.append(Question(row["messages"], row["answer"], place))
    return found


def distinct(questions: Iterable[Question]) -> list[Question]:
    """Each prompt once, where it is first."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.id, question)
    return list(first.values())


def wanted_samples(
    questions: Iterable[Question], settings: GenerationSettings, served: bool = False
) -> list[Sample]:
    """samples_per_prompt samples of every prompt, in the data's order; repeated prompts once."""
    samples = []
    for question in distinct(questions):
        for index in settings.indices:
            config = decisive(settings, index, question.source, served)
            key = digest([config, question.id, index])
            samples.append(Sample(question, index, config, key))
    return samples


def decisive(settings: GenerationSettings, index: int, source: int, served: bool) -> dict:
    """What decides an answer beside its prompt; batch_size only moves the last bits of logits.

    A server's URL is not in it (ports change from job to job), nor the weights' type, which is the
    server's own.
    """
    temperature, top_p, seed = settings.drawing(index)
    config = {
        "model": settings.model,
        "system_prompt": settings.hidden_prompt(source),
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": settings.max_new_tokens,
        "seed": seed,
    }
    if settings.arguments:
        config["template_arguments"] = settings.arguments
    return config | ({"served": True} if served else {"dtype": settings.dtype})


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def compose_batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    """All samples in batches of like length, longest first (what does not fit shows at once).

    A batch has one temperature and one top_p. Left-padding moves the last bits of the logits, so an
    answer is the same to the bit only in the same batch. Hence batches are made of all samples,
    finished ones too, and a restart repeats an unfinished batch whole.
    """
    length = lambda sample: sum(len(m["content"]) for m in sample.question.prompt)  # noqa: E731
    groups: dict[tuple[float, float], list[Sample]] = {}
    for sample in sorted(samples, key=length, reverse=True):
        groups.setdefault(sample.drawing, []).append(sample)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
