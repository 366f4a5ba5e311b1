"""Every command and every snippet of the README runs as it is written."""

import json
import re
import shlex

import pytest
from processes import ROOT, start, succeed

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.M | re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
INLINE = [c for c in re.findall(r"`([^`\n]+)`", TEXT) if c.startswith("launch/") and "train/" in c]
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def quickstart():
    """What the commands read. tests/launch runs it from its first line, so here it only goes on."""
    if not (ROOT / "runs" / "quickstart" / "report.json").exists():
        succeed("launch/quickstart.sh", timeout=1800)


@pytest.mark.slow
@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_command_of_the_readme_runs(command):
    words = shlex.split(command, comments=True)
    if words == ["launch/quickstart.sh"]:
        return  # run from its first line in tests/launch/test_quickstart.py
    here = "--cpu" in words or "train/plan.py" in words  # a plan needs neither GPUs nor weights
    if words[0] in ("launch/2xt4.sh", "launch/2xa100.sh") and not here:
        words.insert(1, "--dry-run")  # the GPUs and the hub are not here
    done = start(*words)
    # A finished process may still be aborted by gloo, so a training is judged by its last words.
    assert done.returncode == 0 or "saved to" in done.stdout, done.stdout[-6000:]


@pytest.mark.slow
@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_of_the_readme_prints_an_answer(snippet):
    assert len(succeed("python", "-c", snippet).splitlines()[-1].split()) >= 2


def test_figures_of_the_table_are_those_of_the_committed_run():
    results = json.loads((ROOT / "benchmarks/results/quickstart_cpu.json").read_text())
    for name in ("sft", "distill+sft", "distill"):
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
        cells = results["settings"][name]["metrics"]
        for metric, places in (("text_perplexity", 2), ("chat_perplexity", 2), ("forward_kl", 3)):
            mean, deviation = cells[metric]["mean"], cells[metric]["deviation"]
            assert f"| {mean:.{places}f} +/- {deviation:.{places}f} |" in row
        for metric in ("top1_agreement", "kl_removed"):
            assert f"| {100 * cells[metric]['mean']:.1f} % |" in row
    for name in ("teacher", "start"):
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| {name},"))
        for metric in ("text_perplexity", "chat_perplexity"):
            assert f"| {results['settings'][name]['metrics'][metric]['mean']:.2f} |" in row


def test_figures_of_the_plans_are_those_of_the_committed_plans():
    results = ROOT / "benchmarks/results"
    plans = json.loads((results / "plan_recipes.json").read_text())["plans"]
    rows = TEXT.split("| run | machine |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) == len(plans)
    for row, plan in zip(rows, plans.values(), strict=True):
        _, _, size, at_a_time, seconds = (cell.strip() for cell in row.strip("|").split("|"))
        assert size.split(",")[0] == f"{plan['total'] / 2**30:.1f}"
        assert at_a_time == str(plan["rows"])
        assert not seconds or float(seconds) == float(f"{plan['step_s']:.2g}")
    measured = json.loads((results / "plan_cpu.json").read_text())
    off = [1 / row["ratio"] - 1 for row in measured if abs(row["ratio"] - 1) > 0.08]
    assert len(measured) == 10 and [round(100 * share) for share in off] == [18]


def test_every_path_of_the_readme_exists():
    paths = set(re.findall(r"(?:train|eval|launch|recipes|ds_configs|tests)/[\w./-]*\.\w+", TEXT))
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
