"""Raw answers to training rows: a pure function of raw.jsonl, rewards.jsonl and the samples wanted.

The hidden system prompt is in no row, and no prompt of the evaluation data.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kd.data.conversations import Fields
from kd.data.near_duplicates import NearDuplicates, Overlap, repeated_share
from kd.data.sources import source_rows
from kd.generation.rationales import (
    LABEL,
    RATIONALE,
    gold_answer,
    same_answer,
    split_rationale,
    task_row,
)
from kd.generation.sampling import Sample
from kd.settings.generation import FilterSettings


@dataclass
class FilterReport:
    """What happened to the samples; printed, and left in done.json."""

    samples: int = 0
    kept: int = 0
    failed: int = 0
    cut: int = 0
    empty: int = 0
    leaked: int = 0
    repetitive: int = 0
    no_conclusion: int = 0
    wrong: int = 0
    evaluation: int = 0
    low_reward: int = 0
    not_best: int = 0
    duplicate: int = 0
    near_duplicate: int = 0
    label_rows: int = 0
    label_characters: int = 0
    rationale_characters: int = 0

    def __str__(self) -> str:
        told = {
            "failed": "without an answer",
            "cut": "cut at max_new_tokens",
            "empty": "empty",
            "leaked": "quoting the hidden system prompt",
            "repetitive": "repetitive",
            "no_conclusion": "rationales without a conclusion",
            "wrong": "with another conclusion than the gold answer",
            "evaluation": "overlapping with the evaluation data",
            "low_reward": "below min_reward",
            "not_best": "beside their prompt's keep_best",
            "duplicate": "exact duplicates",
            "near_duplicate": "near-duplicates",
        }
        counts = asdict(self)
        always = ("cut", "empty", "duplicate")
        dropped = [f"{counts[k]} {v}" for k, v in told.items() if counts[k] or k in always]
        text = f"samples: {self.samples}, kept {self.kept}; dropped {', '.join(dropped)}"
        if self.label_rows:
            text += (
                f"\ntasks: {self.label_rows} label rows with {self.label_characters} characters "
                f"of answers, {self.kept} rationale rows with {self.rationale_characters}"
            )
        return text


def evaluation_texts(sources: list[dict], seed: int) -> list[str]:
    """What the models will be asked in an evaluation: user messages, prompt, turns, instruction."""

    def convert(raw: dict, source: dict, place: str) -> dict:
        get = Fields(raw, source)
        for key in ("messages", "conversations"):
            if get[key] is not None:
                messages = get.messages(key, place)
                return {"texts": [m["content"] for m in messages if m["role"] == "user"]}
        for key in ("prompt", "turns", "instruction", "question"):
            found = get[key]
            texts = found if isinstance(found, list) else [found]
            if found and all(isinstance(text, str) for text in texts):
                return {"texts": texts}
        raise ValueError(
            f"{place}: fields {sorted(raw)}; wanted messages, prompt, turns, instruction or "
            "question (columns: {prompt: its_name} maps other names)"
        )

    rows = [row for source in sources for row in source_rows(source, seed, convert)]
    return [text for row in rows for text in row["texts"]]


def overlaps(messages: list[dict], evaluation: Overlap) -> bool:
    return any(evaluation.found_in(message["content"]) for message in messages)


def quotes(answer: str, hidden: str, runs: Overlap) -> bool:
    """Some teachers recite their system prompt; a student must not learn to."""
    return hidden.strip().lower() in answer.lower() or runs.found_in(answer)


def with_answer(sample: Sample, answer: str) -> list[dict]:
    return [*sample.question.prompt, {"role": "assistant", "content": answer}]


def candidates(
    samples: list[Sample],
    raw: dict[str, dict],
    settings: FilterSettings,
    evaluation: Overlap,
    report: FilterReport,
) -> Iterator[Sample]:
    """The samples whose answers are good by themselves; the others are counted in `report`."""
    hidden = {s.config.get("system_prompt") for s in samples} - {None}
    prompts = {text: Overlap([text]) for text in hidden}
    for sample in samples:
        found, secret = raw.get(sample.key), sample.config.get("system_prompt")
        if found is None:
            report.failed += 1
        elif not found["stopped"]:
            report.cut += 1
        elif not found["answer"].strip():
            report.empty += 1
        elif secret and quotes(found["answer"], secret, prompts[secret]):
            report.leaked += 1
        elif settings.max_repetition and repeated_share(found["answer"]) > settings.max_repetition:
            report.repetitive += 1
        elif overlaps(with_answer(sample, found["answer"]), evaluation):
            report.evaluation += 1
        elif settings.rationales and (parts := _parts(sample, found, settings)) is None:
            report.no_conclusion += 1
        elif settings.rationales and not same_answer(parts[1], _gold(sample, settings)):
            report.wrong += 1
        else:
            yield sample


def training_rows(
    samples: list[Sample],
    raw: dict[str, dict],
    settings: FilterSettings | None = None,
    rewards: dict[str, float] | None = None,
    evaluation: Overlap | None = None,
) -> tuple[list[dict], FilterReport]:
    """Rows {"messages": [...]} in the order of `samples`, without the hidden system prompt.

    `rewards` by sample key, where there is a reward model. Raises ValueError where no row is left.
    """
    settings, evaluation = settings or FilterSettings(), evaluation or Overlap([])
    report = FilterReport(samples=len(samples))
    good = list(candidates(samples, raw, settings, evaluation, report))
    if settings.reward_model:
        good = rewarded(good, rewards or {}, settings, report)
    near = None
    if settings.near_duplicate_similarity:
        near = NearDuplicates(settings.near_duplicate_similarity)
    rows, seen = [], set()
    for sample in good:
        answer = raw[sample.key]["answer"]
        text = json.dumps(with_answer(sample, answer))
        if text in seen:
            report.duplicate += 1
            continue
        seen.add(text)
        if near and near.seen(f"{sample.question.prompt[-1]['content']}\n{answer}"):
            report.near_duplicate += 1
            continue
        if settings.rationales:
            reasoning, _ = _parts(sample, raw[sample.key], settings)
            report.rationale_characters += len(reasoning)
            rows.append(task_row(sample.question.prompt, RATIONALE, reasoning))
        else:
            rows.append({"messages": with_answer(sample, answer)})
    report.kept = len(rows)
    if not rows:
        raise ValueError(
            f"no training row is left ({report}). Look at raw.jsonl; where all are cut, raise "
            "max_new_tokens, or the model has not learnt to stop"
        )
    if settings.rationales:
        rows += label_rows(samples, settings, evaluation, report)
    return rows, report


def rewarded(
    samples: list[Sample], rewards: dict[str, float], settings: FilterSettings, report: FilterReport
) -> list[Sample]:
    """Those that score enough and are among the best of their prompt, in their old order."""
    if settings.min_reward is not None:
        enough = [s for s in samples if rewards[s.key] >= settings.min_reward]
        report.low_reward += len(samples) - len(enough)
        samples = enough
    if settings.keep_best is None:
        return samples
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.question.id, []).append(sample)
    best = set()
    for group in by_prompt.values():
        # Of equal rewards the first sample: sorting keeps the order.
        ordered = sorted(group, key=lambda s: -rewards[s.key])
        best.update(s.key for s in ordered[: settings.keep_best])
    report.not_best += len(samples) - len(best)
    return [s for s in samples if s.key in best]


def label_rows(
    samples: list[Sample], settings: FilterSettings, evaluation: Overlap, report: FilterReport
) -> list[dict]:
    """A row with the gold answer for every question, also where the teacher was wrong."""
    rows = []
    for sample in samples:
        gold = _gold(sample, settings)
        if sample.index or overlaps(with_answer(sample, gold), evaluation):
            continue
        report.label_characters += len(gold) * settings.label_copies
        rows += [task_row(sample.question.prompt, LABEL, gold)] * settings.label_copies
    report.label_rows = len(rows)
    return rows


def _parts(sample: Sample, found: dict, settings: FilterSettings) -> tuple[str, str] | None:
    return split_rationale(found["answer"], settings.answer_marker)


def _gold(sample: Sample, settings: FilterSettings) -> str:
    return gold_answer(sample.question.gold, settings.gold_marker)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Written aside and renamed, so that the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.rename(path)
