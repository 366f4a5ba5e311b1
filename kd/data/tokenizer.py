"""The tokenizer, what ends an answer, and whether teacher and student share one vocabulary."""

import re
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from kd.data.template import with_arguments

PROBE = "Caf\u00e9 1234567, don't  stop;\n\tif x:\n        \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d"


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or folder, with a template from a file where one is given."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text()
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-sequence token; set eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks come from lengths, so this hides no EOS
    return tokenizer


def set_template_arguments(tokenizer: PreTrainedTokenizerBase, arguments: dict) -> None:
    """Give the chat template its variables for good: they are saved with the tokenizer.

    Raises ValueError where the template does not read one of them.
    """
    if not arguments:
        return
    template = tokenizer.chat_template
    if not isinstance(template, str):
        found = "no chat template" if template is None else "several chat templates"
        raise ValueError(f"template_arguments: given, and {tokenizer.name_or_path} has {found}")
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"template_arguments: {name}: the chat template of {tokenizer.name_or_path} does "
                "not read it"
            )
    tokenizer.chat_template = with_arguments(template, arguments)


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError naming the first id that means another token, or a text cut differently."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        cuts = [tokenizer(PROBE)["input_ids"] for tokenizer in (teacher, student)]
        if cuts[0] != cuts[1]:
            raise ValueError(
                f"teacher and student have one vocabulary, but cut {PROBE!r} into {cuts[0]} and "
                f"{cuts[1]}: their merges or normalisation differ; use one tokenizer for both"
            )
        return
    by_id = {i: token for token, i in ours.items()}
    their_id = {i: token for token, i in theirs.items()}
    first = next(i for i in sorted(by_id | their_id) if by_id.get(i) != their_id.get(i))
    raise ValueError(
        f"teacher and student have different tokenizers: id {first} is "
        f"{their_id.get(first, 'absent')!r} for the teacher ({len(theirs)} tokens) and "
        f"{by_id.get(first, 'absent')!r} for the student ({len(ours)} tokens). Logits can only be "
        "compared over one vocabulary: for train/distill.py set align_tokenizers: true, which aligns "
        "the texts by bytes; or choose a student of the teacher's family, or train it on the teacher's text "
        "(train/generate.py, then train/sft.py)"
    )


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens that the chat template writes around the messages."""
    if tokenizer.chat_template is None:
        return []
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    return sorted(set(ids) & special_ids(tokenizer))


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: EOS, and what the template puts behind an assistant turn."""
    turn = turn_end(tokenizer)
    return sorted({tokenizer.eos_token_id} | ({turn} if turn is not None else set()))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the template puts behind an assistant turn, if it is one."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = text[text.rindex("answer") + len("answer") :]
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def generation_config(model, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The model's own settings with every end token, so that a saved student stops."""
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    own = config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    config.eos_token_id = sorted({*own, *end_tokens(tokenizer)})
    config.pad_token_id = tokenizer.pad_token_id
    return config


def untrained_tokens(embedding: torch.Tensor, ids: list[int]) -> list[int]:
    """Those of `ids` whose rows of `embedding` (V, H) look as if no text had ever trained them.

    Such rows are tiny, or all but equal to another special token's: the output layer pushes all
    unseen tokens the same way. See Land and Bartolo 2024, "Fishing for Magikarp", section 2.
    """
    rows = embedding[ids].float()  # (n, H)
    typical = embedding.float().norm(dim=-1).median()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    similarity = unit @ unit.T - 2 * torch.eye(len(ids), device=rows.device)
    twins = similarity.max(-1).values > 0.9 if len(ids) > 1 else torch.zeros(len(ids)).bool()
    untrained = (rows.norm(dim=-1) < 0.2 * typical) | twins
    return [i for i, flag in zip(ids, untrained.tolist(), strict=True) if flag]
