"""Rollouts: a student generates completions for prompts in the middle of its training.

B batch, T tokens, V vocabulary.
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

BATCH_TOKENS = 8192  # most tokens of one forward of continuous batching


@dataclass(frozen=True)
class Prompt:
    """A prompt and the limits of its completion."""

    ids: list[int]
    limit: int  # most tokens of the completion, the end token included
    seed: int  # of this prompt's own random stream

    @property
    def length(self) -> int:
        """Most tokens of prompt and completion together."""
        return len(self.ids) + self.limit


class PaddedIdsMask(LogitsProcessor):
    """Exclude the ids beyond the tokenizer's, which a head with a padded vocabulary also scores."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set scores (B, V) to -inf, in place, at every id that the tokenizer does not have."""
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class RolloutGenerator:
    """Sample completions from a student's own distribution, at the sampling settings of a recipe.

    Generation settings that are stored with the model, such as a repetition penalty, do not apply.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OnPolicySettings,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.model, self.settings, self.vocab_size = model, settings, len(tokenizer)
        ends = generation_config(model, tokenizer).eos_token_id
        self.ends, self.pad = set(ends), tokenizer.pad_token_id
        # Greedy: a logits processor adds the Gumbel noise that makes the argmax a sample.
        self.config = GenerationConfig(
            eos_token_id=ends, pad_token_id=self.pad, do_sample=False, use_cache=True
        )

    def generate(self, prompts: list[Prompt], device: torch.device) -> list[list[int]]:
        """The token ids of each completion, with the end token if it comes before the limit.

        Collective under ZeRO-3, also for a rank without prompts.
        """
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].length, reverse=True)
        found: list[list[int]] = [[] for _ in prompts]
        with generating(self.model, self.config):
            if self.settings.generation_engine == "continuous":
                return self.generate_continuously(prompts, device) if prompts else []
            for places in self.batches(prompts, order):
                batch = [prompts[i] for i in places]
                for place, ids in zip(places, self.generate_batch(batch, device), strict=True):
                    found[place] = ids
        return found

    def batches(self, prompts: list[Prompt], order: list[int]) -> Iterator[list[int]]:
        """Split the indices `order`, longest prompt first, into batches that fit the workspace."""
        room, itemsize = 2**20 * self.settings.generation_workspace_mb, self.model.dtype.itemsize
        while order:
            width = max(len(prompts[i].ids) for i in order) + max(prompts[i].limit for i in order)
            rows = max(1, room // row_bytes(self.model.config, width, itemsize))
            yield order[:rows]
            order = order[rows:]

    def generate_batch(self, prompts: list[Prompt], device: torch.device) -> list[list[int]]:
        """Completions of one batch, padded on the left."""
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad)  # (B, T)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[i, width - len(prompt.ids) :] = 1
        seeds, settings = [prompt.seed for prompt in prompts], self.settings
        processors = LogitsProcessorList([PaddedIdsMask(self.vocab_size)])
        processors += sampling_processors(
            settings.generation_temperature, settings.top_p, seeds, settings.top_k
        )
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(prompt.limit for prompt in prompts),
            logits_processor=processors,
            synced_gpus=False,
        )
        rows = zip(out[:, width:].tolist(), prompts, strict=True)
        return [self.cut_after_end(row[: prompt.limit]) for row, prompt in rows]

    def generate_continuously(self, prompts: list[Prompt], device: torch.device) -> list[list[int]]:
        """Completions of all prompts by Transformers' continuous batching.

        Its samples come from one random stream, so a completion depends on the other prompts; equal
        calls give equal completions. Raises RuntimeError if a prompt gets no completion.
        """
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        limit = max(prompt.limit for prompt in prompts)
        hints = WorkloadHints(max(len(prompt.ids) for prompt in prompts), limit, len(prompts))
        # It seeds the global random stream of the process, which belongs to the training.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            manager = self.model.init_continuous_batching(
                self.sampling_config(),
                self.continuous_batching_config(prompts),
                workload_hints=hints,
            )
            # Add all prompts before the thread starts. generate_batch adds them while it runs:
            # timing then decides which forward, and so which random numbers, a prompt gets.
            names = manager.add_requests([prompt.ids for prompt in prompts], max_new_tokens=limit)
            manager.start()
            try:
                found = wait_for_results(manager, len(prompts))
            finally:
                manager.stop(block=True, timeout=5)
                manager.destroy()
        results = [found[name] for name in names if name in found]
        errors = {result.error for result in results if result.error}
        if errors or len(results) != len(prompts):
            raise RuntimeError(
                f"continuous batching answered {len(results)} of {len(prompts)} prompts "
                f"({'; '.join(sorted(errors)) or 'its thread ended'}); use a larger "
                "generation_workspace_mb, or generation_engine: generate"
            )
        rows = zip(results, prompts, strict=True)
        return [self.cut_after_end(result.generated_tokens[: p.limit]) for result, p in rows]

    def sampling_config(self) -> GenerationConfig:
        """The sampling settings as a GenerationConfig that excludes ids beyond the tokenizer's."""
        settings = self.settings
        sampling = {"do_sample": False}
        if settings.generation_temperature:
            sampling = {
                "do_sample": True,
                "temperature": float(settings.generation_temperature),
                "top_k": settings.top_k,
                "top_p": settings.top_p,
            }
        padded = range(self.vocab_size, self.model.get_output_embeddings().out_features)
        return GenerationConfig(
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.pad,
            suppress_tokens=list(padded) or None,
            **sampling,
        )

    def continuous_batching_config(self, prompts: list[Prompt]) -> ContinuousBatchingConfig:
        """The workspace as a share of the free memory; attention stays that of the training."""
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        free = total - max(reserved, allocated)
        return ContinuousBatchingConfig(
            max_memory_percent=min(0.9, 2**20 * self.settings.generation_workspace_mb / free),
            max_batch_tokens=min(BATCH_TOKENS, sum(len(prompt.ids) for prompt in prompts)),
            auto_switch_to_flash=False,
            seed=prompts[0].seed % 2**31,
        )

    def cut_after_end(self, ids: list[int]) -> list[int]:
        """The ids up to the first end token; what follows it is padding."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids)) + 1]


def wait_for_results(manager: ContinuousBatchingManager, count: int) -> dict[str, GenerationOutput]:
    """The results of `count` requests by request id; fewer if the manager's thread ends."""
    found: dict[str, GenerationOutput] = {}
    while len(found) < count:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            break
        if result is not None and result.is_finished():
            found[result.request_id] = result
    return found
