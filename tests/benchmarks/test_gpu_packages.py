"""Every part of benchmarks/gpu.py imports on a machine with only the image and the wheels."""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from processes import ROOT

GPU, WHEELS = (runpy.run_path(str(ROOT / f"benchmarks/{name}.py")) for name in ("gpu", "wheels"))
PARTS = [part for parts in GPU["known_parts"]().values() for part in parts]
NOT_CALLED = {"openai"}  # a client of servers, which no part uses
IMPORT_ALL = """
import json, sys, runpy, importlib
import pytest
files = json.loads(sys.argv[1])
tests = [file for file in files["entries"] if file.startswith("tests/")]
failed = {}
for file in set(files["entries"]) - set(tests):
    try:
        sys.path.insert(0, file.rpartition("/")[0])
        runpy.run_path(file, run_name="imported")
    except ImportError as error:
        failed[file] = error.name
for name in files["modules"]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = error.name
code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *tests])
absent = [name for name in files["third"] if importlib.util.find_spec(name) is None]
print(json.dumps({"failed": failed, "collected": int(code), "absent": absent}))
"""


def packages() -> set[str]:
    """The packages of the image and of the wheels, from the metadata of the installed packages."""
    waiting, found = [*WHEELS["ROOTS"], *WHEELS["IMAGE"]], set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # trl and liger-kernel
            continue
        waiting += [need.name for need in WHEELS["needs_of"](name, lines, "3.12")]
    return found


def gpu_machine(folder: Path) -> Path:
    """A virtual environment that has only these packages, as links; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in packages():
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__", "bin"}:
            if not (site / top).exists():
                (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    return folder / "bin" / "python"


def entries() -> list[str]:
    """The scripts and test files of the parts, and those of the quickstart, which is a part."""
    commands = [word for part in PARTS for word in part.command]
    commands.append((ROOT / "launch/quickstart.sh").read_text())
    return sorted(set(re.findall(r"\b[\w/]+\.py\b", "\n".join(commands))))


def imports(file: Path) -> set[str]:
    """The modules that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_file(module: str, folder: Path) -> Path | None:
    """The file of a module of the repository, or of the importing file's folder."""
    path = Path(*module.split("."))
    places = [ROOT / f"{path}.py", ROOT / path / "__init__.py", folder / f"{path}.py"]
    places.append(ROOT / "tests" / f"{path}.py")
    return next((place for place in places if place.is_file()), None)


def is_own(package: str, folder: Path) -> bool:
    """Whether a package or module is one of the repository or of its tests."""
    return own_file(package, folder) is not None or (ROOT / "tests" / package).is_dir()


def reached(files: list[str]) -> tuple[set[str], set[str]]:
    """(modules of kd, names of other packages) that these files import, directly or not."""
    waiting, seen, modules, third = [ROOT / file for file in files], set(), set(), set()
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imports(file):
            if own := own_file(name, file.parent):
                waiting.append(own)
                modules |= {name} if name.startswith("kd.") else set()
            elif not is_own(name.split(".")[0], file.parent):
                third.add(name.split(".")[0])
    return modules, third - sys.stdlib_module_names


def test_every_import_of_a_part_is_in_the_image_or_among_the_wheels():
    _, third = reached(entries())
    assert {"torch", "datasketch", "datasets", "trl"} <= third  # found through several files
    owners = importlib.metadata.packages_distributions()
    known = packages()
    unknown = [
        name
        for name in third - NOT_CALLED
        if not known & {canonicalize_name(owner) for owner in owners.get(name, [name])}
    ]
    assert unknown == []


@pytest.mark.slow
def test_every_part_imports_on_the_gpu_machine(tmp_path):
    """The machine has the image and the wheels, and no other package of requirements.txt."""
    modules, third = reached(entries())
    work = {"entries": entries(), "modules": sorted(modules), "third": sorted(third)}
    python = gpu_machine(tmp_path / "machine")
    done = subprocess.run(
        [python, "-c", IMPORT_ALL, json.dumps(work)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    failed = {file: name for file, name in found["failed"].items() if name not in NOT_CALLED}
    assert failed == {} and found["collected"] == 0, done.stdout[-2000:]
    assert set(found["absent"]) <= {*NOT_CALLED, "trl", "liger_kernel"}  # not installed here


def test_the_wheels_and_the_repository_fit_one_transfer():
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    size = sum((ROOT / name).stat().st_size for name in files if (ROOT / name).is_file())
    limit = WHEELS["arguments"]([]).limit_mb
    assert size + 1e6 * limit <= 64 * 2**20
