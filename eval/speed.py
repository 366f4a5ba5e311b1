"""Measure how fast models read and write, how large they are, and the memory that they take.

python eval/speed.py --models teacher=runs/teacher student=runs/student --out_dir results

Same drawn prompts, same number of new tokens, no end token, one repetition to warm up; medians. One
file a model, OUT_DIR/speed/NAME.json. Peak memory is measured on a GPU alone. Numbers hold for this
machine while nothing else runs on it.
"""

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kd.evaluation.models import ADAPTER, ModelSelection, is_adapter
from kd.evaluation.results import describe_model, is_measured, write_result
from kd.evaluation.speed import measure
from kd.recipe import parse, setting
from kd.run.exit import run


@dataclass
class SpeedSettings:
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "rows at a time, one measurement each"}
    )
    prompt_tokens: int = setting(128, "tokens of a prompt")
    new_tokens: int = setting(64, "tokens that are written to each")
    repeats: int = setting(5, "counted repetitions; the median is reported")
    out_dir: str = setting("results", "folder of the results; speed/NAME.json in it")

    def __post_init__(self) -> None:
        for key, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted {least} or more")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes: {self.batch_sizes}; wanted numbers of 1 or more")


def main() -> None:
    selection, settings = parse(ModelSelection, SpeedSettings, description=__doc__)
    tokenizers = {name: selection.tokenizer(path) for name, path in selection.named_models.items()}
    vocabulary = min(map(len, tokenizers.values()))  # the same prompts for all
    for name, path in selection.named_models.items():
        description = describe_model(
            selection,
            path,
            tokenizers[name],
            machine=machine(),
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            repeats=settings.repeats,
            batch_sizes=settings.batch_sizes,
            prompt_vocabulary=vocabulary,
        )
        file = Path(settings.out_dir) / "speed" / f"{name}.json"
        if is_measured(file, description):
            continue
        model = selection.load(path)
        limit = model.config.get_text_config().to_dict().get("max_position_embeddings")
        if limit is not None and settings.prompt_tokens + settings.new_tokens > limit:
            raise ValueError(
                f"prompt_tokens: {settings.prompt_tokens} + new_tokens: {settings.new_tokens} "
                f"passes the {limit} positions of {name}"
            )
        result = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes_in_memory": sum(p.numel() * p.element_size() for p in model.parameters()),
            "bytes_on_disk": bytes_on_disk(path),
            "batch_sizes": {
                str(size): measure(
                    *(model, vocabulary, size, settings.prompt_tokens),
                    *(settings.new_tokens, settings.repeats),
                )
                for size in settings.batch_sizes
            },
        }
        del model  # before the next one is loaded
        write_result(file, description, result)
        show(name, result, file)


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def bytes_on_disk(path: str) -> int | None:
    """Of the weights of a folder, an adapter's base counted too; None for a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    own = sum(f.stat().st_size for p in ("*.safetensors", "*.bin") for f in folder.glob(p))
    if not is_adapter(path):
        return own
    base = bytes_on_disk(json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"])
    return None if base is None else own + base


def show(name: str, result: dict, file: Path) -> None:
    print(f"{name}: {result['parameters']:,} parameters, {result['bytes_in_memory']:,} bytes")
    for size, numbers in result["batch_sizes"].items():
        print(
            f"{name}, {size} rows: prefill {numbers['prefill_tokens_per_second']:.4g} tokens/s, "
            f"decoding {numbers['decoding_tokens_per_second']:.4g} tokens/s, first token after "
            f"{1000 * numbers['first_token_seconds']:.3g} ms"
        )
    print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    run(main)
