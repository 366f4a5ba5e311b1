"""Put the results of eval/perplexity.py and eval/agreement.py into one report with plots.

python eval/report.py --results results --runs runs/distill-seed0 runs/distill-seed1 \
    --samples results/answers.jsonl

Models called NAME-seed0, NAME-seed1, ... are seeds of NAME. Written beside each other: report.md,
report.json with its numbers, and the plots.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from kd.evaluation.plots import find_histories, plot_bars, plot_curves
from kd.evaluation.report import read_samples, render
from kd.evaluation.results import write_text
from kd.evaluation.summary import NOT_RUN, read_results, summarise
from kd.evaluation.tables import plain_table, summary_rows
from kd.recipe import parse, require_file, setting
from kd.training.exit import run

BARS, CURVES = "perplexity_and_kl.png", "training_curves.png"


@dataclass
class ReportSettings:
    results: str = setting("results", "folder with perplexity/*.json and agreement/*.json")
    out: str | None = setting(None, "the report; RESULTS/report.md by default")
    runs: list[str] = field(
        default_factory=list, metadata={"help": "folders of the training runs, for their curves"}
    )
    samples: str | None = setting(None, "file of eval/answers.py")
    teacher: str = setting("teacher", "name of the teacher among the results")
    start: str = setting("start", "name of the student before training among the results")
    expected_order: list[str] = field(
        default_factory=list, metadata={"help": "settings, best first; the report says if found"}
    )

    def __post_init__(self) -> None:
        self.out = self.out or f"{self.results}/report.md"
        if not self.out.endswith(".md"):
            raise ValueError(f"out: {self.out}; wanted the name of a .md file")
        require_file("samples", self.samples)


def main() -> None:
    (settings,) = parse(ReportSettings, description=__doc__)
    samples = read_samples(settings.samples) if settings.samples else None
    results = read_results(settings.results)
    summary = summarise(results, settings.runs, settings.teacher, settings.start)
    histories = find_histories(settings.runs)
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    plots = {
        BARS: plot_bars(summary["settings"], out.parent / BARS),
        CURVES: plot_curves(histories, out.parent / CURVES),
    }
    write_text(out, render(summary, results, settings.expected_order, samples, plots, histories))
    curves = {name: str(state) if state else NOT_RUN for name, state in histories.items()}
    numbers = summary | {"curves": curves, "origin": results}
    write_text(out.with_suffix(".json"), json.dumps(numbers, indent=2) + "\n")
    print(plain_table(summary_rows(summary)))
    print(f"\nwrote {out}")


if __name__ == "__main__":
    run(main)
