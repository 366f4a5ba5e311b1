"""What a judge's result file says about its settings, and what the terminal shows of it."""

from dataclasses import asdict
from pathlib import Path

from kd.distributed import print_rank0
from kd.evaluation.judge.judgements import Answers, Judge, Judgement
from kd.evaluation.judge.questions import Question
from kd.evaluation.models import fingerprint
from kd.generation.records import digest
from kd.settings.judge import JudgeSettings


def describe_judgements(
    settings: JudgeSettings,
    judge: Judge,
    questions: list[Question],
    references: Answers,
    judgements: list[Judgement],
) -> dict:
    """Everything that the numbers of one model depend on."""
    name = judgements[0].model
    path = settings.named_models.get(name)
    return {
        "model": path or settings.named_answers[name],
        "model_files_hash": fingerprint(path) if path else None,
        "benchmark": settings.benchmark,
        "mode": settings.mode,
        "judge": settings.judge,
        "verdict": settings.verdict if settings.mode == "pair" else "text",
        "orders": settings.orders if settings.mode == "pair" else None,
        "baseline": settings.baseline,
        "questions_hash": digest([asdict(question) for question in questions])[:16],
        "references_hash": digest(references)[:16],
        "prompts_hash": digest(judge.prompts)[:16],
        "judgements_hash": digest(sorted(judgement.key for judgement in judgements))[:16],
        "max_new_tokens": settings.max_new_tokens if path else None,
        "dtype": settings.weights_dtype if path else None,
        "seed": settings.seed if path else None,
        "instruction_difficulty": settings.instruction_difficulty,
    }


def print_result(name: str, result: dict, file: Path) -> None:
    """Print mean grade or win rate, by turn, and for pairs ties, length control, consistency."""
    overall = result["overall"]
    mean = "no verdict" if overall["mean"] is None else f"{overall['mean']:.4g}"
    kind = "win rate" if "consistency" in result else "mean grade"
    turns = ", ".join(
        f"turn {turn} {found['mean']:.4g}"
        for turn, found in result["turns"].items()
        if found["mean"] is not None
    )
    print_rank0(
        f"{name}: {kind} {mean} over {overall['n']} ({turns}); without a verdict: "
        f"{overall['without_verdict']}"
    )
    if "consistency" in result:
        controlled, same = result["length_controlled_win_rate"], result["consistency"]
        print_rank0(
            f"{name}: ties {result['ties']}; length-controlled win rate "
            + ("not computed: too few judgements" if controlled is None else f"{controlled:.4g}")
            + ("" if same is None else f"; {same:.1%} of the pairs have one winner in both orders")
        )
    print_rank0(f"wrote {file}")
