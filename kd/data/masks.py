"""Rows to token ids and a target mask: what the loss is taken on.

Chat: every assistant turn with its end-of-turn token, nothing else. Plain text: every token, and an
end-of-sequence token behind it. The first token of a row is never a target: nothing precedes it.
"""

from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers and PyTorch leave out


@dataclass(frozen=True)
class EncodedRow:
    input_ids: list[int]
    labels: list[int]  # input_ids at targets, IGNORED elsewhere; not shifted

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass
class EncodingReport:
    """What happened to the rows; printed before training."""

    read: int = 0
    kept: int = 0
    without_target: int = 0
    cut: int = 0
    tokens: int = 0
    targets: int = 0

    def __str__(self) -> str:
        return (
            f"rows: {self.read} read, {self.kept} kept, {self.without_target} dropped without a "
            f"target, {self.cut} cut at max_length; {self.tokens} tokens, {self.targets} targets"
        )


def encode_rows(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
) -> tuple[list[EncodedRow], EncodingReport]:
    """Encode rows of `kd.data.sources`; rows without any target are dropped and counted.

    Raises ValueError where no row is left, or a chat row meets a tokenizer without a template.
    """
    if tokenizer.chat_template is None and any("messages" in row for row in rows):
        raise ValueError(
            f"{tokenizer.name_or_path}: no chat template, and the data has chat rows; give "
            "chat_template: a file with one"
        )
    encoded, report = [], EncodingReport(read=len(rows))
    texts = encode_texts([row["text"] for row in rows if "text" in row], tokenizer)
    for row in tqdm(rows, desc="tokenising", unit="row", disable=not progress):
        ids, mask = next(texts) if "text" in row else encode_chat(row["messages"], tokenizer)
        report.cut += len(ids) > max_length
        ids, mask = ids[:max_length], mask[:max_length]
        mask[0] = False
        row = EncodedRow(ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)])
        if not row.targets:
            report.without_target += 1
            continue
        report.tokens += len(row)
        report.targets += row.targets
        encoded.append(row)
    report.kept = len(encoded)
    if not encoded:
        raise ValueError(f"no row with a target token is left ({report})")
    return encoded, report


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase):
    """(ids, mask) of every text, all encoded in one call; every token is a target."""
    batch = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    for ids in batch:
        # Where pad is eos it is still a real token here: the mask, not the id, tells padding.
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, [True] * len(ids)


def encode_chat(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and True at the tokens of assistant turns, end-of-turn included.

    A template with generation markers tells its assistant tokens itself; for others a turn is what
    the conversation up to it has more than the conversation before it with the generation prompt.
    Raises ValueError where the template does not write conversations from left to right.
    """
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
    full = render(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:i], tokenizer, add_generation_prompt=True)
        through = render(messages[: i + 1], tokenizer)
        if not (through.startswith(before) and full.startswith(through.rstrip())):
            raise ValueError(
                "the chat template rewrites earlier turns, so assistant tokens cannot be told "
                "apart; give chat_template: a file with {% generation %} markers around them"
            )
        spans.append((len(before), len(through.rstrip())))  # a newline after the end token is none
    out = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [
        any(start < right and end > left for left, right in spans) and end > start
        for start, end in out["offset_mapping"]
    ]
    return list(out["input_ids"]), inside


def render(messages: list[dict], tokenizer: PreTrainedTokenizerBase, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
