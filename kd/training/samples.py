"""What student and teacher write after the same beginnings, to be read beside each other.

One greedy token a forward of the wrapped models, without a cache: equally many forwards on every
rank, as ZeRO-3 needs, and a few short rows are soon done. B rows, T tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.models.heads import LossInputs, most_probable
from kd.teachers.live import LiveTeacher

PROMPT_TOKENS = 256  # of a longer beginning the end is kept
TEXT_TOKENS = 32  # a row without a prompt, plain text, begins with these

NextTokens = Callable[[dict[str, Tensor]], Tensor]  # a batch with one target a row -> (B,) ids


class Samples:
    """Logs a table of `prompts` held-out beginnings with what the models write after each."""

    def __init__(self, trainer, prompts: int, tokens: int) -> None:
        self.trainer, self.prompts, self.tokens = trainer, prompts, tokens
        self.by_teacher: list[str] | None = None  # which never changes

    @torch.no_grad()
    def log(self) -> None:
        """Every rank must call it; the wrapped student is in eval mode."""
        rows, trainer = self.trainer.eval_dataset, self.trainer
        count = min(self.prompts, len(rows or ()))
        if not count:
            return
        begun = [beginning(rows[i * len(rows) // count][0]) for i in range(count)]
        columns = {"student" if trainer.teacher else "model": self.texts(self.student, begun)}
        if isinstance(trainer.teacher, LiveTeacher):  # a cached one cannot write
            self.by_teacher = self.by_teacher or self.texts(self.teacher, begun)
            columns["teacher"] = self.by_teacher
        beginnings = [trainer.processing_class.decode(ids) for ids in begun]
        trainer.log({"eval_samples": table({"beginning": beginnings} | columns)})

    def texts(self, next_tokens: NextTokens, begun: list[list[int]]) -> list[str]:
        ends = self.trainer.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        written = write_on(next_tokens, begun, self.tokens, ends)
        return [self.trainer.processing_class.decode(ids) for ids in written]

    def student(self, batch: dict[str, Tensor]) -> Tensor:
        batch = self.trainer._prepare_inputs(batch)
        return self.trainer.model_wrapped(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            loss_inputs=LossInputs(batch["labels"], None, self.trainer.vocabulary),
        )

    def teacher(self, batch: dict[str, Tensor]) -> Tensor:
        with self.trainer.teacher.signal(self.trainer._prepare_inputs(batch)) as (signal, _):
            return most_probable(signal.hidden, signal.head, self.trainer.vocabulary)


def beginning(row: EncodedRow) -> list[int]:
    """What stands before the first target."""
    first = next((i for i, label in enumerate(row.labels) if label != IGNORE_INDEX), 0)
    return row.input_ids[:first][-PROMPT_TOKENS:] if first > 1 else row.input_ids[:TEXT_TOKENS]


def write_on(
    next_tokens: NextTokens, begun: list[list[int]], tokens: int, ends: set[int]
) -> list[list[int]]:
    """The `tokens` that are most probable after each of `begun`, up to the first of `ends`."""
    texts = [list(ids) for ids in begun]
    for _ in range(tokens):
        for ids, token in zip(texts, next_tokens(last_positions(texts)).tolist(), strict=True):
            ids.append(token)
    written = [ids[len(start) :] for ids, start in zip(texts, begun, strict=True)]
    stops = [next((i for i, token in enumerate(ids) if token in ends), tokens) for ids in written]
    return [ids[:stop] for ids, stop in zip(written, stops, strict=True)]


def last_positions(texts: list[list[int]]) -> dict[str, Tensor]:
    """Right-padded (B, T) rows as the collator makes them, whose one target is what comes next."""
    width = max(map(len, texts)) + 1
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    labels = torch.full((len(texts), width), IGNORE_INDEX)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        labels[i, len(text)] = 0  # some id: only its place counts
    positions = torch.arange(width).expand(len(texts), width)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def table(columns: dict[str, list[str]]) -> str:
    """Markdown, as TensorBoard's text page shows it."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(text: str) -> str:
    for mark, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "<br>")):
        text = text.replace(mark, escaped)
    return text or "(nothing)"
