"""benchmarks/README.md shows exactly the contents of benchmarks/results."""

import json
import re

from documentation import GUIDES
from processes import ROOT, succeed

README = ROOT / "benchmarks/README.md"
RESULTS = ROOT / "benchmarks/results"


def without_commits(text: str) -> str:
    """Remove commit hashes: a rebase changes them, and a copy of the tree has no history."""
    return re.sub(r", commit \w+", "", text)


def test_the_page_matches_the_results():
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


def test_an_unknown_benchmark_shows_its_plain_values(tmp_path):
    metrics = {"setting": "a", "rows": [{"kind": "x", "seconds": 1.23456}, {"kind": "y"}]}
    parts = [{"name": "new", "state": "ok", "seconds": 1.0, "metrics": metrics}]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"machine": {}, "commit": None, "parts": parts}))
    output = succeed("python", "benchmarks/readme.py", "--gpu", file)
    assert "| kind | seconds |" in output and "| x | 1.235 |" in output and "| y |  |" in output


def values_of(data) -> list[float]:
    if isinstance(data, dict | list):
        parts = data.values() if isinstance(data, dict) else data
        return [value for part in parts for value in values_of(part)]
    return [float(data)] if isinstance(data, int | float) else []


def is_value(number: str, values: list[float]) -> bool:
    """Whether a value rounds to the number, as it is or as a percentage (of 1, or above 1)."""
    places = len(number.split(".")[1])
    ways = (value for v in values for value in (v, 100 * v, 100 * (v - 1)))
    return any(f"{value:.{places}f}" == number for value in ways)


def test_every_decimal_next_to_a_results_link_is_in_that_file():
    checked = 0
    guides = "\n\n".join((ROOT / page).read_text() for page in GUIDES)
    for paragraph in guides.split("\n\n"):
        files = re.findall(r"benchmarks/results/([\w/]+)\.(?:json|md)", paragraph)
        values = [
            v for f in files for v in values_of(json.loads((RESULTS / f"{f}.json").read_text()))
        ]
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", paragraph) if files else []:
            assert is_value(number, values), f"{number} is in none of {files}: {paragraph}"
            checked += 1
    assert checked >= 11
