"""What the numbers say, in sentences: the verdict, orders, and shares of the gap."""

from kd.evaluation.report.overview import COLUMNS, COMPARED, SHARES
from kd.evaluation.report.result_table import METRICS, NOT_RUN
from kd.evaluation.report.tables import cell, shown

CHANCE = 0.05  # significance level of Holm's p
SPREADS_EXPLAINED = """\
Spreads and tests are between training seeds, on one set of held-out rows. Few seeds show only large
differences. The tests of all pairs are under "Students against each other"."""


def verdict(summary: dict, comparison: dict[str, dict], expected: list[str]) -> str:
    """Return three sentences: the best student, whether the difference is shown, and the order."""
    ranked = rankings(summary, comparison)
    if not ranked:
        return "No student has been measured."
    label, order = next(iter(ranked.items()))
    metric, best = comparison[label], order[0]
    others = [
        f"{name} {shown(numbers['value'], metric['percent'])}"
        for name, numbers in metric["settings"].items()
        if isinstance(numbers, dict) and summary["settings"][name]["role"] != "student"
    ]
    value = shown(metric["settings"][best]["value"], metric["percent"])
    compared = f" ({', '.join(others)})" if others else ""
    first = f"By {label}, **{best}** is the best student: {value}{compared}."
    return " ".join([first, runner_up(order, metric), order_verdict(ranked, expected)])


def rankings(summary: dict, comparison: dict[str, dict]) -> dict[str, list[str]]:
    """Return {metric: students, best first}: COMPARED, or else every metric with students."""
    compared = {METRICS[key].label: order for key, order in summary["order"].items() if order}
    if compared:
        return compared
    students = {name for name, g in summary["settings"].items() if g["role"] == "student"}
    found = {}
    for label, metric in comparison.items():
        sign = -1 if metric["higher_is_better"] else 1
        measured = {n: v for n, v in metric["settings"].items() if isinstance(v, dict)}
        order = sorted(students & set(measured), key=lambda n: (sign * measured[n]["value"], n))
        if order:
            found[label] = order
    return found


def runner_up(order: list[str], metric: dict) -> str:
    """Say whether the difference between the best two students is shown."""
    if len(order) < 2:
        return "No other student was measured."
    best, second = order[:2]
    pair = next(p for p in metric["pairs"] if {p["first"], p["second"]} == {best, second})
    if pair["p_value"] is None:
        return f"Its lead over {second} is not tested ({pair['note']})."
    p = f"Holm's p = {pair['p_holm']:.2g} over {pair['unit']}"
    if pair["p_holm"] >= CHANCE:
        return f"Its lead over {second} is not significant ({p})."
    caveat = f"; {pair['note']}" if pair["note"] else ""
    return f"Its lead over {second} is significant ({p}{caveat})."


def order_verdict(ranked: dict[str, list[str]], expected: list[str]) -> str:
    """Say whether the expected order was measured, or whether the metrics agree on one."""
    if not expected:
        orders = set(map(tuple, ranked.values()))
        if len(orders) > 1:
            return "The metrics do not agree on the order of the students."
        order = ", ".join(next(iter(orders)))
        return f"By {joined(list(ranked))}, the order of the students is {order}, best first."
    found, missed, missing = [], [], []
    for label, order in ranked.items():
        if set(expected) - set(order):
            missing.append(label)
        else:
            same = [name for name in order if name in expected] == expected
            (found if same else missed).append(label)
    parts = [
        f"{text} by {joined(labels)}"
        for text, labels in (("holds", found), ("fails", missed), ("is not measured", missing))
        if labels
    ]
    return f"The expected order, {' < '.join(expected)}, {joined(parts)}."


def joined(parts: list[str]) -> str:
    """Join parts with commas and a final "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def what_the_numbers_say(summary: dict, pairs: list[dict], expected: list[str]) -> str:
    """Return orders, the expected order, and shares of the gap; `pairs` are the seed tests."""
    parts = [order_sentence(key, summary) for key in COMPARED]
    parts += [agreement_of_orders(summary), expected_sentence(summary, pairs, expected)]
    parts += [share_sentences(summary), SPREADS_EXPLAINED]
    return "\n\n".join(part for part in parts if part)


def order_sentence(key: str, summary: dict) -> str:
    """Say the order of the students by one metric."""
    names, label = summary["order"][key], METRICS[key].label
    if not names:
        return f"{label}: {NOT_RUN}."
    cells = {name: summary["settings"][name]["metrics"][key] for name in names}
    listed = ", then ".join(f"{name} {cell(cells[name], key)}" for name in names)
    return f"By {label}, lowest first: {listed}."


def agreement_of_orders(summary: dict) -> str:
    """Say whether the metrics put the students in the same order."""
    known = {METRICS[key].label: order for key, order in summary["order"].items() if order}
    if len(known) < 2 or max(map(len, known.values())) < 2:
        return ""
    if len(set(map(tuple, known.values()))) == 1:
        return f"{joined(list(known))} put the students in the same order."
    parts = "; ".join(f"{label}: {' < '.join(order)}" for label, order in known.items())
    return f"The metrics do not agree on the order of the students: {parts}."


def expected_sentence(summary: dict, pairs: list[dict], expected: list[str]) -> str:
    """Say, metric by metric, whether the expected order, best first, was measured."""
    if not expected:
        return ""
    lines = []
    for key, order in summary["order"].items():
        label, missing = METRICS[key].label, [name for name in expected if name not in order]
        if missing:
            lines.append(f"- by {label}: {NOT_RUN} for {', '.join(missing)}.")
            continue
        found = [name for name in order if name in expected]
        tests = [
            pair["p_value"] is not None and pair["p_holm"] < CHANCE
            for pair in pairs
            if pair["metric"] == key and {pair["first"], pair["second"]} <= set(expected)
        ]
        if found != expected:
            lines.append(f"- by {label}: not found; measured {' < '.join(found)}.")
        elif all(tests):
            lines.append(f"- by {label}: found, every difference with Holm's p < {CHANCE}.")
        else:
            lines.append(f"- by {label}: found in the means, but not every difference is shown.")
    return "\n".join([f"Expected order, best first: {' < '.join(expected)}.", "", *lines])


def share_sentences(summary: dict) -> str:
    """Say how much of the gap between start and teacher every student closed."""
    lines = []
    for name, group in summary["settings"].items():
        metrics = group["metrics"]
        parts = [
            f"{COLUMNS[key].label} {cell(metrics[key], key)}"
            + (" (worse than the start)" if metrics[key]["mean"] < 0 else "")
            for key in SHARES
            if isinstance(metrics[key], dict)
        ]
        if parts and group["role"] == "student":
            lines.append(f"- {name}: {', '.join(parts)}.")
    return "\n".join(["Against the start:", "", *lines]) if lines else ""


def pair_verdict(pair: dict, higher_is_better: bool) -> str:
    """Say what the test of a pair shows."""
    if pair["p_value"] is None:
        return pair["note"]
    note = f"; {pair['note']}" if pair["note"] else ""
    if pair["p_holm"] >= CHANCE:
        return f"no difference that these {pair['unit']} can show{note}"
    first_better = (pair["difference"] > 0) == higher_is_better
    names = (pair["first"], pair["second"]) if first_better else (pair["second"], pair["first"])
    overlapping = "; the ranges overlap" if pair["ranges_overlap"] else ""
    return f"{names[0]} is better than {names[1]}{overlapping}{note}"
