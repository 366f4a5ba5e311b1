"""The samples of a run: their keys, their seeds and their batches.

The key of a sample hashes everything that determines its answer: model, hidden system prompt,
prompt, sample index and sampling settings. The seed is derived from the key, so random numbers do
not depend on order or batches, and a restart generates only the missing keys. A model is identified
by its name alone: use another output_dir after replacing the weights in the same folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kd.generation.prompts import Prompt, unique_prompts
from kd.generation.records import digest
from kd.settings.generation import GenerationSettings


@dataclass(frozen=True)
class Sample:
    """One requested answer."""

    prompt: Prompt
    index: int  # 0 to samples_per_prompt - 1
    config: dict  # everything besides the prompt that determines the answer
    key: str

    @property
    def seed(self) -> int:
        """The seed of the answer: 60 bits of the key, since torch.Generator takes 63."""
        return int(self.key[:15], 16)

    @property
    def sampling(self) -> tuple[float, float]:
        """Temperature and top_p."""
        return self.config["temperature"], self.config["top_p"]

    @property
    def conversation(self) -> list[dict]:
        """The messages that the teacher sees: the hidden system prompt replaces the row's own."""
        messages, hidden = self.prompt.messages, self.config["system_prompt"]
        if hidden is None:
            return messages
        has_system = messages[0]["role"] == "system"
        return [{"role": "system", "content": hidden}, *messages[has_system:]]


def plan_samples(
    prompts: Iterable[Prompt], settings: GenerationSettings, served: bool = False
) -> list[Sample]:
    """Plan samples_per_prompt samples of every unique prompt, in the order of the data."""
    samples = []
    for prompt in unique_prompts(prompts):
        for index in settings.indices:
            config = sample_config(settings, index, prompt.source, served)
            key = digest([config, prompt.id, index])
            samples.append(Sample(prompt, index, config, key))
    return samples


def sample_config(settings: GenerationSettings, index: int, source: int, served: bool) -> dict:
    """Everything besides the prompt that determines an answer.

    batch_size is left out: it changes only the last bits of the logits. So is a server's URL, whose
    port changes from job to job, and with a server the dtype, which the server chooses.
    """
    temperature, top_p, seed = settings.sampling(index)
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
    return config | ({"served": True} if served else {"dtype": settings.weights_dtype})


def compose_batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    """Group all samples into batches of similar length, the longest first to fail early on memory.

    All samples of a batch share temperature and top_p. Left-padding changes the last bits of the
    logits, so an answer is reproducible to the bit only in the same batch. Batches are therefore
    composed of all samples, including finished ones, and a restart repeats unfinished batches
    entirely.
    """

    def length(sample: Sample) -> int:
        return sum(len(message["content"]) for message in sample.prompt.messages)

    groups: dict[tuple[float, float], list[Sample]] = {}
    for sample in sorted(samples, key=length, reverse=True):
        groups.setdefault(sample.sampling, []).append(sample)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
