"""Speed and size of a model: prefill, first token, decoding, memory, parameters.

B batch, T prompt tokens, N new tokens.
"""

import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kd.models.adapters import adapter_base
from kd.settings.evaluation import SpeedSettings


@dataclass(frozen=True)
class Times:
    """Seconds of one repetition."""

    prefill: float  # the prompt, up to the first new token
    decoding: float  # the N - 1 tokens after it


def now(device: torch.device) -> float:
    """Return the time in seconds once all kernels on the device have finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[Tensor, Times]:
    """Generate greedily from prompts (B, T): tokens (B, N) and times.

    No token ends the generation, so that all models generate equally many.
    """
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


def speed_result(
    name: str, path: str, model: PreTrainedModel, vocab_size: int, settings: SpeedSettings
) -> dict:
    """Measure a model at every batch size: {"parameters", "bytes_...", "batch_sizes"}.

    Raises ValueError if prompt and new tokens exceed the positions of the model.
    """
    limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
    if limit is not None and settings.prompt_tokens + settings.new_tokens > limit:
        raise ValueError(
            f"prompt_tokens: {settings.prompt_tokens} + new_tokens: {settings.new_tokens} exceeds "
            f"the {limit} positions of {name}; wanted shorter prompts or fewer new tokens"
        )
    lengths = settings.prompt_tokens, settings.new_tokens, settings.repeats
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_in_memory": sum(p.numel() * p.element_size() for p in model.parameters()),
        "bytes_on_disk": bytes_on_disk(path),
        "batch_sizes": {
            str(size): measure(model, vocab_size, size, *lengths) for size in settings.batch_sizes
        },
    }


def measure(
    model: PreTrainedModel, vocab_size: int, batch: int, prompt_tokens: int, new: int, repeats: int
) -> dict:
    """Return the medians over `repeats` repetitions after one warm-up repetition.

    Prompts are random ids below `vocab_size`, the same for all models.
    """
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocab_size, (batch, prompt_tokens), generator=draw).to(model.device)
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


def machine() -> str:
    """Describe the machine that the speed belongs to."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def bytes_on_disk(path: str) -> int | None:
    """Return the bytes of a folder's weights, an adapter's base included; None for a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    size = sum(f.stat().st_size for p in ("*.safetensors", "*.bin") for f in folder.glob(p))
    base_path = adapter_base(path)
    if base_path is None:
        return size
    base = bytes_on_disk(base_path)
    return None if base is None else size + base


def speed_text(name: str, result: dict) -> str:
    """Format a result, one line for the size and one for each batch size."""
    lines = [f"{name}: {result['parameters']:,} parameters, {result['bytes_in_memory']:,} bytes"]
    for size, numbers in result["batch_sizes"].items():
        lines.append(
            f"{name}, batch size {size}: prefill {numbers['prefill_tokens_per_second']:.4g} "
            f"tokens/s, decoding {numbers['decoding_tokens_per_second']:.4g} tokens/s, first token "
            f"after {1000 * numbers['first_token_seconds']:.3g} ms"
        )
    return "\n".join(lines)
