"""Every number of report.json, computed again from the JSON files by other code."""

import json
import math

import numpy as np
import pytest
from held_out import command, inside, write_jsonl
from scipy import special

from kd.evaluation.findings import pair_sentence, what_the_numbers_say
from kd.evaluation.items import read_metrics
from kd.evaluation.judging import by, means
from kd.evaluation.statistics import difference, overlap, spread
from kd.evaluation.summary import read_results, summarise

# name: (text perplexity, chat perplexity, KL to teacher); None: not measured
FIGURES = {
    "teacher": (20.0, 8.0, None),
    "start": (45.0, 60.0, 0.9),
    "distill-seed0": (30.0, 11.0, 0.20),
    "distill-seed1": (31.0, 11.5, 0.22),
    "distill-seed2": (30.5, 11.1, 0.21),
    "mix-seed0": (30.4, 12.0, 0.25),
    "mix-seed2": (31.4, 12.2, None),
    "sft-seed0": (50.0, 13.0, 0.50),
    "sft-seed1": (51.0, 13.3, 0.52),
    "sft-seed2": (52.0, 13.1, 0.51),
}
SETTINGS = {
    "rows_hash": "rows",
    "max_length": 64,
    "vocabulary_hash": "words",
    "chat_template_hash": "template",
    "dtype": "float32",
    "device": "cpu",
    "attn_implementation": "sdpa",
}
TEXT_TOKENS, CHAT_TOKENS, TEXT_BYTES, ROWS = 400, 100, 1500, 20
GRADED = ("teacher", "start", "distill-seed0")
BENCHMARKED = (
    "teacher",
    "start",
    "distill-seed0",
    "distill-seed1",
    "sft-seed0",
    "sft-seed1",
    "mix-seed0",
)
SAMPLE = {"prompt": "What is a|b?", "answers": {"distill": "<b>\n*bold*", "sft": "x" * 400}}


def jitter(name, count):
    """Numbers of a model that add up to 0, so that means stay those of FIGURES."""
    draw = np.random.default_rng(sum(name.encode())).normal(0, 0.3, count)
    return draw - draw.mean()


