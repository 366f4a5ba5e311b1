"""The README and the guides: their length, numbers, paths, links and Python snippets.

Their commands are in tests/test_commands.py.
"""

import json
import re

import pytest
from documentation import PAGES, links, local_paths, snippets
from processes import ROOT, succeed

README = (ROOT / "README.md").read_text()
MEMORY = (ROOT / "docs/memory.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("snippet", snippets())
def test_snippet_of_the_guides_prints_an_answer(snippet):
    assert len(succeed("python", "-c", snippet).splitlines()[-1].split()) >= 2


def test_readme_is_short():
    assert len(README.splitlines()) <= 125


def test_metrics_of_the_quickstart_are_those_of_the_committed_run():
    results = json.loads((ROOT / "benchmarks/results/quickstart_cpu.json").read_text())
    for name in ("sft", "distill+sft", "distill"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        cells = results["settings"][name]["metrics"]
        for metric, places in (("text_perplexity", 2), ("chat_perplexity", 2), ("forward_kl", 3)):
            mean, deviation = cells[metric]["mean"], cells[metric]["deviation"]
            assert f"| {mean:.{places}f} +/- {deviation:.{places}f} |" in row
        for metric in ("top1_agreement", "kl_removed"):
            assert f"| {100 * cells[metric]['mean']:.1f} % |" in row
    for name in ("teacher", "start"):
        row = next(line for line in README.splitlines() if line.startswith(f"| {name},"))
        for metric in ("text_perplexity", "chat_perplexity"):
            assert f"| {results['settings'][name]['metrics'][metric]['mean']:.2f} |" in row


def test_table_of_plans_is_that_of_the_committed_plans():
    results = ROOT / "benchmarks/results"
    plans = json.loads((results / "plan_recipes.json").read_text())["plans"]
    rows = MEMORY.split("| run | machine |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) == len(plans)
    for row, plan in zip(rows, plans.values(), strict=True):
        _, _, size, at_a_time, seconds = (cell.strip() for cell in row.strip("|").split("|"))
        assert size.split(",")[0] == f"{plan['total'] / 2**30:.1f}"
        assert at_a_time == str(plan["rows"])
        assert not seconds or float(seconds) == float(f"{plan['step_s']:.2g}")
    measured = json.loads((results / "plan_cpu.json").read_text())
    off = [round(100 * (1 / row["ratio"] - 1)) for row in measured if abs(row["ratio"] - 1) > 0.08]
    assert "nine of twelve layouts" in MEMORY and len(measured) == 12 and len(off) == 3
    told = {way: re.findall(rf"(\d+) % {way} than planned", MEMORY) for way in ("more", "less")}
    assert [share for share in off if share > 0] == [int(share) for share in told["more"]]
    assert [-share for share in off if share < 0] == [int(share) for share in told["less"]]


def test_every_path_that_a_page_names_exists():
    paths = {path for page in PAGES for path in local_paths((ROOT / page).read_text())}
    paths = {path for path in paths if "NAME" not in path} - {"launch/slurm/site.sh"}  # a user's
    assert len(paths) > 60
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    assert not [str(path) for path in links(page) if not path.exists()]
