"""Filter answers into training rows: a pure function of the samples, raw.jsonl and rewards.jsonl.

No row contains the hidden system prompt or text of the evaluation data.
"""

import json
from collections.abc import Iterator

from kd.data.near_duplicates import NearDuplicates, Overlap, repeated_share
from kd.generation.decontamination import is_contaminated
from kd.generation.filter_report import FilterReport
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


def training_rows(
    samples: list[Sample],
    raw: dict[str, dict],
    settings: FilterSettings | None = None,
    rewards: dict[str, float] | None = None,
    evaluation: Overlap | None = None,
) -> tuple[list[dict], FilterReport]:
    """Rows {"messages": [...]} in the order of `samples`, without the hidden system prompt.

    `raw` maps sample keys to answers, `rewards` to rewards if there is a reward model. Raises
    ValueError if no row is left.
    """
    settings, evaluation = settings or FilterSettings(), evaluation or Overlap([])
    report = FilterReport(samples=len(samples))
    valid = list(valid_samples(samples, raw, settings, evaluation, report))
    if settings.reward_model:
        valid = filter_by_reward(valid, rewards or {}, settings, report)
    near = None
    if settings.near_duplicate_similarity:
        near = NearDuplicates(settings.near_duplicate_similarity)
    rows, seen = [], set()
    for sample in valid:
        answer = raw[sample.key]["answer"]
        text = json.dumps(with_answer(sample, answer))
        if text in seen:
            report.duplicate += 1
            continue
        seen.add(text)
        if near and near.seen(f"{sample.prompt.messages[-1]['content']}\n{answer}"):
            report.near_duplicate += 1
            continue
        if settings.rationales:
            reasoning, _ = split_rationale(answer, settings.answer_marker)
            report.rationale_characters += len(reasoning)
            rows.append(task_row(sample.prompt.messages, RATIONALE, reasoning))
        else:
            rows.append({"messages": with_answer(sample, answer)})
    report.kept = len(rows)
    if not rows:
        raise ValueError(
            f"no training row is left ({report}). Look at raw.jsonl. If all answers are truncated, "
            "raise max_new_tokens; the model may also never emit its end token"
        )
    if settings.rationales:
        rows += label_rows(samples, settings, evaluation, report)
    return rows, report


def valid_samples(
    samples: list[Sample],
    raw: dict[str, dict],
    settings: FilterSettings,
    evaluation: Overlap,
    report: FilterReport,
) -> Iterator[Sample]:
    """Yield the samples that pass every filter on a single answer; count the others in `report`."""
    hidden = {s.config.get("system_prompt") for s in samples} - {None}
    overlap_with = {text: Overlap([text]) for text in hidden}
    for sample in samples:
        found, secret = raw.get(sample.key), sample.config.get("system_prompt")
        if found is None:
            report.failed += 1
        elif not found["stopped"]:
            report.cut += 1
        elif not found["answer"].strip():
            report.empty += 1
        elif secret and quotes(found["answer"], secret, overlap_with[secret]):
            report.leaked += 1
        elif settings.max_repetition and repeated_share(found["answer"]) > settings.max_repetition:
            report.repetitive += 1
        elif is_contaminated(with_answer(sample, found["answer"]), evaluation):
            report.evaluation += 1
        elif settings.rationales and (
            (parts := split_rationale(found["answer"], settings.answer_marker)) is None
        ):
            report.no_conclusion += 1
        elif settings.rationales and not same_answer(parts[1], _gold(sample, settings)):
            report.wrong += 1
        else:
            yield sample


def quotes(answer: str, hidden: str, overlap: Overlap) -> bool:
    """Whether an answer quotes the hidden system prompt, which a student must not learn to do."""
    return hidden.strip().lower() in answer.lower() or overlap.found_in(answer)


def with_answer(sample: Sample, answer: str) -> list[dict]:
    """The prompt's messages followed by the answer."""
    return [*sample.prompt.messages, {"role": "assistant", "content": answer}]


def filter_by_reward(
    samples: list[Sample], rewards: dict[str, float], settings: FilterSettings, report: FilterReport
) -> list[Sample]:
    """Keep samples that reach min_reward and rank among their prompt's keep_best, in order."""
    if settings.min_reward is not None:
        sufficient = [s for s in samples if rewards[s.key] >= settings.min_reward]
        report.low_reward += len(samples) - len(sufficient)
        samples = sufficient
    if settings.keep_best is None:
        return samples
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt.id, []).append(sample)
    best = set()
    for group in by_prompt.values():
        ranked = sorted(group, key=lambda s: -rewards[s.key])  # stable: the first of equals wins
        best.update(s.key for s in ranked[: settings.keep_best])
    report.not_best += len(samples) - len(best)
    return [s for s in samples if s.key in best]


def label_rows(
    samples: list[Sample], settings: FilterSettings, evaluation: Overlap, report: FilterReport
) -> list[dict]:
    """A row with the gold answer for every prompt, whether or not the teacher was right."""
    rows = []
    for sample in samples:
        gold = _gold(sample, settings)
        if sample.index or is_contaminated(with_answer(sample, gold), evaluation):
            continue
        report.label_characters += len(gold) * settings.label_copies
        rows += [task_row(sample.prompt.messages, LABEL, gold)] * settings.label_copies
    report.label_rows = len(rows)
    return rows


def _gold(sample: Sample, settings: FilterSettings) -> str:
    return gold_answer(sample.prompt.gold, settings.gold_marker)
