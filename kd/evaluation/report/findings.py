"""What the numbers say: orders, differences with their tests, shares of the gap, in sentences."""

from kd.evaluation.report.summary import METRICS, NOT_RUN
from kd.evaluation.report.tables import cell, number

CHANCE = 0.05  # a p-value above it is called no difference


def what_the_numbers_say(summary: dict, expected: list[str]) -> str:
    """Orders, differences with their tests, and shares of the gap; all from the numbers."""
    parts = [order_sentences(metric, summary) for metric in summary["order"]]
    parts += [agreement_of_orders(summary), expected_sentence(summary, expected)]
    parts += [share_sentences(summary)]
    parts.append(
        "Spreads and p-values (Welch's two-sided t-test) are between training seeds, on one set of "
        "held-out rows; Holm's are corrected for the number of pairs of a figure. Few seeds show only "
        "large differences."
    )
    return "\n\n".join(part for part in parts if part)


def order_sentences(metric: str, summary: dict) -> str:
    names, label = summary["order"][metric], METRICS[metric].label
    if not names:
        return f"{label}: {NOT_RUN}."
    cells = {name: summary["settings"][name]["metrics"][metric] for name in names}
    listed = ", then ".join(f"{name} {cell(cells[name], metric)}" for name in names)
    lines = [f"By {label}, lowest first: {listed}."]
    for pair in summary["pairs"]:
        if pair["metric"] == metric:
            lines.append(f"- {pair_sentence(pair)}")
    return "\n".join(lines)


def pair_sentence(pair: dict) -> str:
    metric, error = pair["metric"], pair["standard_error"]
    text = f"{pair['first']} minus {pair['second']}: {number(pair['difference'], metric, error)}"
    if error is not None:
        text += f", standard error {number(error, metric, error)}"
    if pair["p_value"] is None:
        return f"{text}; {pair['note']}, so this order is not established."
    text += f", p = {pair['p_value']:.2g} (Holm {pair['p_holm']:.2g})"
    if pair["p_holm"] >= CHANCE:
        return f"{text}: no difference that these seeds can show."
    return text + ("; the ranges overlap." if pair["ranges_overlap"] else ".")


def agreement_of_orders(summary: dict) -> str:
    known = {METRICS[metric].label: order for metric, order in summary["order"].items() if order}
    if len(known) < 2 or max(map(len, known.values())) < 2:
        return ""
    if len(set(map(tuple, known.values()))) == 1:
        return f"{', '.join(known)} put the students in the same order."
    told = "; ".join(f"{label}: {' < '.join(order)}" for label, order in known.items())
    return f"The figures do not agree on the order of the students: {told}."


def expected_sentence(summary: dict, expected: list[str]) -> str:
    """Whether the order that was expected, best first, is the one that was measured."""
    if not expected:
        return ""
    lines = []
    for metric, order in summary["order"].items():
        label, missing = METRICS[metric].label, [name for name in expected if name not in order]
        if missing:
            lines.append(f"- by {label}: {NOT_RUN} for {', '.join(missing)}.")
            continue
        found = [name for name in order if name in expected]
        tests = [
            pair["p_value"] is not None and pair["p_holm"] < CHANCE
            for pair in summary["pairs"]
            if pair["metric"] == metric and {pair["first"], pair["second"]} <= set(expected)
        ]
        if found != expected:
            lines.append(f"- by {label}: not found; measured {' < '.join(found)}.")
        elif all(tests):
            lines.append(f"- by {label}: found, every difference with Holm's p < {CHANCE}.")
        else:
            lines.append(f"- by {label}: found in the means, but not every difference is shown.")
    return "\n".join([f"Expected order, best first: {' < '.join(expected)}.", *lines])


def share_sentences(summary: dict) -> str:
    lines = []
    for name, group in summary["settings"].items():
        metrics = group["metrics"]
        told = [
            f"{METRICS[metric].label} {cell(metrics[metric], metric)}"
            + (" (worse than the start)" if metrics[metric]["mean"] < 0 else "")
            for metric in ("kl_removed", "text_gap_closed", "chat_gap_closed")
            if isinstance(metrics[metric], dict)
        ]
        if told and group["role"] == "student":
            lines.append(f"- {name}: {', '.join(told)}.")
    return "\n".join(["Against the start:", *lines]) if lines else ""
