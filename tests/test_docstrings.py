"""Public functions of kd/ state the shapes of their tensors, and the errors that they raise."""

import ast
import re
from collections.abc import Iterator

from processes import ROOT

# "(N, V)", "(B, T, H)", "(N,)", "(n)", "scalar", "(*, H)": a shape, or that there is none to give.
SHAPE = re.compile(
    r"\((?:[\w-]+|\*)(?:, ?[\w *+/-]+)*,?\)|scalar|any shape|same shape|the shape|METRICS"
)


def public_functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(place, function, docstring together with that of its class)."""
    for file in sorted((ROOT / "kd").rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in tree.body:
            nodes = [(node, "")]
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                nodes = [(part, ast.get_docstring(node) or "") for part in node.body]
            for function, about in nodes:
                if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                    place = f"{file.relative_to(ROOT)}:{function.lineno} {function.name}"
                    yield place, function, f"{about}\n{ast.get_docstring(function) or ''}"


def takes_or_returns_tensors(function: ast.FunctionDef) -> bool:
    arguments = function.args
    annotations = [a.annotation for a in (*arguments.args, *arguments.kwonlyargs)]
    names = [ast.unparse(a) for a in (*annotations, function.returns) if a is not None]
    # Batches, dict[str, Tensor], are described once, in kd/data/packing.py.
    return any(re.search(r"(?<!str, )\bTensor\b", name) for name in names)


def raises_a_users_error(function: ast.FunctionDef) -> bool:
    """Whether its own body raises ValueError; what it calls states its own errors."""
    return any(
        isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("ValueError")
        for node in ast.walk(function)
    )


def test_functions_on_tensors_state_shapes():
    missing = [
        place
        for place, function, text in public_functions()
        if takes_or_returns_tensors(function) and not SHAPE.search(text)
    ]
    assert missing == []


def test_functions_that_raise_say_so():
    missing = [
        place
        for place, function, text in public_functions()
        if raises_a_users_error(function) and not re.search(r"\b[Rr]aise", text)
    ]
    assert missing == []


def help_texts() -> Iterator[tuple[str, str]]:
    """(place, help text) of every setting in the library and the scripts."""
    for folder in ("kd", "train", "eval", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                texts = []
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "setting":
                    texts = node.args[1:2]
                elif isinstance(node, ast.Dict):
                    pairs = zip(node.keys, node.values, strict=True)
                    texts = [
                        v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "help"
                    ]
                for text in texts:
                    if isinstance(text, ast.Constant):
                        yield f"{file.relative_to(ROOT)}:{text.lineno}", text.value


def test_every_help_text_is_a_sentence_of_its_own():
    texts = list(help_texts())
    assert len(texts) > 200
    bad = [(place, text) for place, text in texts if not re.fullmatch(r"[A-Z0-9].*\.", text, re.S)]
    assert bad == []
