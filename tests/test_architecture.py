"""Imports go one way: rooms of kd/ form layers, files form no circle, scripts import no scripts."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from processes import ROOT

# A room imports itself and the rooms before it.
LAYERS = (
    "credentials", "distributed", "gpu", "recipe", "model_files", "pretrained", "settings", "run",
    "data", "losses", "models", "planning", "teachers", "generation", "training", "evaluation",
)  # fmt: skip
SCRIPTS = ("train", "eval", "data/quickstart")
PACKAGES = {"kd", "train", "eval", "benchmarks", "tests", "launch", "recipes"}
LIBRARY = sorted((ROOT / "kd").rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in LIBRARY}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


def room(module: str) -> str | None:
    """The part of kd/ that a module belongs to; None for `kd` itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


@pytest.mark.parametrize("file", LIBRARY, ids=module_name)
def test_a_room_imports_only_the_rooms_before_it(file):
    here = room(module_name(file))
    for module in imports(file):
        top = module.split(".")[0]
        assert top == "kd" or top not in PACKAGES, f"kd imports {module}"
        if top == "kd" and (there := room(module)):
            assert LAYERS.index(there) <= LAYERS.index(here), f"kd.{here} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    graph = {module_name(file): imports(file) & MODULES for file in LIBRARY}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(graph[module]):
                visit(other)
            done.add(path.pop())

    for module in sorted(graph):
        visit(module)
    assert done == MODULES


def test_no_file_name_of_the_library_stands_for_two_things():
    stems = Counter(file.stem for file in LIBRARY if file.stem != "__init__")
    assert [stem for stem, count in stems.items() if count > 1] == []


def test_scripts_import_no_scripts():
    for folder in SCRIPTS:
        files = sorted((ROOT / folder).glob("*.py"))
        assert files, folder
        stems = {file.stem for file in files}
        for file in files:
            tops = {module.split(".")[0] for module in imports(file)}
            assert not tops & ((PACKAGES - {"kd"}) | stems), file


def test_every_room_is_a_layer_and_no_file_is_longer_than_400_lines():
    found = {file.stem if file.is_file() else file.name for file in (ROOT / "kd").iterdir()}
    assert found - {"__init__", "__pycache__"} == set(LAYERS)
    lengths = defaultdict(int)
    for folder in ("kd", "train", "eval", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            lengths[str(file.relative_to(ROOT))] = len(file.read_text().splitlines())
    assert {file: lines for file, lines in lengths.items() if lines > 400} == {}


def test_no_two_places_have_the_same_ten_lines():
    """Ten consecutive lines of code, without blank lines, imports and indentation."""
    seen: dict[tuple[str, ...], str] = {}
    repeated = []
    for folder in ("kd", "train", "eval", "benchmarks", "launch", "data", "tests"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix not in (".py", ".sh", ".sbatch"):
                continue
            lines = [line.strip() for line in file.read_text().splitlines()]
            code = [line for line in lines if line and not line.startswith(("import ", "from "))]
            for i in range(len(code) - 9):
                place = f"{file.relative_to(ROOT)}: {code[i]}"
                if seen.setdefault(tuple(code[i : i + 10]), place) != place:
                    repeated.append((seen[tuple(code[i : i + 10])], place))
    assert repeated == []
