"""The manifest of a teacher cache: the checkpoint, tokenizer and chat template that made it."""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kd.distributed import broadcast, raise_on_all_ranks, rank
from kd.models.adapters import adapter_base
from kd.pretrained import model_folder
from kd.settings.distillation import ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.teachers.cache_files import FORMAT
from kd.teachers.file_hashes import file_hashes

CONFIGURATION = ("config.json", "adapter_config.json", "*.index.json")
SAFETENSORS = ("*.safetensors",)
PICKLED = ("pytorch_model*.bin", "adapter_model*.bin")


def manifest_of(
    settings: TeacherSettings,
    objective: Objective,
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """Collective: the manifest of a new cache: what it is made from, and its format."""
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
    """Collective: the teacher by its weights if `name` is a local folder, otherwise by its name."""
    if Path(name).is_dir():
        return {"teacher": teacher_fingerprint(name)}
    return {"teacher_name": name}


def teacher_fingerprint(name: str) -> str:
    """Collective: a hash of the configuration and of every byte of a checkpoint's weights.

    Rank 0 reads the files. Raises ValueError on every rank if it cannot.
    """
    with raise_on_all_ranks():
        found = checkpoint_hash(name) if rank() == 0 else ""
    return broadcast(found)


def checkpoint_hash(name: str) -> str:
    """A hash of the names and contents of a checkpoint's files; an adapter's base is included.

    `name` is a folder or a hub name. Raises ValueError if it has no weights or if they cannot be
    fetched, OSError if a file cannot be read.
    """
    folder = model_folder(name)
    weights = matching(folder, SAFETENSORS + PICKLED)
    if not weights:
        raise ValueError(
            f"teacher: {name} has no weights; wanted *.safetensors or pytorch_model*.bin"
        )
    content = file_hashes(folder, matching(folder, CONFIGURATION) + weights)
    base = adapter_base(str(folder))
    if base:
        content["base model"] = checkpoint_hash(base)
    return hashlib.sha256(json.dumps(sorted(content.items())).encode()).hexdigest()


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a folder that match one of the patterns."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: which id means which token."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
