"""benchmarks/README.md shows what lies in benchmarks/results, and nothing else."""

import json
import re

from processes import ROOT, succeed

README = ROOT / "benchmarks/README.md"
RESULTS = ROOT / "benchmarks/results"


def without_commits(text: str) -> str:
    """A commit's name changes when it is rebased, and a copy of the tree has no history."""
    return re.sub(r", commit \w+", "", text)


def test_the_page_is_that_of_the_results():
    before = README.read_text()
    try:
        succeed("python", "benchmarks/readme.py")
        made = README.read_text()
    finally:
        README.write_text(before)
    assert without_commits(made) == without_commits(before), "run python benchmarks/readme.py"


def test_every_result_is_on_the_page_with_its_command():
    text = README.read_text()
    for file in RESULTS.glob("*.json"):
        assert f"(results/{file.name})" in text
    *sections, on_a_gpu = re.split(r"^## ", text, flags=re.M)[1:]
    assert all("\n    " in section for section in sections) and on_a_gpu.startswith("On a GPU")


def test_an_unknown_benchmark_is_shown_by_its_plain_values(tmp_path):
    figures = {"setting": "a", "rows": [{"kind": "x", "seconds": 1.23456}, {"kind": "y"}]}
    parts = [{"name": "new", "state": "ok", "seconds": 1.0, "figures": figures}]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"machine": {}, "commit": None, "parts": parts}))
    output = succeed("python", "benchmarks/readme.py", "--gpu", file)
    assert "| kind | seconds |" in output and "| x | 1.235 |" in output and "| y |  |" in output
