"""Counts of the samples that each filter dropped."""

from dataclasses import asdict, dataclass

DROPPED = {
    "failed": "without an answer",
    "cut": "truncated at max_new_tokens",
    "empty": "empty",
    "leaked": "quoting the hidden system prompt",
    "repetitive": "repetitive",
    "no_conclusion": "rationales without a conclusion",
    "wrong": "rationales with a conclusion other than the gold answer",
    "evaluation": "overlapping with the evaluation data",
    "low_reward": "below min_reward",
    "not_best": "ranked below their prompt's keep_best",
    "duplicate": "exact duplicates",
    "near_duplicate": "near-duplicates",
}
ALWAYS_SHOWN = ("cut", "empty", "duplicate")


@dataclass
class FilterReport:
    """Samples kept, and samples dropped by reason; printed and written to done.json."""

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
        counts = asdict(self)
        dropped = [
            f"{counts[key]} {reason}"
            for key, reason in DROPPED.items()
            if counts[key] or key in ALWAYS_SHOWN
        ]
        text = f"samples: {self.samples}, kept {self.kept}; dropped {', '.join(dropped)}"
        if self.label_rows:
            text += (
                f"\ntasks: {self.label_rows} label rows with {self.label_characters} characters of "
                f"answers, {self.kept} rationale rows with {self.rationale_characters} characters "
                "of reasoning"
            )
        return text
