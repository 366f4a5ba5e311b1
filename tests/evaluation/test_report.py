"""Every number of report.json, computed again from the JSON files by other code."""

import json
import math

import numpy as np
import pytest
from held_out import command, write_jsonl
from scipy import special

from kd.evaluation.findings import pair_sentence, what_the_numbers_say
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
TEXT_TOKENS, CHAT_TOKENS, TEXT_BYTES = 400, 100, 1500
SAMPLE = {"prompt": "What is a|b?", "answers": {"distill": "<b>\n*bold*", "sft": "x" * 400}}


def likelihood(text, chat):
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
    return {"sources": sources, "kinds": kinds, "overall": overall, "rows": []}


def agreement(kl):
    means = {"forward_kl": kl, "top1_agreement": math.exp(-kl)}
    return {"sources": {"talk": means}, "kinds": {"chat": means}, "overall": means, "rows": []}


def write(folder, figures=FIGURES, **other):
    versions = {"versions": {"torch": "2"}, "commit": "abc"}
    for name, (text, chat, kl) in figures.items():
        settings = SETTINGS | {"model": name, "model_files_hash": name} | other.get(name, {})
        measured = {"perplexity": likelihood(text, chat)}
        if kl is not None:
            measured["agreement"] = agreement(kl)
        for part, result in measured.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            record = {"settings": settings, **versions, **result}
            (folder / part / f"{name}.json").write_text(json.dumps(record))


def numbers(tmp_path, figures, runs=()):
    write(tmp_path, figures)
    return summarise(read_results(str(tmp_path)), list(runs), "teacher", "start")


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
    for plot in ("perplexity_and_kl.png", "training_curves.png"):
        assert f"]({plot})" in text
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    for file in [*folder.glob("perplexity/*.json"), *folder.glob("agreement/*.json")]:
        assert f"{file.parent.name}/{file.name}" in text
        assert file.stem in data["origin"][file.parent.name]
    assert '"max_length": 64' in text and '"torch": "2"' in text
    assert "checkpoint-20/trainer_state.json" in text
    assert ran.stdout.rstrip().endswith(f"wrote {folder / 'report.md'}")


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
        read_results(str(tmp_path / "rows"))
    write(tmp_path / "weights")
    file = tmp_path / "weights" / "agreement" / "start.json"
    file.write_text(
        file.read_text().replace('"model_files_hash": "start"', '"model_files_hash": "x"')
    )
    with pytest.raises(ValueError, match="start: .* different model files"):
        read_results(str(tmp_path / "weights"))
    with pytest.raises(ValueError, match="run eval/perplexity.py"):
        read_results(str(tmp_path / "nothing"))


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
            **{"p_value": found.p_value, "note": found.note},
        }
    )
    assert "no difference that these seeds can show" in sentence
