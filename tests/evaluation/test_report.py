"""Every number of report.json, recomputed from the result files by other code."""

import json
import math
import statistics

import numpy as np
import pytest
from held_out import inside, section
from made_results import METRICS, TEXT_BYTES, TEXT_TOKENS, graded, models_of, write
from scipy import special

from kd.evaluation.report.comparison import compare, measure
from kd.evaluation.report.findings import pair_verdict, verdict, what_the_numbers_say
from kd.evaluation.report.overview import group_models, overview, seed_tests
from kd.evaluation.report.result_table import read_results
from kd.evaluation.report.statistics import difference, overlap, spread


def numbers(tmp_path, metrics, runs=()):
    """(summary, comparison) of made results."""
    write(tmp_path, metrics)
    results = read_results([str(tmp_path)])
    groups = group_models(results, list(runs), "teacher", "start")
    measured = measure(results, list(groups), "teacher")
    roles = {model: group["role"] for model, group in groups.items()}
    comparison = compare(results, measured, roles)
    summary = overview(results, measured, groups, "teacher", "start")
    return summary | {"pairs": seed_tests(comparison, summary)}, comparison


def expected(name, metric):
    text, chat, kl = METRICS[name]
    shares = {
        "kl_removed": lambda: 1 - kl / 0.9,
        "text_gap_closed": lambda: math.log(45 / text) / math.log(45 / 20),
        "chat_gap_closed": lambda: math.log(60 / chat) / math.log(60 / 8),
    }
    if metric in shares and name in ("teacher", "start"):
        return "reference"
    if name == "teacher" and metric in ("forward_kl", "top1_agreement"):
        return "reference"
    if kl is None and metric in ("forward_kl", "top1_agreement", "kl_removed"):
        return "not run"
    values = {
        "text_perplexity": lambda: text,
        "chat_perplexity": lambda: chat,
        "bits_per_byte": lambda: TEXT_TOKENS * math.log2(text) / TEXT_BYTES,
        "forward_kl": lambda: kl,
        "top1_agreement": lambda: math.exp(-kl),
    }
    return (values | shares)[metric]()


def test_the_numbers_of_every_model_follow_from_its_files(report):
    models = report[2]["models"]
    for name in METRICS:
        for metric, value in models[name].items():
            wanted = expected(name, metric)
            assert value == (wanted if isinstance(wanted, str) else pytest.approx(wanted))


def test_means_and_deviations_are_over_the_measured_seeds(report):
    settings = report[2]["settings"]
    assert list(settings) == ["teacher", "start", "distill", "mix", "sft", "other"]
    for setting, group in settings.items():
        names = models_of(setting)
        for metric, value in group["metrics"].items():
            found = [expected(name, metric) for name in names]
            found = [v for v in found if not isinstance(v, str)]
            if not found:
                assert value == (expected(names[0], metric) if names else "not run")
                continue
            assert value["mean"] == pytest.approx(np.mean(found))
            deviation = pytest.approx(np.std(found, ddof=1)) if len(found) > 1 else None
            assert value["deviation"] == deviation
            assert value["n"] == len(found)
            assert value["of"] == (3 if group["role"] == "student" else 1)


def test_the_numbers_of_every_source_follow_from_its_files(report):
    for source, column in (("docs", 0), ("talk", 1)):
        for setting, value in report[2]["sources"][source].items():
            found = [METRICS[name] for name in models_of(setting)]
            if not found:
                assert value == {"perplexity": "not run", "forward_kl": "not run"}
                continue
            assert value["perplexity"]["mean"] == pytest.approx(np.mean([f[column] for f in found]))
            kl = [f[2] for f in found if f[2] is not None]
            if source == "talk" and kl:
                assert value["forward_kl"]["mean"] == pytest.approx(np.mean(kl))
            else:
                by_definition = "reference" if setting == "teacher" else "not run"
                assert value["forward_kl"] == by_definition


def test_every_pair_of_students_has_welchs_test(report):
    pairs = report[2]["pairs"]
    assert len(pairs) == 3 * 3
    for pair in pairs:
        a, b = (
            np.array(
                [
                    expected(name, pair["metric"])
                    for name in models_of(pair[side])
                    if expected(name, pair["metric"]) != "not run"
                ]
            )
            for side in ("first", "second")
        )
        assert pair["difference"] == pytest.approx(a.mean() - b.mean())
        if min(len(a), len(b)) < 2:
            assert pair["p_value"] is None and pair["note"] == "one seed: no test between seeds"
            continue
        va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        t = (a.mean() - b.mean()) / math.sqrt(va + vb)
        freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        assert pair["standard_error"] == pytest.approx(math.sqrt(va + vb))
        # Student's two-sided tail from the incomplete beta function.
        tail = special.betainc(freedom / 2, 0.5, freedom / (freedom + t * t))
        assert pair["p_value"] == pytest.approx(tail)