def likelihood(name, text, chat):
    def means(tokens, perplexity, size):
        nats = tokens * math.log(perplexity)
        bits = nats / math.log(2) / size if size else None
        return {"tokens": tokens, "nats": nats, "perplexity": perplexity, "bits_per_byte": bits}

    kinds = {
        "text": means(TEXT_TOKENS, text, TEXT_BYTES),
        "chat": means(CHAT_TOKENS, chat, None),
    }
    overall = {"bits_per_byte": kinds["text"]["bits_per_byte"]}
    sources = {"docs": kinds["text"], "talk": kinds["chat"]}
    rows = [
        {
            **{"source": source, "kind": kind, "index": i, "tokens": tokens // ROWS},
            "nats": tokens // ROWS * (math.log(perplexity) + noise),
        }
        for source, kind, tokens, perplexity in (
            ("docs", "text", TEXT_TOKENS, text),
            ("talk", "chat", CHAT_TOKENS, chat),
        )
        for i, noise in enumerate(jitter(name + kind, ROWS))
    ]
    return {"sources": sources, "kinds": kinds, "overall": overall, "rows": rows}


def agreement(name, kl):
    means = {"forward_kl": kl, "top1_agreement": math.exp(-kl)}
    rows = [
        {
            **{"source": "talk", "kind": "chat", "index": i, "tokens": 5},
            **{"forward_kl": 5 * (kl + noise / 10), "top1_agreement": 5 * math.exp(-kl)},
        }
        for i, noise in enumerate(jitter(name, ROWS))
    ]
    return {"sources": {"talk": means}, "kinds": {"chat": means}, "overall": means, "rows": rows}


def benchmark(name):
    """40 documents, a task where guessing scores a half; better models have more of them right."""
    better = {"teacher": 34, "start": 21, "distill": 31, "mix": 27, "sft": 24}[name.split("-")[0]]
    right = np.random.default_rng(sum(name.encode())).permutation(
        [1.0] * better + [0.0] * (40 - better)
    )
    items = {"hashes": [f"d{i}" for i in range(40)], "values": {"acc,none": right.tolist()}}
    task = {"metrics": {"acc,none": float(right.mean())}, "chance": 0.5, "items": items}
    return {"tasks": {"boolq": task | {"version": 2.0, "num_fewshot": 0}}, "groups": {}}


def graded(name):
    """Six questions of two turns; one grade is missing."""
    grades = np.random.default_rng(sum(name.encode())).integers(1, 11, 12).astype(float).tolist()
    items = [
        {"question_id": str(i // 2), "category": "ab"[i // 6], "turn": 1 + i % 2, "score": g}
        for i, g in enumerate(grades)
    ]
    items[3]["score"] = None
    turns = by(items, "turn", "score")
    categories = {
        c: means(part, "score") | {"turns": by(part, "turn", "score")}
        for c in "ab"
        for part in [[item for item in items if item["category"] == c]]
    }
    return {
        "overall": means(items, "score"),
        "turns": turns,
        "categories": categories,
        "items": items,
    }


def speed(name):
    size = 1000 if name == "teacher" else 400
    numbers = {
        "prefill_tokens_per_second": 9000.0 / size,
        "decoding_tokens_per_second": 700.0 / size,
        "first_token_seconds": 0.01,
        "peak_memory_bytes": None,
    }
    return {"parameters": size, "bytes_on_disk": 2 * size, "batch_sizes": {"1": numbers}}


def write(folder, figures=FIGURES, **other):
    versions = {"versions": {"torch": "2"}, "commit": "abc"}
    for name, (text, chat, kl) in figures.items():
        settings = SETTINGS | {"model": name, "model_files_hash": name} | other.get(name, {})
        measured = {"perplexity": likelihood(name, text, chat)}
        if kl is not None:
            measured["agreement"] = agreement(name, kl)
        if name in BENCHMARKED:
            measured["benchmarks/boolq"] = benchmark(name)
        if name in GRADED:
            measured["judge/mt_bench/results"] = graded(name)
            measured["speed"] = speed(name)
        for part, result in measured.items():
            more = {}
            if part.startswith("judge"):
                more = {
                    "benchmark": "mt_bench",
                    "mode": "score",
                    "judge": "gpt-4o",
                    "baseline": None,
                }
            (folder / part).mkdir(parents=True, exist_ok=True)
            record = {"settings": settings | more, **versions, **result}
            (folder / part / f"{name}.json").write_text(json.dumps(record))


def numbers(tmp_path, figures, runs=()):
    write(tmp_path, figures)
    return summarise(read_results([str(tmp_path)]), list(runs), "teacher", "start")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder, finished command, report.json, report.md) of one run of the script."""
    folder = tmp_path_factory.mktemp("report")
    write(folder)
    run = folder / "runs" / "distill-seed0"
    state = run / "checkpoint-20" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    log = [{"step": s, "loss": 2.0 / s, "cross_entropy": 3.0 / s} for s in (10, 20)]
    log.append({"step": 20, "eval_cross_entropy": 0.3})
    state.write_text(json.dumps({"log_history": log}))
    write_jsonl(folder / "answers.jsonl", [SAMPLE])
    ran = command(
        *("report.py", "--results", folder, "--runs", run, folder / "runs" / "other-seed0"),
        *("--samples", folder / "answers.jsonl", "--expected_order", "distill", "mix", "sft"),
    )
    assert ran.returncode == 0, ran.stderr
    data = json.loads((folder / "report.json").read_text())
    return folder, ran, data, (folder / "report.md").read_text()


def expected(name, metric):
    text, chat, kl = FIGURES[name]
    shares = {
        "kl_removed": lambda: 1 - kl / 0.9,
        "text_gap_closed": lambda: (45 - text) / (45 - 20),
        "chat_gap_closed": lambda: (60 - chat) / (60 - 8),
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


def test_every_models_numbers_are_those_of_its_files(report):
    models = report[2]["models"]
    for name in FIGURES:
        for metric, value in models[name].items():
            wanted = expected(name, metric)
            assert value == (wanted if isinstance(wanted, str) else pytest.approx(wanted))


def test_every_settings_mean_and_deviation_are_over_its_measured_seeds(report):
    settings = report[2]["settings"]
    assert list(settings) == ["teacher", "start", "distill", "mix", "sft", "other"]
    for setting, group in settings.items():
        names = [name for name in FIGURES if name.split("-seed")[0] == setting]
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


def test_every_sources_numbers_are_those_of_its_files(report):
    for source, column in (("docs", 0), ("talk", 1)):
        for setting, value in report[2]["sources"][source].items():
            found = [f for name, f in FIGURES.items() if name.split("-seed")[0] == setting]
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


def test_every_pairs_test_is_welchs(report):
    pairs = report[2]["pairs"]
    assert len(pairs) == 3 * 3
    for pair in pairs:
        a, b = (
            np.array(
                [
                    expected(name, pair["metric"])
                    for name in FIGURES
                    if name.split("-seed")[0] == pair[side]
                    and expected(name, pair["metric"]) != "not run"
                ]
            )
            for side in ("first", "second")
        )
        assert pair["difference"] == pytest.approx(a.mean() - b.mean())
        if min(len(a), len(b)) < 2:
            assert pair["p_value"] is None and pair["note"] == "one seed: no test"
            continue
        va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        t = (a.mean() - b.mean()) / math.sqrt(va + vb)
        freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        assert pair["standard_error"] == pytest.approx(math.sqrt(va + vb))
        # Student's two-sided tail by the incomplete beta function.
        tail = special.betainc(freedom / 2, 0.5, freedom / (freedom + t * t))
        assert pair["p_value"] == pytest.approx(tail)


def test_a_best_is_marked_only_where_no_range_meets_it(report):
    _, _, data, text = report
    assert data["best"]["chat_perplexity"]["setting"] == "distill"
    assert data["best"]["text_perplexity"]["setting"] is None  # distill and mix overlap
    assert "overlap" in data["best"]["text_perplexity"]["reason"]
    assert "one seed" in data["best"]["forward_kl"]["reason"]  # mix has one
    assert "**11.20 +/- 0.26 (n=3)**" in text and "**30.50" not in text
    assert "text perplexity" in text.split("No best is marked for")[1].splitlines()[0]


def test_what_is_missing_is_not_run_and_never_zero(report):
    _, ran, data, text = report
    assert set(data["models"]["mix-seed1"].values()) == {"not run"}
    assert set(data["models"]["other-seed0"].values()) == {"not run"}
    assert "0.2500 (one seed of 3)" in text and "(n=2 of 3)" in text
    assert "other-seed0: not run" in text
    row = next(line for line in ran.stdout.splitlines() if line.startswith("other"))
    assert row.split() == ["other", *["not", "run"] * 8]


def test_the_findings_say_what_was_not_expected(report):
    text = report[3].split("## What the numbers say")[1].split("## By source")[0]
    assert "By chat perplexity, lowest first: distill" in text
    assert "put the students in the same order" in text
    assert "by text perplexity: found in the means, but not every difference is shown" in text
    assert "text gap closed -24.0 +/- 4.0 % (n=3) (worse than the start)" in text
    assert "distill minus mix: -0.0400; one seed: no test" in text


def test_samples_are_shown_as_they_are(report):
    line = report[3].split("## Sample answers")[1].split("##")[0].strip().splitlines()[-1]
    assert line.count("|") == 4
    assert "&lt;b&gt;<br>&#42;bold&#42;" in line and f"{'x' * 300}... |" in line


def test_the_plots_and_the_origin_of_every_number_are_there(report):
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
        assert f"| {file} |" in text.split("## Where the numbers come from")[1]
        assert data["origin"][str(file)]["settings"] == json.loads(file.read_text())["settings"]
    assert '"max_length": 64' in text and '"torch": "2"' in text
    assert "checkpoint-20/trainer_state.json" in text
    assert ran.stdout.rstrip().endswith(f"wrote {folder / 'report.md'}")


def models_of(setting):
    return [name for name in FIGURES if name.split("-seed")[0] == setting]


def right(name):
    return np.array(benchmark(name)["tasks"]["boolq"]["items"]["values"]["acc,none"])


def test_values_on_items_and_losses_are_those_of_the_files(report):
    found = report[2]["items"]
    assert set(found) == {
        *("text perplexity", "chat perplexity", "KL to teacher", "top-1 agreement"),
        *("boolq acc", "mt_bench grade"),
    }
    for setting in ("start", "distill", "sft", "mix"):
        perplexities = [FIGURES[name][0] for name in models_of(setting)]
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


def test_intervals_are_those_of_another_bootstrap(report):
    """Drawn by other code: of one seed the percentiles, of several Student's t."""
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


def test_pairs_are_tested_over_seeds_or_over_items_and_corrected(report):
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


def test_every_cell_on_items_names_its_file_and_its_interval(report):
    _, _, data, text = report
    section = text.split("## By item")[1].split("## Students against")[0]
    for label, metric in data["items"].items():
        for setting, numbers in metric["settings"].items():
            row = next(
                line for line in section.splitlines() if line.startswith(f"| {label} | {setting} |")
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
    other = text.split("## Students against")[1].split("## Judged")[0]
    assert "distill is better than start" in other and "| seeds |" in other and "| items |" in other


def test_grades_by_category_and_turn_and_speeds_stand_with_their_files(report):
    folder, _, _, text = report
    judged = text.split("## Judged")[1].split("## Speed")[0]
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
    speeds = text.split("## Speed and size")[1].split("## Plots")[0]
    assert (
        f"| teacher | 1,000 | 2,000 | 1 | 9 | 0.7 | 10 | not run | `{folder}/speed/teacher.json` |"
        in speeds
    )
    assert "| sft-seed0 | not run |" in speeds


def test_an_unexpected_order_is_told(tmp_path):
    figures = {
        "a-seed0": (9.0, 5.0, 0.4),
        "a-seed1": (9.1, 5.1, 0.5),
        "b-seed0": (8.0, 6.0, 0.1),
        "b-seed1": (8.1, 6.1, 0.2),
    }
    text = what_the_numbers_say(numbers(tmp_path, figures), ["a", "b"])
    assert "by KL to teacher: not found; measured b < a" in text
    assert "do not agree on the order" in text and "chat perplexity: a < b" in text


def test_without_teacher_and_start_the_shares_are_not_run(tmp_path):
    summary = numbers(tmp_path, {"a": (9.0, 5.0, 0.4)})
    assert summary["models"]["teacher"]["text_perplexity"] == "not run"
    for metric in ("kl_removed", "text_gap_closed", "chat_gap_closed"):
        assert summary["settings"]["a"]["metrics"][metric] == "not run"


def test_a_teacher_no_better_than_the_start_leaves_no_gap(tmp_path):
    figures = {"teacher": (9.0, 5.0, None), "start": (8.0, 6.0, 0.4), "a": (7.0, 5.5, 0.3)}
    metrics = numbers(tmp_path, figures)["models"]["a"]
    assert metrics["text_gap_closed"] == "no gap"
    assert metrics["chat_gap_closed"] == pytest.approx(0.5)


def test_results_of_other_rows_or_of_other_weights_are_refused(tmp_path):
    write(tmp_path / "rows", **{"start": {"rows_hash": "others"}})
    with pytest.raises(ValueError, match="rows_hash differs .*others: start"):
        read_results([str(tmp_path / "rows")])
    write(tmp_path / "weights")
    file = tmp_path / "weights" / "agreement" / "start.json"
    file.write_text(
        file.read_text().replace('"model_files_hash": "start"', '"model_files_hash": "x"')
    )
    with pytest.raises(ValueError, match="start: .* different model files"):
        read_results([str(tmp_path / "weights")])
    with pytest.raises(ValueError, match="run eval/perplexity.py"):
        inside("report.py", "--results", tmp_path / "nothing")


def test_a_model_of_two_runs_is_refused_and_two_runs_stand_in_one_table(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, {"teacher": (20.0, 8.0, None), "a-seed0": (30.0, 9.0, 0.2)})
    write(two, {"b-seed0": (31.0, 9.5, 0.3)})
    metrics, files = read_metrics([str(one), str(two)])
    assert set(metrics["text perplexity"].models) == {"teacher", "a-seed0", "b-seed0"}
    assert len(files) == 7
    with pytest.raises(ValueError, match="give every model a name of its own"):
        read_metrics([str(one), str(one)])
    write(two, {"c": (31.0, 9.5, 0.3)}, c={"rows_hash": "others"})
    with pytest.raises(ValueError, match="text perplexity: rows_hash differs"):
        read_metrics([str(one), str(two)])


def test_one_seed_has_no_deviation_and_no_test():
    assert spread([3.0]).deviation is None
    assert difference([3.0], [1.0, 2.0]).p_value is None
    assert difference([2.0, 2.0], [1.0, 1.0]).note == "no spread between seeds: no test"
    assert overlap(spread([3.0]), spread([1.0, 2.0])) is None


def test_a_large_p_value_is_called_no_difference():
    found = difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    sentence = pair_sentence(
        {
            **{"metric": "forward_kl", "first": "a", "second": "b", "ranges_overlap": True},
            **{"difference": found.value, "standard_error": found.standard_error},
            **{"p_value": found.p_value, "p_holm": found.p_value, "note": found.note},
        }
    )
    assert "no difference that these seeds can show" in sentence
