"""Sample texts for TensorBoard: what student and teacher write after the same held-out prompts.

Greedy decoding, one forward of the wrapped models per token, without a key-value cache: every rank
runs equally many forwards, as ZeRO-3 requires, and a few short rows take little time.
B batch, T tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Trainer

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.models.heads import LossInputs, argmax_ids
from kd.teachers.live import LiveTeacher

PROMPT_TOKENS = 256  # of a longer prompt, the last ones
TEXT_TOKENS = 32  # the prompt of plain text, which has none

NextTokens = Callable[[dict[str, Tensor]], Tensor]  # a batch with one target per row -> (B,) ids


class Samples:
    """Log a table of held-out prompts with each model's text, at every evaluation.

    `prompts` is the number of prompts, `tokens` the length of a text.
    """

    def __init__(
        self, trainer: Trainer, teacher: object, vocab_size: int, prompts: int, tokens: int
    ) -> None:
        self.trainer, self.teacher, self.vocab_size = trainer, teacher, vocab_size
        self.prompts, self.tokens = prompts, tokens
        self.teacher_texts: list[str] | None = None  # the same at every evaluation

    @torch.no_grad()
    def log(self) -> None:
        """Collective: generate the texts and log the table; the wrapped student is in eval mode."""
        rows, trainer = self.trainer.eval_dataset, self.trainer
        count = min(self.prompts, len(rows or ()))
        if not count:
            return
        prompts = [prompt_of(rows[i * len(rows) // count][0]) for i in range(count)]
        columns = {"student" if self.teacher else "model": self.texts(self.student_token, prompts)}
        if isinstance(self.teacher, LiveTeacher):  # a cached teacher cannot generate
            self.teacher_texts = self.teacher_texts or self.texts(self.teacher_token, prompts)
            columns["teacher"] = self.teacher_texts
        decoded = [trainer.processing_class.decode(ids) for ids in prompts]
        trainer.log({"eval_samples": markdown_table({"beginning": decoded} | columns)})

    def texts(self, next_tokens: NextTokens, prompts: list[list[int]]) -> list[str]:
        """One model's texts after `prompts`."""
        ends = self.trainer.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        generated = decode_greedily(next_tokens, prompts, self.tokens, ends)
        return [self.trainer.processing_class.decode(ids) for ids in generated]

    def student_token(self, batch: dict[str, Tensor]) -> Tensor:
        """The student's most likely next token of each row: (B,) ids."""
        batch = self.trainer._prepare_inputs(batch)
        return self.trainer.model_wrapped(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            loss_inputs=LossInputs(batch["labels"], None, self.vocab_size),
        )

    def teacher_token(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's most likely next token of each row: (B,) ids."""
        with self.teacher.batch_outputs(self.trainer._prepare_inputs(batch)) as (outputs, _):
            return argmax_ids(outputs.hidden, outputs.head, self.vocab_size)


def prompt_of(row: EncodedRow) -> list[int]:
    """The ids before the first target; of plain text, the first TEXT_TOKENS ids."""
    first = int(row.target_mask.argmax())  # 0 without a target
    ids = row.input_ids[:first][-PROMPT_TOKENS:] if first > 1 else row.input_ids[:TEXT_TOKENS]
    return ids.tolist()


def decode_greedily(
    next_tokens: NextTokens, prompts: list[list[int]], tokens: int, ends: set[int]
) -> list[list[int]]:
    """Extend each prompt by its `tokens` most likely tokens; cut before the first of `ends`."""
    texts = [list(ids) for ids in prompts]
    for _ in range(tokens):
        for ids, token in zip(texts, next_tokens(next_token_batch(texts)).tolist(), strict=True):
            ids.append(token)
    generated = [ids[len(start) :] for ids, start in zip(texts, prompts, strict=True)]
    stops = [next((i for i, token in enumerate(ids) if token in ends), tokens) for ids in generated]
    return [ids[:stop] for ids, stop in zip(generated, stops, strict=True)]


def next_token_batch(texts: list[list[int]]) -> dict[str, Tensor]:
    """A right-padded (B, T) batch in the collator's format; its one target per row comes next."""
    width = max(map(len, texts)) + 1
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    labels = torch.full((len(texts), width), IGNORE_INDEX)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        labels[i, len(text)] = 0  # any id: only the position counts
    positions = torch.arange(width).expand(len(texts), width)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def markdown_table(columns: dict[str, list[str]]) -> str:
    """Render columns as Markdown, which TensorBoard's text page displays."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(map(escape_cell, line)) + " |" for line in lines)


def escape_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    for mark, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(mark, escaped)
    return text or "(nothing)"
