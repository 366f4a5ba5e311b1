"""Intervals, losses and pairs of the report, recomputed by other code."""

import math

import numpy as np
import pytest
from held_out import section
from made_results import BENCHMARKED, METRICS, benchmark, graded, models_of
from scipy import special


def right(name):
    return np.array(benchmark(name)["tasks"]["boolq"]["items"]["values"]["acc,none"])


def test_values_and_losses_follow_from_the_items_of_the_files(report):
    found = report[2]["items"]
    assert set(found) == {
        *("text perplexity", "chat perplexity", "KL to teacher", "top-1 agreement"),
        *("boolq acc", "mt_bench grade"),
    }
    for setting in ("start", "distill", "sft", "mix"):
        perplexities = [METRICS[name][0] for name in models_of(setting)]
        numbers = found["text perplexity"]["settings"][setting]
        assert numbers["value"] == pytest.approx(np.mean(perplexities))
        assert numbers["loss"]["value"] == pytest.approx(np.mean(perplexities) / 20 - 1)
        assert numbers["low"] < numbers["value"] < numbers["high"]
        accuracy = np.mean(
            [right(name).mean() for name in models_of(setting) if name in BENCHMARKED]
        )
        numbers = found["boolq acc"]["settings"][setting]
        assert numbers["value"] == pytest.approx(accuracy)
        assert numbers["loss"]["value"] == pytest.approx((34 / 40 - accuracy) / (34 / 40))
        wanted = (34 / 40 - accuracy) / (34 / 40 - 0.5)
        assert numbers["loss_above_chance"]["value"] == pytest.approx(wanted)
    grades = [i["score"] for i in graded("distill-seed0")["items"] if i["score"] is not None]
    assert found["mt_bench grade"]["settings"]["distill"]["value"] == pytest.approx(np.mean(grades))
    assert found["mt_bench grade"]["settings"]["sft"] == "not run"
    assert "loss" not in found["KL to teacher"]["settings"]["sft"]


def test_intervals_match_an_independent_bootstrap(report):
    """With one seed the percentiles, with several seeds Student's t."""
    found = report[2]["items"]["boolq acc"]["settings"]
    draw = np.random.default_rng(7)
    for setting in ("mix", "distill", "sft"):
        seeds = [right(name) for name in models_of(setting) if name in BENCHMARKED]
        chosen = [draw.choice(40, 40) for _ in range(20_000)]
        drawn = np.array([[seed[c].mean() for seed in seeds] for c in chosen])
        means, count = drawn.mean(1), len(seeds)
        low, high = np.quantile(means, [0.025, 0.975])
        if count > 1:
            noise = (drawn - means[:, None]).var(0).sum() / (count - 1)
            between = np.var([s.mean() for s in seeds], ddof=1) / count
            variance = max(means.var() - noise / count, 0) + between if between else means.var()
            freedom = variance**2 / (between**2 / (count - 1)) if between else 1e9
            reach = special.stdtrit(freedom, 0.975) * math.sqrt(variance)
            low, high = np.mean(seeds) - reach, np.mean(seeds) + reach
        assert found[setting]["low"] == pytest.approx(low, abs=0.026)  # one document of 40
        assert found[setting]["high"] == pytest.approx(high, abs=0.026)


def test_pairs_are_tested_over_seeds_or_items_and_corrected_with_holm(report):
    pairs = report[2]["items"]["boolq acc"]["pairs"]
    assert len(pairs) == 6
    for pair in pairs:
        ours, theirs = (
            [right(n) for n in models_of(pair[side]) if n in BENCHMARKED]
            for side in ("first", "second")
        )
        assert pair["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
        assert pair["low"] <= pair["difference"] <= pair["high"]
        if min(len(ours), len(theirs)) > 1:
            assert pair["unit"] == "seeds"
            continue
        assert pair["unit"] == "items"
        d = np.mean(ours, 0) - np.mean(theirs, 0)
        signs = np.random.default_rng(1).choice([-1, 1], (20_000, 40))
        wanted = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-9)
        assert pair["p_value"] == pytest.approx(wanted, abs=0.015)
    for of_start in (True, False):
        family = [p for p in pairs if ("start" in (p["first"], p["second"])) == of_start]
        assert len(family) == 3
        tested = sorted((p for p in family if p["p_value"] is not None), key=lambda p: p["p_value"])
        largest = 0.0
        for rank, pair in enumerate(tested):
            largest = max(largest, min(1.0, (len(tested) - rank) * pair["p_value"]))
            assert pair["p_holm"] == pytest.approx(largest)


def test_every_value_of_the_item_table_has_its_interval_and_its_files(report):
    _, _, data, text = report
    items = section(text, "By item")
    for label, metric in data["items"].items():
        for setting, numbers in metric["settings"].items():
            row = next(
                line for line in items.splitlines() if line.startswith(f"| {label} | {setting} |")
            )
            if isinstance(numbers, str):
                assert row.count(numbers) == 2 and (numbers == "reference") == (
                    setting == "teacher"
                )
                continue
            assert all(f"`{file}`" in row for file in numbers["files"])
            scale = 100 if metric["percent"] else 1
            for side in ("value", "low", "high"):
                shown = (
                    f"{scale * numbers[side]:.1f} %"
                    if metric["percent"]
                    else f"{numbers[side]:.4g}"
                )
                assert shown in row
    other = section(text, "Students against each other")
    assert "distill is better than start" in other and "| seeds |" in other and "| items |" in other
