"""Load and compare tokenizers; the tokens that end an answer."""

import re
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kd.data.template import render, with_arguments
from kd.data.tokenizer_file import check_tokenizer
from kd.pretrained import check_template_syntax, read_tokenizer

PROBE = (
    "Caf\u00e9 1234567, don't  stop;\n\tif x:\n        "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d"
)


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name or folder; `chat_template` is a file that replaces its own.

    Raises ValueError if it has no end-of-sequence token, or if it does not read text.
    """
    tokenizer = read_tokenizer(name)
    check_tokenizer(name, tokenizer)
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text()
        check_template_syntax(tokenizer.chat_template, chat_template)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name}: the tokenizer has no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so no EOS is hidden
    return tokenizer


def set_template_arguments(tokenizer: PreTrainedTokenizerBase, arguments: dict) -> None:
    """Set variables of the chat template; they are saved with the tokenizer.

    Raises ValueError if there is not exactly one template, or if it does not read a variable.
    """
    if not arguments:
        return
    template = tokenizer.chat_template
    if not isinstance(template, str):
        found = "no chat template" if template is None else "several chat templates"
        raise ValueError(f"template_arguments: {tokenizer.name_or_path} has {found}; wanted one")
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"template_arguments: {name}: the chat template of {tokenizer.name_or_path} does "
                "not read it; wanted one of its variables"
            )
    tokenizer.chat_template = with_arguments(template, arguments)


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError if the tokenizers differ, with the first different id or tokenization."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        cuts = [tokenizer(PROBE)["input_ids"] for tokenizer in (teacher, student)]
        if cuts[0] != cuts[1]:
            raise ValueError(
                f"teacher and student have the same vocabulary, but tokenize {PROBE!r} as "
                f"{cuts[0]} and {cuts[1]}: their merges or normalization differ; use the same "
                "tokenizer for both"
            )
        return
    by_id = {i: token for token, i in ours.items()}
    their_id = {i: token for token, i in theirs.items()}
    first = next(i for i in sorted(by_id | their_id) if by_id.get(i) != their_id.get(i))
    raise ValueError(
        f"teacher and student have different tokenizers: id {first} is "
        f"{their_id.get(first, 'absent')!r} for the teacher ({len(theirs)} tokens) and "
        f"{by_id.get(first, 'absent')!r} for the student ({len(ours)} tokens). Logits can only be "
        "compared over one vocabulary. With train/distill.py, set align_tokenizers: true, which "
        "aligns the texts by bytes; or choose a student of the teacher's family; or train the "
        "student on the teacher's text (train/generate.py, then train/sft.py)"
    )


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the special tokens that the chat template writes around messages."""
    if tokenizer.chat_template is None:
        return []
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(render(messages, tokenizer))["input_ids"]
    return sorted(set(ids) & special_ids(tokenizer))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: EOS and the template's end-of-turn token."""
    turn = turn_end(tokenizer)
    return sorted({tokenizer.eos_token_id} | ({turn} if turn is not None else set()))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the template writes after an assistant turn, or None."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    text = render(messages, tokenizer)
    after = text[text.rindex("answer") + len("answer") :]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all special tokens."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def generation_config(model, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the model's generation settings with every end token, so that generation stops."""
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    eos = config.eos_token_id
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    config.eos_token_id = sorted({*eos, *end_tokens(tokenizer)})
    config.pad_token_id = tokenizer.pad_token_id
    return config


def untrained_tokens(embedding: torch.Tensor, ids: list[int]) -> list[int]:
    """Return those of `ids` whose rows of `embedding` (V, H) appear never to have been trained.

    Such a row is tiny, or nearly equal to that of another of `ids`: the output layer pushes all
    unseen tokens the same way. See Land and Bartolo 2024, "Fishing for Magikarp", section 2.
    """
    rows = embedding[ids].float()  # (n, H)
    typical = embedding.float().norm(dim=-1).median()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    similarity = unit @ unit.T - 2 * torch.eye(len(ids), device=rows.device)
    twins = similarity.max(-1).values > 0.9 if len(ids) > 1 else torch.zeros(len(ids)).bool()
    untrained = (rows.norm(dim=-1) < 0.2 * typical) | twins
    return [i for i, flag in zip(ids, untrained.tolist(), strict=True) if flag]
