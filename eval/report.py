"""Put all results of one or several experiments into one report with plots.

python eval/report.py --results runs/quickstart/results --runs runs/quickstart/students/* \
    --samples runs/quickstart/results/answers.jsonl --out runs/quickstart/report.md

The inputs are the result files of the scripts of eval/; what was not measured is shown as "not
run". Models called NAME-seed0, NAME-seed1, ... are seeds of NAME. The outputs are OUT, a JSON file
with the same numbers, and the plots.
"""

import json
from pathlib import Path

from kd.recipe import parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import ReportSettings


def main() -> None:
    (settings,) = parse(ReportSettings, description=__doc__)
    check_writable("out", Path(settings.out).parent)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.report.comparison import compare, measure
    from kd.evaluation.report.overview import group_models, overview, seed_tests
    from kd.evaluation.report.plots import draw_plots, find_histories
    from kd.evaluation.report.report import read_samples, render, report_json
    from kd.evaluation.report.result_table import read_results
    from kd.evaluation.report.tables import plain_table, summary_rows
    from kd.evaluation.results import write_text

    samples = read_samples(settings.samples)
    results = read_results(settings.results)
    groups = group_models(results, settings.runs, settings.teacher, settings.start)
    roles = {model: group["role"] for model, group in groups.items()}
    measured = measure(results, list(groups), settings.teacher)
    comparison = compare(results, measured, roles)
    summary = overview(results, measured, groups, settings.teacher, settings.start)
    summary["pairs"] = seed_tests(comparison, summary)
    histories = find_histories(settings.runs)
    out = Path(settings.out)
    drawn = draw_plots(results, summary, comparison, histories, settings.trade_off, out.parent)
    expected = settings.expected_order
    text = render(results, summary, comparison, expected, samples, drawn, histories)
    write_text(out, text)
    numbers = report_json(results, summary, comparison, histories)
    write_text(out.with_suffix(".json"), json.dumps(numbers, indent=2) + "\n")
    print(f"{plain_table(summary_rows(summary))}\n\nwrote {out}")


if __name__ == "__main__":
    run(main)
