"""A student writes on prompts, in the middle of its training.

B rows, T tokens, V vocabulary.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import (
    WorkloadHints,
    get_device_and_memory_breakdown,
)

from kd.data.tokenizer import generation_config
from kd.generation.engines import sampling_processors
from kd.models.generation_mode import generating, row_bytes
from kd.settings.distillation import OnPolicySettings

BATCH_TOKENS = 8192  # of a forward of continuous batching at most: prompts are read in such pieces


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    limit: int  # tokens of its answer at most, the end token included
    seed: int  # its own random stream

    @property
    def length(self) -> int:
        return len(self.ids) + self.limit


class KnownIds(LogitsProcessor):
    """A head has padded rows behind the tokenizer's ids; nothing is drawn from them."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocabulary :] = -torch.inf
        return scores


def results_of(manager: ContinuousBatchingManager, count: int) -> dict[str, GenerationOutput]:
    """What so many requests have come to, by their names; fewer, where the thread has ended."""
    found: dict[str, GenerationOutput] = {}
    while len(found) < count:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            break
        if result is not None and result.is_finished():
            found[result.request_id] = result
    return found


class Writer:
    """The CausalLM of a student; samples its own distribution, with no penalty of its folder's."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OnPolicySettings,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.model, self.settings, self.vocabulary = model, settings, len(tokenizer)
        ends = generation_config(model, tokenizer).eos_token_id
        self.ends, self.pad = set(ends), tokenizer.pad_token_id
        # Greedy, since the noise that makes it a draw is added to the scores.
        self.config = GenerationConfig(
            eos_token_id=ends, pad_token_id=self.pad, do_sample=False, use_cache=True
        )

    def answers(self, prompts: list[Prompt], device: torch.device) -> list[list[int]]:
        """The ids of each answer with its end token, where it comes before the limit.

        Collective under ZeRO-3, also for a rank that has no prompt.
        """
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].length, reverse=True)
        found: list[list[int]] = [[] for _ in prompts]
        with generating(self.model, self.config):
            if self.settings.generation_engine == "continuous":
                return self.write_continuously(prompts, device) if prompts else []
            for places in self.batches(prompts, order):
                batch = [prompts[i] for i in places]
                for place, ids in zip(places, self.write(batch, device), strict=True):
                    found[place] = ids
        return found

    def batches(self, prompts: list[Prompt], order: list[int]) -> Iterator[list[int]]:
        """Places in batches that the workspace holds, each row as long as the first, the longest."""
        room, itemsize = 2**20 * self.settings.generation_workspace_mb, self.model.dtype.itemsize
        while order:
            width = max(len(prompts[i].ids) for i in order) + max(prompts[i].limit for i in order)
            rows = max(1, room // row_bytes(self.model.config, width, itemsize))
            yield order[:rows]
            order = order[rows:]

    def write(self, prompts: list[Prompt], device: torch.device) -> list[list[int]]:
        """One batch, padded on the left."""
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[i, width - len(prompt.ids) :] = 1
        drawing, settings = [prompt.seed for prompt in prompts], self.settings
        processors = LogitsProcessorList([KnownIds(self.vocabulary)])
        processors += sampling_processors(
            settings.generation_temperature, settings.top_p, drawing, settings.top_k
        )
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(prompt.limit for prompt in prompts),
            logits_processor=processors,
            synced_gpus=False,
        )
        rows = zip(out[:, width:].tolist(), prompts, strict=True)
        return [self.until_end(row[: prompt.limit]) for row, prompt in rows]

    def write_continuously(self, prompts: list[Prompt], device: torch.device) -> list[list[int]]:
        """All prompts by Transformers' continuous batching.

        Its draws come from one stream, so an answer depends on what else is written; equal calls
        give equal answers. Raises RuntimeError where it leaves a prompt without one.
        """
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        limit = max(prompt.limit for prompt in prompts)
        hints = WorkloadHints(max(len(prompt.ids) for prompt in prompts), limit, len(prompts))
        # It seeds the one stream of the process, which is the training's.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            manager = self.model.init_continuous_batching(
                self.drawing(), self.room(prompts), workload_hints=hints
            )
            # Before its thread starts: what generate_batch adds beside it comes into the first
            # forward or a later one as the machine pleases, and is then drawn otherwise.
            names = manager.add_requests([prompt.ids for prompt in prompts], max_new_tokens=limit)
            manager.start()
            try:
                found = results_of(manager, len(prompts))
            finally:
                manager.stop(block=True, timeout=5)
                manager.destroy()
        answers = [found[name] for name in names if name in found]
        errors = {answer.error for answer in answers if answer.error}
        if errors or len(answers) != len(prompts):
            raise RuntimeError(
                f"continuous batching answered {len(answers)} of {len(prompts)} prompts "
                f"({'; '.join(sorted(errors)) or 'its thread ended'}); a larger "
                "generation_workspace_mb may help, or generation_engine: generate"
            )
        rows = zip(answers, prompts, strict=True)
        return [self.until_end(answer.generated_tokens[: p.limit]) for answer, p in rows]

    def drawing(self) -> GenerationConfig:
        """The settings of a draw, and no id behind the tokenizer's."""
        settings = self.settings
        draws = {"do_sample": False}
        if settings.generation_temperature:
            draws = {
                "do_sample": True,
                "temperature": float(settings.generation_temperature),
                "top_k": settings.top_k,
                "top_p": settings.top_p,
            }
        padded = range(self.vocabulary, self.model.get_output_embeddings().out_features)
        return GenerationConfig(
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.pad,
            suppress_tokens=list(padded) or None,
            **draws,
        )

    def room(self, prompts: list[Prompt]) -> ContinuousBatchingConfig:
        """The workspace, as a share of what is free; attention stays that of the training."""
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        free = total - max(reserved, allocated)
        return ContinuousBatchingConfig(
            max_memory_percent=min(0.9, 2**20 * self.settings.generation_workspace_mb / free),
            max_batch_tokens=min(BATCH_TOKENS, sum(len(prompt.ids) for prompt in prompts)),
            auto_switch_to_flash=False,
            seed=prompts[0].seed % 2**31,
        )

    def until_end(self, ids: list[int]) -> list[int]:
        """What is behind an end token is padding."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids)) + 1]
