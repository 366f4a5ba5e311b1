"""The plots of a report: bars of the metrics, quality against size and speed, training curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from kd.evaluation.report.result_table import (  # noqa: E402
    METRICS,
    NOT_RUN,
    ResultFile,
    Results,
    split_seed,
)
from kd.run.finished import read_json  # noqa: E402
from kd.training.checkpoints.checkpoint import checkpoints  # noqa: E402

BARS_FILE, CURVES_FILE = "perplexity_and_kl.png", "training_curves.png"
TRADE_OFF_FILE = "size_and_speed.png"
BARS = ("text_perplexity", "chat_perplexity", "forward_kl")
TERMS = ("loss", "cross_entropy", "divergence")
GREY = "0.6"


def draw_plots(
    results: Results,
    summary: dict,
    comparison: dict[str, dict],
    histories: dict[str, Path | None],
    trade_off: str | None,
    folder: Path,
) -> set[str]:
    """Draw all plots that there are results for, and return their file names.

    Raises ValueError if `trade_off` is a metric without results.
    """
    if trade_off and trade_off not in comparison:
        raise ValueError(
            f"trade_off: {trade_off}; wanted one of {', '.join(comparison) or NOT_RUN}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    metric = trade_off or next(iter(comparison), None)
    values = comparison[metric]["settings"] if metric else {}
    drawn = {
        BARS_FILE: plot_bars(summary["settings"], folder / BARS_FILE),
        TRADE_OFF_FILE: plot_trade_off(
            results.of_kind("speed"), metric, values, folder / TRADE_OFF_FILE
        ),
        CURVES_FILE: plot_curves(histories, folder / CURVES_FILE),
    }
    return {file for file, is_drawn in drawn.items() if is_drawn}


def plot_bars(settings: dict[str, dict], file: Path) -> bool:
    """Draw a panel for each of BARS, with deviations over seeds; False if all are missing."""
    shown = {
        metric: cells
        for metric in BARS
        if (
            cells := {
                name: group["metrics"][metric]
                for name, group in settings.items()
                if isinstance(group["metrics"][metric], dict)
            }
        )
    }
    if not shown:
        return False
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.6), squeeze=False)
    for axis, (metric, cells) in zip(axes[0], shown.items(), strict=True):
        students = [name for name in cells if settings[name]["role"] == "student"]
        colours = [colour_of(name, students) for name in cells]
        means = [cell["mean"] for cell in cells.values()]
        axis.bar(range(len(cells)), means, color=colours)
        for x, cell in enumerate(cells.values()):
            if cell["deviation"] is not None:
                axis.errorbar(x, cell["mean"], cell["deviation"], color="black", capsize=4)
        axis.set_xticks(range(len(cells)), cells, rotation=30, ha="right")
        axis.set_title(
            METRICS[metric].label + (", nats per token" if metric == "forward_kl" else "")
        )
    save(figure, file)
    return True


def plot_trade_off(
    speeds: list[ResultFile], metric: str, values: dict[str, dict], file: Path
) -> bool:
    """Draw quality against parameters and against decoding speed; False without both.

    `values`: {model: {"value", "low", "high"}} of `metric`.
    """
    points = {}
    for name, numbers in values.items():
        sizes = [speed.content for speed in speeds if split_seed(speed.name)[0] == name]
        if isinstance(numbers, dict) and sizes:
            points[name] = (numbers, sizes[0])
    if not points:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
    largest = {name: max(result["batch_sizes"], key=int) for name, (_, result) in points.items()}
    for axis, title in zip(axes, ("parameters", "decoding, tokens/s"), strict=True):
        for i, (name, (numbers, result)) in enumerate(points.items()):
            speed = result["batch_sizes"][largest[name]]["decoding_tokens_per_second"]
            x = result["parameters"] if title == "parameters" else speed
            error = [
                [max(numbers["value"] - numbers["low"], 0)],
                [max(numbers["high"] - numbers["value"], 0)],
            ]
            axis.errorbar(x, numbers["value"], error, fmt="o", color=f"C{i}", capsize=3)
            axis.annotate(name, (x, numbers["value"]), (5, 4), textcoords="offset points")
        axis.set_xlabel(title)
        axis.margins(0.25)
    axes[0].set_ylabel(metric)
    save(figure, file)
    return True


def colour_of(name: str, students: list[str]) -> str:
    """Return one colour for each student, the same in every plot; grey for other models."""
    names = sorted(set(students))
    return f"C{names.index(name)}" if name in names else GREY


def find_histories(runs: list[str]) -> dict[str, Path | None]:
    """Return {run: trainer_state.json} of the run or of its newest checkpoint; None without."""
    found: dict[str, Path | None] = {}
    for run in runs:
        folders = [Path(run), *checkpoints(Path(run))[:1]]
        files = [folder / "trainer_state.json" for folder in folders]
        found[run] = next((file for file in files if file.is_file()), None)
    return found


def plot_curves(histories: dict[str, Path | None], file: Path) -> bool:
    """Draw loss terms over steps: a colour per model, a line per seed, points for held-out rows.

    Returns False without a training history.
    """
    logs = {
        Path(run).name: read_json(state, "leave its run out").get("log_history", [])
        for run, state in histories.items()
        if state is not None
    }
    terms = [t for t in TERMS if any(t in entry for log in logs.values() for entry in log)]
    if not terms:
        return False
    students = [name for name, seed in map(split_seed, logs) if seed]
    figure, axes = plt.subplots(1, len(terms), figsize=(4.2 * len(terms), 3.6), squeeze=False)
    for axis, term in zip(axes[0], terms, strict=True):
        labelled = set()
        for run, log in logs.items():
            setting = split_seed(run)[0]
            colour = colour_of(setting, students)
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            if points:
                label = None if setting in labelled else setting
                labelled.add(setting)
                axis.plot(*zip(*points, strict=True), color=colour, lw=1, alpha=0.8, label=label)
            key = f"eval_{term}"
            heldout = [(entry["step"], entry[key]) for entry in log if key in entry]
            if heldout:
                axis.plot(*zip(*heldout, strict=True), "o", color=colour, ms=4)
        axis.set_title(term.replace("_", " ") + ", nats per token")
        axis.set_xlabel("optimizer step")
        axis.legend(fontsize="small")
    save(figure, file)
    return True


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG and free it."""
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
