"""Put all results of one or several runs into one report with plots.

python eval/report.py --results results --runs runs/distill-seed0 runs/distill-seed1 \
    --samples results/answers.jsonl

Read are the files of eval/perplexity.py, agreement.py, benchmarks.py, judge.py, open_answers.py and
speed.py under RESULTS; what was not measured stands there as "not run". Models called NAME-seed0, NAME-seed1, ... are seeds of NAME. Written beside each other: report.md,
report.json with its numbers, and the plots.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from kd.evaluation.report.comparison import compare
from kd.evaluation.report.items import read_metrics
from kd.evaluation.report.plots import find_histories, plot_bars, plot_curves, plot_trade_off
from kd.evaluation.report.report import read_samples, render
from kd.evaluation.report.summary import NOT_RUN, read_results, summarise
from kd.evaluation.report.tables import plain_table, summary_rows
from kd.evaluation.results import write_text
from kd.recipe import parse, require_file, setting
from kd.run.exit import run

BARS, CURVES, TRADE_OFF = "perplexity_and_kl.png", "training_curves.png", "size_and_speed.png"


@dataclass
class ReportSettings:
    results: list[str] = field(
        default_factory=lambda: ["results"], metadata={"help": "folders that measurements wrote"}
    )
    out: str | None = setting(None, "the report; report.md in the first of RESULTS by default")
    runs: list[str] = field(
        default_factory=list, metadata={"help": "folders of the training runs, for their curves"}
    )
    samples: str | None = setting(None, "file of eval/answers.py")
    teacher: str = setting("teacher", "name of the teacher among the results")
    start: str = setting("start", "name of the student before training among the results")
    trade_off: str | None = setting(
        None, "metric of the plot of quality against size and speed; the first that is there"
    )
    expected_order: list[str] = field(
        default_factory=list, metadata={"help": "settings, best first; the report says if found"}
    )

    def __post_init__(self) -> None:
        self.out = self.out or f"{self.results[0]}/report.md"
        if not self.out.endswith(".md"):
            raise ValueError(f"out: {self.out}; wanted the name of a .md file")
        require_file("samples", self.samples)


def main() -> None:
    (settings,) = parse(ReportSettings, description=__doc__)
    samples = read_samples(settings.samples) if settings.samples else None
    results = read_results(settings.results)
    metrics, files = read_metrics(settings.results)
    speeds = read_speeds(settings.results)
    if not files and not speeds:
        raise ValueError(
            f"results: no measurement in {', '.join(settings.results)}; run eval/perplexity.py, "
            "eval/agreement.py or another of eval/ with this out_dir first"
        )
    others = [*(m for metric in metrics.values() for m in metric.models), *speeds]
    summary = summarise(results, settings.runs, settings.teacher, settings.start, others)
    comparison = compare(metrics, summary["settings"], settings.teacher)
    histories = find_histories(settings.runs)
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files |= {result["file"]: result for result in speeds.values()}
    plots = {
        BARS: plot_bars(summary["settings"], out.parent / BARS),
        TRADE_OFF: draw_trade_off(settings, comparison, speeds, out.parent / TRADE_OFF),
        CURVES: plot_curves(histories, out.parent / CURVES),
    }
    text = render(
        summary,
        comparison,
        results,
        files,
        settings.expected_order,
        samples,
        plots,
        histories,
    )
    write_text(out, text)
    curves = {name: str(state) if state else NOT_RUN for name, state in histories.items()}
    numbers = summary | {"items": comparison, "curves": curves, "origin": without_items(files)}
    write_text(out.with_suffix(".json"), json.dumps(numbers, indent=2) + "\n")
    print(plain_table(summary_rows(summary)))
    print(f"\nwrote {out}")


def read_speeds(folders: list[str]) -> dict[str, dict]:
    """{model: the JSON of eval/speed.py, with the name of its file}."""
    files = [file for folder in folders for file in sorted(Path(folder).glob("speed/*.json"))]
    return {file.stem: json.loads(file.read_text()) | {"file": str(file)} for file in files}


def draw_trade_off(
    settings: ReportSettings, comparison: dict[str, dict], speeds: dict[str, dict], file: Path
) -> bool:
    if settings.trade_off and settings.trade_off not in comparison:
        raise ValueError(
            f"trade_off: {settings.trade_off}; wanted one of {', '.join(comparison) or NOT_RUN}"
        )
    metric = settings.trade_off or next(iter(comparison), None)
    if metric is None:
        return False
    return plot_trade_off(speeds, metric, comparison[metric]["settings"], file)


def without_items(files: dict[str, dict]) -> dict[str, dict]:
    """Settings, versions and means of every file; single items stay in the files."""
    return {
        file: {k: v for k, v in result.items() if k not in ("rows", "items", "tasks")}
        for file, result in files.items()
    }


if __name__ == "__main__":
    run(main)
