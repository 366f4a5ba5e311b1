"""Load configurations, tokenizers, models and adapters: the only place that calls from_pretrained.

A mistake is one ValueError: a folder that does not exist, a hub that cannot be reached, a damaged
file, code that comes with a model, and every tensor that the files lack. Transformers itself fills
missing tensors with random numbers and goes on.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.distributed import print_rank0, raise_on_all_ranks
from kd.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    FETCHED,
    INDICES,
    WEIGHTS,
    check_files,
    check_weights,
    first_line,
    read_json,
    safetensors_header,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import (
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
# Without folders such as original/ and onnx/, which repeat the weights in other formats.
HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
IN_FOLDERS = ["*/*.json", "*/*.txt", "*/*.model", "*/*.tiktoken"]
COMPUTED = "rotary_emb.inv_freq"  # older checkpoints store it; it is computed from the config
NAMED = 3  # tensors that a message names


def load_config(name: str | Path, **options: Any) -> "PretrainedConfig":
    """Load the configuration of a hub name or folder.

    Raises ValueError if there is none, if it is damaged, or if its model needs code of its own.
    """
    from transformers import AutoConfig

    found = check_files(name, CONFIG)
    with one_line(name, "configuration"):
        return AutoConfig.from_pretrained(name, **found, **options)


def read_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a hub name or folder as Transformers has it.

    Raises ValueError if it is missing or damaged, or if its chat template has a syntax error.
    """
    from transformers import AutoTokenizer

    found = check_files(name, *TOKENIZER_FILES)
    with one_line(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **found)
    check_template_syntax(tokenizer.chat_template, str(name))
    return tokenizer


def load_generation_config(folder: str | Path) -> "GenerationConfig":
    """Load the generation settings of a folder. Raises ValueError if they are damaged."""
    from transformers import GenerationConfig

    check_files(folder, "generation_config.json")
    with one_line(folder, "generation settings"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def load_model(
    name: str | Path, model_class: type | None = None, **options: Any
) -> "PreTrainedModel":
    """Load a model with all of its weights; the default class is AutoModelForCausalLM.

    Raises ValueError that names the tensors that are missing or have another shape than the
    configuration says. Tensors without a place in the model are told.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    # quantization_config=None would replace that of the files and read packed weights as others.
    options = {key: value for key, value in options.items() if value is not None}
    gguf = options.get("gguf_file")
    found = check_files(name, *((gguf,) if gguf else (CONFIG,)))
    stored = set() if gguf else check_weights(name)
    # Under ZeRO-3 all ranks load together, and only rank 0 sees the shapes in the files.
    zero3 = is_deepspeed_zero3_enabled()
    together = raise_on_all_ranks() if zero3 else contextlib.nullcontext()
    with together, one_line(name, "model"), no_load_report():
        model, info = (model_class or AutoModelForCausalLM).from_pretrained(
            name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by check_loaded
            **found,
            **options,
        )
    if zero3 and not getattr(model, "is_quantized", False):
        info["unexpected_keys"] |= without_place(model, stored)  # Transformers does not look
    check_loaded(str(name), info)
    return model


def without_place(model: "PreTrainedModel", stored: set[str]) -> set[str]:
    """The names of stored tensors that Transformers maps to no tensor of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes, own = get_model_conversion_mapping(model), model.state_dict()
    kinds = [[c for c in changes if isinstance(c, t)] for t in (WeightRenaming, WeightConverter)]
    options = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": own}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return {
        name
        for name in stored
        if rename_source_key(name, *kinds, **options)[0] not in own
        and not any(re.search(pattern, name) for pattern in ignored)
    }


def read_adapter_config(name: str | Path) -> "PeftConfig":
    """Load the configuration of a PEFT adapter. Raises ValueError if it is damaged."""
    from peft import PeftConfig

    check_files(name, ADAPTER_CONFIG)
    with one_line(name, "adapter configuration"):
        return PeftConfig.from_pretrained(name)


