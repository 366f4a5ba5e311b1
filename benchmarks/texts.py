"""Docstrings of installed packages, which several benchmarks use as text."""

import runpy
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "data/quickstart/docstrings.py"


def read_docs(files: int) -> list[Any]:
    """Docstrings (`name`, `text`) of the first source files that the quickstart's data uses."""
    script = runpy.run_path(str(SCRIPT))
    sources = script["source_files"]()[:files]
    return [doc for source in sources for doc in script["read_docstrings"](source)]
