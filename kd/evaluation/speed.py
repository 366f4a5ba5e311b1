"""How fast a model reads and writes: prefill, first token, decoding. B batch, T prompt, N new tokens."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Times:
    """Seconds of one repetition."""

    prefill: float  # the prompt, up to the first new token
    decoding: float  # the N - 1 tokens behind it


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[Tensor, Times]:
    """((B, N) most probable tokens, times). No token ends it, so every model writes as many."""
    start = now(model.device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1)
    first = now(model.device)
    tokens = [token]
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, -1), Times(first - start, now(model.device) - first)


def measure(
    model: PreTrainedModel, vocabulary: int, batch: int, prompt_tokens: int, new: int, repeats: int
) -> dict:
    """Medians over `repeats`, after one that is not counted; prompts are drawn, equal for models."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=draw).to(model.device)
    cuda = model.device.type == "cuda"
    generate(model, prompt, new)
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    times = [generate(model, prompt, new)[1] for _ in range(repeats)]
    prefill = statistics.median(t.prefill for t in times)
    decoding = statistics.median(t.decoding for t in times)
    return {
        "prefill_tokens_per_second": batch * prompt_tokens / prefill,
        "decoding_tokens_per_second": batch * (new - 1) / decoding,
        "first_token_seconds": prefill,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(model.device) if cuda else None,
        "prefill_seconds": [t.prefill for t in times],
        "decoding_seconds": [t.decoding for t in times],
    }