def load_adapter(
    model: "PreTrainedModel", name: str | Path, device: "torch.device | str"
) -> "PeftModel":
    """Put the adapter of a folder on a model.

    Raises ValueError that names tensors that the adapter lacks or that have no place in the model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    check_files(name, ADAPTER_CONFIG)
    check_weights(name)
    base = set(model.state_dict())  # an adapter may repeat weights of its base
    file = Path(name) / "adapter_model.safetensors"
    stored = set(safetensors_header(file)[0]) if file.is_file() else None
    with one_line(name, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below
        loaded = PeftModel.from_pretrained(model, name, torch_device=str(device))
    if stored is not None:
        wanted = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
        check_names(f"{name}: the adapter", wanted - stored, "lacks")
        plain = {key: key.replace(".base_layer.", ".") for key in stored - wanted}
        unknown = {
            key for key, own in plain.items() if own.removeprefix("base_model.model.") not in base
        }
        check_names(f"{name}: the model has no place for", unknown, "")
    return loaded


def model_folder(name: str, weights: bool = True) -> Path:
    """The folder `name`, or that of a hub model's files in the cache; what is missing is fetched.

    Every process may call it: one per cache downloads a file, and the others wait for its lock, as
    long as it takes. With `weights` the process then reads the model without asking the hub again.
    Raises ValueError if the files cannot be had.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    if check_files(name, CONFIG)["local_files_only"]:
        folder = Path(str(try_to_load_from_cache(name, CONFIG))).parent
    else:
        folder = fetch(name, None, HUB_FILES, IN_FOLDERS)
        if weights:
            fetch_weights(name, folder)
    if weights:
        check_weights(folder)
        FETCHED.add(name)
    return folder


def fetch_weights(name: str, folder: Path) -> None:
    """Fetch the files of weights that Transformers would read, into a model's folder in the cache.

    Its index must be there. Raises ValueError if they cannot be fetched.
    """
    for single, index in zip(WEIGHTS, INDICES, strict=False):
        files = [single]
        if (folder / index).is_file():
            files = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
        fetch(name, folder.name, files)
        if all((folder / file).is_file() for file in files):
            return


def fetch(
    name: str, revision: str | None, files: list[str], without: list[str] | None = None
) -> Path:
    """Fetch the files of a hub model that match the patterns `files`, and none of `without`.

    Returns their folder in the cache. Raises ValueError if they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    with one_line(name, "files"):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=without
            )
        )


def check_template_syntax(template: str | dict | None, origin: str) -> None:
    """Raise ValueError with the line if a chat template is not valid Jinja.

    `template` may also be a dict of several templates by name.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for text in template.values() if isinstance(template, dict) else [template]:
        try:
            if text is not None:
                _compile_jinja_template(text)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{origin}: the chat template has a syntax error in line {error.lineno}: "
                f"{error.message}; wanted a Jinja template"
            ) from error


def check_loaded(name: str, info: dict[str, Any]) -> None:
    """Raise ValueError for missing and mis-shaped tensors; tell those that have no place.

    `info` is what from_pretrained returns with output_loading_info=True. Tied tensors are not in
    it.
    """
    shapes = {
        f"{key} (found {tuple(found)}; wanted {tuple(wanted)})"
        for key, found, wanted in info["mismatched_keys"]
    }
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    check_names(f"{name}: its files have the wrong shapes for", shapes, "")
    check_names(f"{name}: its files", set(info["missing_keys"]) - mismatched, "lack")
    tell_unread(name, info["unexpected_keys"])


def check_names(subject: str, names: set[str], verb: str) -> None:
    """Raise ValueError if there are any names of tensors: "subject verb N tensors: names"."""
    if names:
        count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        found = " ".join(filter(None, (subject, verb, count)))
        raise ValueError(
            f"{found}: {some(names)}; wanted all tensors of the configuration in their shapes: "
            "save or fetch the model again"
        )


def tell_unread(name: str | Path, names: Iterable[str]) -> None:
    """Print a note about tensors in a model's files that the model has no place for."""
    names = [key for key in names if not key.endswith(COMPUTED)]
    if names:
        count = f"{len(names)} tensors were" if len(names) > 1 else "1 tensor was"
        print_rank0(
            f"note: {name}: {count} not read, because the model has no such parameter: "
            f"{some(names)}"
        )


def some(names: Iterable[str]) -> str:
    """The first few of the sorted names, and dots for the rest."""
    names = sorted(names)
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


@contextlib.contextmanager
def no_load_report() -> Iterator[None]:
    """Hide Transformers' table of missing and unexpected tensors: check_loaded tells them."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextlib.contextmanager
def one_line(name: str | Path, what: str) -> Iterator[None]:
    """Raise a ValueError of one line for the errors of a library that reads a user's files.

    A lack of memory stays what it is.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    mistakes = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError)
    try:
        yield
    except (*mistakes, SafetensorError, StrictDataclassError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not ("size mismatch" in text or "convers" in text):
            raise
        if "custom code" in text:
            raise ValueError(
                f"{name}: its {what} needs code of its own (auto_map), which is never run here; "
                "wanted an architecture of Transformers"
            ) from error
        if "size mismatch" in text:  # the first line of PyTorch's list names no tensor
            text = text[text.index("size mismatch") :]
        raise ValueError(f"{name}: cannot load its {what} ({first_line(error, text)})") from error
