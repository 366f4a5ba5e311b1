"""The files of MT-Bench and AlpacaEval: questions, references and answers, in either's format.

JSON lines or one JSON list. FastChat's: {question_id, category, turns} and {question_id, choices:
[{turns}]}. AlpacaEval's: {instruction, dataset} and {instruction, output}.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from kd.recipe import require_file


@dataclass(frozen=True)
class Question:
    id: str
    category: str  # the subset, in AlpacaEval's words
    turns: list[str]


def read_rows(key: str, file: str) -> list[dict]:
    """Raises ValueError naming the file where it is missing, or no list of objects."""
    require_file(key, file)
    text = Path(file).read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {file}: not JSON lines or a JSON list: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key}: {file}: wanted objects, found {str(rows)[:60]}")
    return rows


def read_questions(file: str) -> list[Question]:
    """In the file's order. Raises ValueError for rows of another form, and for ids given twice."""
    found = []
    for i, row in enumerate(read_rows("questions", file)):
        if isinstance(row.get("turns"), list) and "question_id" in row:
            id_, turns = str(row["question_id"]), row["turns"]
            found.append(Question(id_, row.get("category", "all"), turns))
        elif isinstance(row.get("instruction"), str):
            found.append(Question(str(i), row.get("dataset", "all"), [row["instruction"]]))
        else:
            raise ValueError(
                f"questions: {file}, row {i + 1}: fields {sorted(row)}; wanted question_id and "
                "turns (MT-Bench), or instruction (AlpacaEval)"
            )
    ids = [question.id for question in found]
    double = {id_ for id_ in ids if ids.count(id_) > 1}
    if double:
        raise ValueError(f"questions: {file}: question_id given twice: {sorted(double)}")
    return found


def read_answers(key: str, file: str, questions: list[Question]) -> dict[str, list[str]]:
    """{question id: an answer a turn} of those questions that the file answers."""
    by_instruction = {question.turns[0]: question.id for question in questions}
    known = {question.id for question in questions}
    found = {}
    for row in read_rows(key, file):
        if "choices" in row:
            id_, turns = str(row["question_id"]), row["choices"][0]["turns"]
        elif "instruction" in row and "output" in row:
            id_, turns = by_instruction.get(row["instruction"]), [row["output"]]
        else:
            raise ValueError(
                f"{key}: {file}: fields {sorted(row)}; wanted question_id and choices (MT-Bench), "
                "or instruction and output (AlpacaEval)"
            )
        if id_ in known:
            found[id_] = turns
    return found


def check_answered(name: str, answers: dict[str, list[str]], questions: list[Question]) -> None:
    """Raise ValueError where a turn of a question has no answer."""
    missing = [q.id for q in questions if len(answers.get(q.id, [])) < len(q.turns)]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(questions)} questions are not answered in all their "
            f"turns, the first is {missing[0]}; give the answers to these questions"
        )