def test_the_best_student_is_bold_only_if_its_range_overlaps_no_other(report):
    _, _, data, text = report
    assert data["best"]["chat_perplexity"]["setting"] == "distill"
    assert data["best"]["text_perplexity"]["setting"] is None  # distill and mix overlap
    assert "overlap" in data["best"]["text_perplexity"]["reason"]
    assert "one seed" in data["best"]["forward_kl"]["reason"]  # mix has one
    assert "**11.20 +/- 0.26 (n=3)**" in text and "**30.50" not in text
    assert "text perplexity" in text.split("No best is marked for")[1].splitlines()[0]


def test_missing_results_are_not_run_and_never_zero(report):
    _, ran, data, text = report
    assert set(data["models"]["mix-seed1"].values()) == {"not run"}
    assert set(data["models"]["other-seed0"].values()) == {"not run"}
    assert "0.2500 (one seed of 3)" in text and "(n=2 of 3)" in text
    assert "other-seed0: not run" in text
    row = next(line for line in ran.stdout.splitlines() if line.startswith("other"))
    assert row.split() == ["other", *["not", "run"] * 8]


def test_the_findings_say_what_differs_from_the_expected_order(report):
    text = section(report[3], "What the numbers say")
    assert "By chat perplexity, lowest first: distill" in text
    assert "put the students in the same order" in text
    assert "by text perplexity: found in the means, but not every difference is shown" in text
    closed = [100 * expected(name, "text_gap_closed") for name in models_of("sft")]
    share = f"{statistics.fmean(closed):.1f} +/- {statistics.stdev(closed):.1f} %"
    assert f"text gap closed {share} (n=3) (worse than the start)" in text
    pairs = section(report[3], "Students against each other")
    (row,) = [r for r in pairs.splitlines() if r.startswith("| KL to teacher | distill | mix |")]
    assert "| -0.04 [" in row and "one seed: no test" in row


def test_sample_answers_are_shown_unrendered(report):
    line = section(report[3], "Sample answers").strip().splitlines()[-1]
    assert line.count("|") == 4
    assert "&lt;b&gt;<br>&#42;bold&#42;" in line and f"{'x' * 300}... |" in line


def test_the_report_has_the_plots_and_the_origin_of_every_number(report):
    folder, ran, data, text = report
    for plot in ("perplexity_and_kl.png", "training_curves.png", "size_and_speed.png"):
        assert f"]({plot})" in text
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    found = [
        file
        for file in folder.rglob("*.json")
        if "settings" in json.loads(file.read_text())
        and "models" not in json.loads(file.read_text())
    ]
    assert len(found) == len(data["origin"]) == 10 + 8 + 7 + 2 * 3
    for file in found:
        assert f"| {file} |" in section(text, "Where the numbers come from")
        assert data["origin"][str(file)]["settings"] == json.loads(file.read_text())["settings"]
    assert '"max_length": 64' in text and '"torch": "2"' in text
    assert "checkpoint-20/trainer_state.json" in text
    assert ran.stdout.rstrip().endswith(f"wrote {folder / 'report.md'}")


def test_grades_and_speeds_are_shown_with_their_files(report):
    folder, _, _, text = report
    judged = section(text, "Judged")
    items = graded("teacher")["items"]
    for category in "ab":
        row = next(
            line for line in judged.splitlines() if line.startswith(f"| teacher | {category} |")
        )
        for turn in (1, 2):
            scores = [
                i["score"]
                for i in items
                if i["category"] == category and i["turn"] == turn and i["score"] is not None
            ]
            assert f"{np.mean(scores):.2f} (se" in row
        assert f"`{folder}/judge/mt_bench/results/teacher.json`" in row
    assert "by gpt-4o" in judged and "do not compare" in judged
    speeds = section(text, "Speed and size")
    assert (
        f"| teacher | 1,000 | 2,000 | 1 | 9 | 0.7 | 10 | not run | `{folder}/speed/teacher.json` |"
        in speeds
    )
    assert "| sft-seed0 | not run |" in speeds


def test_an_unexpected_order_is_reported(tmp_path):
    metrics = {
        "a-seed0": (9.0, 5.0, 0.4),
        "a-seed1": (9.1, 5.1, 0.5),
        "b-seed0": (8.0, 6.0, 0.1),
        "b-seed1": (8.1, 6.1, 0.2),
    }
    summary, comparison = numbers(tmp_path, metrics)
    text = what_the_numbers_say(summary, summary["pairs"], ["a", "b"])
    assert "by KL to teacher: not found; measured b < a" in text
    assert "do not agree on the order" in text and "chat perplexity: a < b" in text
    first_screen = verdict(summary, comparison, ["a", "b"])
    assert first_screen.startswith("By KL to teacher, **b** is the best student: 0.15.")
    assert "holds by chat perplexity and fails by KL to teacher and text perplexity" in first_screen


