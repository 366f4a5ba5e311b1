"""Which samples a run wants, and raw.jsonl, the append-only file of those that it has.

A sample is known by its key: a hash of what decides its answer (model, hidden system prompt, prompt,
sample index, sampling settings). Its seed comes from the key, so its random numbers depend neither
on order nor on batches, and a restart asks only for keys that are missing. A model is known by its
name alone: where other weights were put into the same folder, take another output_dir.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from kd.data.sources import read_jsonl
from kd.generation.engines import Answer, Engine
from kd.recipe import parse_json_list, setting


@dataclass
class GenerationSettings:
    """Who answers which prompts, and how the answers are drawn."""

    model: str = setting("", "hub name or folder of the teacher, or the folder of a LoRA adapter")
    prompts: str = setting("", "JSON list of sources; of chat rows, what precedes the first answer")
    system_prompt: str | None = setting(
        None, "hidden: the teacher sees it, in place of the prompt's own; train.jsonl does not"
    )
    samples_per_prompt: int = setting(1, "answers to each prompt")
    temperature: float = setting(1.0, "0: greedy; the model's own temperature is not used")
    top_p: float = setting(1.0, "nucleus sampling; the model's own top_p and top_k are not used")
    max_new_tokens: int = setting(512, "an answer cut there is no training row")
    batch_size: int = setting(16, "answers at a time in each process")
    seed: int = setting(0, "draws the answers")
    mixture_seed: int = setting(0, "draws the prompts of a source with count, as in training")
    dtype: Literal["bfloat16", "float16", "float32"] = setting("bfloat16", "of the weights")
    output_dir: str = setting("", "folder of raw.jsonl and train.jsonl")

    def __post_init__(self) -> None:
        self.sources = parse_json_list("prompts", self.prompts)
        if not self.sources:
            raise ValueError("prompts: no source given; wanted a list such as [{path: rows.jsonl}]")
        for key in ("model", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; --help says what it means")
        for key in ("samples_per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted 1 or more")
        if self.temperature < 0.0:
            raise ValueError(f"temperature: {self.temperature}; wanted 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p}; wanted more than 0, and 1 at most")
        if self.temperature == 0.0 and (self.samples_per_prompt > 1 or self.top_p < 1.0):
            raise ValueError(
                f"temperature: 0 with samples_per_prompt: {self.samples_per_prompt} and top_p: "
                f"{self.top_p}. Greedy decoding has one answer and draws nothing: set both to 1, "
                "or a temperature above 0"
            )

    def decisive(self) -> dict:
        """The settings that decide an answer; batch_size only moves the last bits of logits."""
        keys = ("model", "system_prompt", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Sample:
    """One answer that is wanted."""

    prompt: list[dict]  # messages, its own system prompt included
    index: int  # 0 to samples_per_prompt - 1
    key: str

    @property
    def seed(self) -> int:
        return int(self.key[:15], 16)  # 60 bits: a torch.Generator takes 63

    def conversation(self, system_prompt: str | None) -> list[dict]:
        """What the model is asked: the hidden system prompt in place of the prompt's own."""
        if system_prompt is None:
            return self.prompt
        own = self.prompt[0]["role"] == "system"
        return [{"role": "system", "content": system_prompt}, *self.prompt[own:]]


def wanted_samples(prompts: Iterable[list[dict]], settings: GenerationSettings) -> list[Sample]:
    """samples_per_prompt samples of every prompt, in the data's order; repeated prompts once."""
    config = settings.decisive()
    unique = {digest(prompt): prompt for prompt in prompts}
    return [
        Sample(prompt, index, digest([config, prompt_id, index]))
        for prompt_id, prompt in unique.items()
        for index in range(settings.samples_per_prompt)
    ]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def compose_batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    """All samples in batches of like length, longest first (what does not fit shows at once).

    Left-padding moves the last bits of the logits, so an answer is the same to the bit only in the
    same batch. Hence batches are made of all samples, finished ones too, and a restart repeats an
    unfinished batch whole.
    """
    length = lambda sample: sum(len(message["content"]) for message in sample.prompt)  # noqa: E731
    ordered = sorted(samples, key=length, reverse=True)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def raw_file(output_dir: str, rank: int) -> Path:
    """The file that process `rank` appends to; one process has raw.jsonl alone."""
    return Path(output_dir) / (f"raw.{rank}.jsonl" if rank else "raw.jsonl")


def cut_torn_lines(output_dir: str) -> int:
    """Cut what follows the last newline of each raw file: a line that a kill tore. Returns bytes."""
    cut = 0
    for path in sorted(Path(output_dir).glob("raw*.jsonl")):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            cut += len(content) - whole
            with open(path, "r+b") as file:
                file.truncate(whole)
    return cut


def read_raw(output_dir: str) -> dict[str, dict]:
    """{key: raw row} of all processes of all earlier runs in this folder."""
    paths = sorted(Path(output_dir).glob("raw*.jsonl"))
    filled = [str(path) for path in paths if path.stat().st_size]
    return {row["key"]: row for path in filled for row in read_jsonl(path)[0]}


def answer_batch(
    batch: list[Sample], engine: Engine, settings: GenerationSettings, known: set[str], file: TextIO
) -> list[Answer]:
    """Ask for a whole batch; append those of its samples that are not `known` yet, line by line."""
    conversations = [sample.conversation(settings.system_prompt) for sample in batch]
    answers = engine.answer(conversations, [sample.seed for sample in batch])
    for sample, answer in zip(batch, answers, strict=True):
        if sample.key in known:
            continue
        row = {
            "key": sample.key,
            "config": settings.decisive(),
            "sample": sample.index,
            "prompt": sample.prompt,
            "answer": answer.text,
            "stopped": answer.stopped,
            "tokens": answer.tokens,
        }
        file.write(json.dumps(row) + "\n")
        file.flush()
    return answers
