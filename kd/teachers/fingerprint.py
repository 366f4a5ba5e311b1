"""The manifest of a teacher cache: the checkpoint, tokenizer and chat template that made it."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from kd.settings.distillation import ModelSettings, Objective, TeacherSettings
from kd.teachers.cache_files import FORMAT

NO_HIDDEN_STATES = (
    "hidden_weight with teacher_cache: a cache has distributions but no hidden states; remove "
    "hidden_weight, or remove teacher_cache so that the teacher runs in every step"
)
BLOCK, BLOCKS = 4096, 64  # bytes per block, evenly spaced blocks per weight file that are read


def manifest_of(
    settings: TeacherSettings,
    objective: Objective,
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """The manifest of a new cache: what it is made from, and its format."""
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
    """The part of the manifest that a training run knows without a teacher.

    The chat template is recorded before its arguments are set. The temperature is part of it
    because the tail mass at another temperature cannot be computed from the cache.
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
    """The teacher by its weights if `name` is a local folder, otherwise by its name."""
    if Path(name).is_dir():
        return {"teacher": teacher_fingerprint(name)}
    return {"teacher_name": name}


def teacher_fingerprint(name: str) -> str:
    """A hash of the configuration and the weights of a checkpoint.

    Of every weight file it covers the name, the size and 64 blocks: fine-tuning changes all of
    them, and a 60 GB checkpoint need not be read in full.
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
    """A hash of the vocabulary: which id means which token."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