def test_shares_of_the_gap_need_teacher_and_start(tmp_path):
    summary, _ = numbers(tmp_path, {"a": (9.0, 5.0, 0.4)})
    assert summary["models"]["teacher"]["text_perplexity"] == "not run"
    for metric in ("kl_removed", "text_gap_closed", "chat_gap_closed"):
        assert summary["settings"]["a"]["metrics"][metric] == "not run"


def test_a_teacher_that_is_no_better_than_the_start_leaves_no_gap(tmp_path):
    metrics = {"teacher": (9.0, 5.0, None), "start": (8.0, 6.0, 0.4), "a": (7.0, 5.5, 0.3)}
    found = numbers(tmp_path, metrics)[0]["models"]["a"]
    assert found["text_gap_closed"] == "no gap"
    assert found["chat_gap_closed"] == pytest.approx(math.log(6 / 5.5) / math.log(6 / 5))


def test_results_of_different_rows_or_weights_are_refused(tmp_path):
    write(tmp_path / "rows", **{"start": {"rows_hash": "others"}})
    with pytest.raises(ValueError, match="rows_hash differs .*others: start"):
        read_results([str(tmp_path / "rows")])
    write(tmp_path / "tokens", start={"control_tokens_in_text": "keep"})
    with pytest.raises(ValueError, match="control_tokens_in_text differs .*keep: start"):
        read_results([str(tmp_path / "tokens")])
    write(tmp_path / "weights")
    file = tmp_path / "weights" / "agreement" / "start.json"
    file.write_text(
        file.read_text().replace('"model_files_hash": "start"', '"model_files_hash": "x"')
    )
    with pytest.raises(ValueError, match="start: .* different model files"):
        read_results([str(tmp_path / "weights")])
    with pytest.raises(ValueError, match="run eval/perplexity.py"):
        inside("report.py", "--results", tmp_path / "nothing")


def test_two_folders_share_one_table_unless_they_have_the_same_model(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, {"teacher": (20.0, 8.0, None), "a-seed0": (30.0, 9.0, 0.2)})
    write(two, {"b-seed0": (31.0, 9.5, 0.3)})
    results = read_results([str(one), str(two)])
    rows = results.table[results.table["metric"] == "text perplexity"]
    assert set(zip(rows["model"], rows["seed"], strict=True)) == {
        ("teacher", ""),
        ("a", "0"),
        ("b", "0"),
    }
    assert len(results.files) == 7 + 1  # with the speed of the teacher
    with pytest.raises(ValueError, match="give every model a different name"):
        read_results([str(one), str(one)])
    write(two, {"c": (31.0, 9.5, 0.3)}, c={"rows_hash": "others"})
    with pytest.raises(ValueError, match="text perplexity: rows_hash differs"):
        read_results([str(one), str(two)])


def test_one_seed_has_no_deviation_and_no_test():
    assert spread([3.0]).deviation is None
    assert difference([3.0], [1.0, 2.0]).p_value is None
    assert difference([2.0, 2.0], [1.0, 1.0]).note == "no spread between seeds: no test"
    assert overlap(spread([3.0]), spread([1.0, 2.0])) is None


def test_a_large_p_value_is_reported_as_no_difference():
    found = difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    pair = {
        **{"first": "a", "second": "b", "difference": found.value, "ranges_overlap": True},
        **{"p_value": found.p_value, "p_holm": found.p_value, "note": found.note, "unit": "seeds"},
    }
    assert "no difference that these seeds can show" in pair_verdict(pair, higher_is_better=False)


def test_the_first_screen_is_a_verdict_one_table_and_one_plot(report):
    screen = report[3].split("<details>")[0]
    _, sentences, *_ = screen.split("\n\n")
    assert sentences.startswith(
        "By KL to teacher, **distill** is the best student: 0.21 (start 0.9)."
    )
    assert "Its lead over mix is" in sentences and "one seed: no test between seeds" in sentences
    assert sentences.endswith(
        "The expected order, distill < mix < sft, holds by KL to teacher, chat perplexity and text "
        "perplexity."
    )
    assert screen.count("\n| --- ") == 1 and screen.count("![") == 1 and "# Report" in screen
    header = next(line for line in screen.splitlines() if line.startswith("| model |"))
    assert header.endswith("| chat gap closed | boolq acc | mt_bench grade |")
    assert report[3].count("<details>") == report[3].count("</details>") == 11
