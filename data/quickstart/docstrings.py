"""Write the data of the quickstart: docstrings of the installed Python packages.

python data/quickstart/docstrings.py --out_dir runs/quickstart/data

text_train.jsonl and text_heldout.jsonl hold plain text. chat_train.jsonl and chat_heldout.jsonl
hold questions ("What does X do?") that the first paragraph of a docstring answers.
prompts_train.jsonl holds the questions of chat_train.jsonl. Whole modules are held out, by a hash
of their names, so other versions of a package give the same split. Near-duplicates of earlier rows
(MinHash) are dropped, held-out rows last, so no held-out row has a near-duplicate in training.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from kd.data.near_duplicates import NearDuplicates

PACKAGES = ("torch", "transformers", "numpy", "pandas", "scipy", "matplotlib", "datasets",
            "accelerate", "peft", "deepspeed", "bitsandbytes", "pyarrow", "fsspec",
            "huggingface_hub", "sympy", "networkx", "jinja2", "aiohttp", "tensorboard",
            "safetensors")  # fmt: skip
HELDOUT_SHARE = 0.05
NEAR_DUPLICATE = 0.7  # Jaccard similarity of word trigrams
ONE_SENTENCE, IN_FULL = "Answer in one sentence.", "Answer in full."


@dataclass(frozen=True)
class Docstring:
    module: str
    name: str
    kind: str  # "module", "class" or "function"
    text: str

    @property
    def heldout(self) -> bool:
        return fraction(self.module) < HELDOUT_SHARE


def fraction(key: str) -> float:
    """A number in [0, 1) that depends only on the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def source_files() -> list[tuple[str, Path]]:
    """(dotted module, file) of the standard library and of the installed PACKAGES."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    site = Path(sysconfig.get_paths()["purelib"])
    roots = [(stdlib, stdlib), *((site, site / package) for package in PACKAGES)]
    files = []
    for base, root in roots:
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            if {"test", "tests", "testing", "idle_test", "lib2to3"} & set(parts):
                continue
            if base == stdlib and "site-packages" in parts:
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files.append((".".join(parts), file))
    return files


def read_docstrings(source: tuple[str, Path]) -> list[Docstring]:
    """All docstrings of one file; none if this interpreter cannot parse it."""
    module, file = source
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    found = []

    def visit(node: ast.AST, name: str) -> None:
        kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
        text = ast.get_docstring(node)
        if text and text.isascii():
            found.append(Docstring(module, name, kind, inspect.cleandoc(text).strip()))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return found


def first_paragraph(text: str) -> str | None:
    """The first paragraph on one line, or None if it is not prose."""
    paragraph = re.sub(r"\s+", " ", text.split("\n\n")[0]).strip()
    prose = len(paragraph.split()) >= 5 and paragraph[0].isupper() and paragraph.endswith(".")
    marks = re.search(r"[`{}<>=|\\]|>>>|--|::|\*\*", paragraph)
    return paragraph if prose and not marks and len(paragraph) <= 300 else None


def first_sentence(paragraph: str) -> str:
    return re.split(r"(?<=[a-z)]\.) (?=[A-Z])", paragraph)[0]


def chat_row(doc: Docstring) -> dict | None:
    """A question about one object, a third each without system prompt, ONE_SENTENCE and IN_FULL."""
    answer = first_paragraph(doc.text)
    if answer is None or doc.name.rsplit(".", 1)[-1].startswith("_"):
        return None
    name = ".".join(doc.name.split(".")[-3:])
    question = f"What does {name} do?" if doc.kind == "function" else f"What is {name}?"
    system = (None, ONE_SENTENCE, IN_FULL)[int(fraction(doc.name) * 1e6) % 3]
    if system == ONE_SENTENCE:
        answer = first_sentence(answer)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def text_row(doc: Docstring) -> dict | None:
    if len(doc.text) < 80:
        return None
    return {"text": f"{doc.name}\n\n{doc.text}"}


def rows(docs: list[Docstring]) -> Iterator[tuple[str, dict]]:
    """(file stem, row) without near-duplicates, training rows first."""
    texts, answers = (NearDuplicates(NEAR_DUPLICATE, permutations=32) for _ in range(2))
    ordered = sorted(docs, key=lambda doc: doc.heldout)
    for doc in tqdm(ordered, desc="dropping near-duplicates", unit="docstring"):
        split = "heldout" if doc.heldout else "train"
        text, chat = text_row(doc), chat_row(doc)
        if text and not texts.seen(doc.text):
            yield f"text_{split}", text
        if chat and not answers.seen(chat["messages"][-1]["content"]):
            yield f"chat_{split}", chat
            if not doc.heldout:
                yield "prompts_train", {"prompt": chat["messages"][-2]["content"]}


def write_rows(out_dir: Path) -> dict[str, int]:
    """Write the files and return the number of rows in each."""
    files = source_files()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(read_docstrings, files, chunksize=32)
        progress = tqdm(found, total=len(files), desc="reading docstrings", unit="file")
        docs = [doc for docs in progress for doc in docs]
    out: dict[str, list[str]] = {}
    for stem, row in rows(docs):
        out.setdefault(stem, []).append(json.dumps(row))
    out_dir.mkdir(parents=True, exist_ok=True)
    for stem, lines in out.items():
        # Modules are in alphabetical order; after this fixed shuffle any first n rows are a sample.
        lines.sort(key=fraction)
        temporary = out_dir / f"{stem}.jsonl.tmp"
        temporary.write_text("\n".join(lines) + "\n")
        temporary.rename(out_dir / f"{stem}.jsonl")
    return {stem: len(lines) for stem, lines in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out_dir", type=Path, required=True)
    for stem, count in sorted(write_rows(parser.parse_args().out_dir).items()):
        print(f"{stem}.jsonl: {count} rows")


if __name__ == "__main__":
    main()
