"""What a cache was made from: a teacher's checkpoint, a tokenizer, a chat template."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from kd.losses.objective import Objective
from kd.settings.distillation import ModelSettings, TeacherSettings
from kd.teachers.cache_files import FORMAT

NO_HIDDEN_STATES = (
    "hidden_weight: a cache has distributions and no hidden states; remove the key, or "
    "teacher_cache (the teacher then runs in the step)"
)
BLOCK, BLOCKS = 4096, 64  # bytes that are read of a file of weights, evenly spaced


def manifest_of(
    settings: TeacherSettings,
    objective: Objective,
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """What a cache is made from, and in which form."""
    return {
        **rows_manifest(objective, model, tokenizer),
        "teacher_name": settings.teacher,
        "teacher": teacher_fingerprint(settings.teacher),
        "top_k": min(settings.cache_top_k or len(tokenizer), len(tokenizer)),
        "dtype": settings.cache_dtype,
    }


def rows_manifest(
    objective: Objective, model: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """What a training run must share with its cache, and knows with no teacher.

    The template is the one before its arguments. The temperature is that of the log-probabilities:
    of a tail one cannot be made from another.
    """
    return {
        "format": FORMAT,
        "vocabulary": len(tokenizer),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": tokenizer.chat_template,
        "template_arguments": model.template_arguments,
        "temperature": objective.temperature,
    }


def teacher_manifest(name: str) -> dict:
    """The teacher as a training run knows it: by its files where they are here, else by its name."""
    if Path(name).is_dir():
        return {"teacher": teacher_fingerprint(name)}
    return {"teacher_name": name}


def teacher_fingerprint(name: str) -> str:
    """A hash of configuration and weights.

    Of weights: names, sizes and 64 blocks of every file. A fine-tuned checkpoint differs in all of
    them, and 60 GB need not be read.
    """
    patterns = ["*.safetensors", "config.json", "adapter_config.json"]
    local = Path(name).is_dir()
    folder = Path(name if local else snapshot_download(name, allow_patterns=patterns))
    content = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            content.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for i in range(BLOCKS):
                    file.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                    content.update(file.read(BLOCK))
    return content.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of which id means which token; rows themselves are known by their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
