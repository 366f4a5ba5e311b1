"""Read the files of MT-Bench and AlpacaEval: questions, references, answers, difficulties.

A file holds JSON lines or one JSON list. MT-Bench (FastChat): {question_id, category, turns} and
{question_id, choices: [{turns}]}. AlpacaEval: {instruction, dataset} and {instruction, output}.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from kd.recipe import require_file


@dataclass(frozen=True)
class Question:
    """A question with one or several turns."""

    id: str
    category: str  # AlpacaEval: the dataset
    turns: list[str]


def read_rows(key: str, file: str) -> list[dict]:
    """Read JSON objects. Raises ValueError if the file is missing or holds anything else."""
    require_file(key, file)
    text = Path(file).read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {file}: neither JSON lines nor a JSON list: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key}: {file}: found {str(rows)[:60]}; wanted objects")
    return rows


def read_questions(file: str) -> list[Question]:
    """Read the questions in order. Raises ValueError for invalid rows and duplicate ids."""
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
    duplicates = {id_ for id_ in ids if ids.count(id_) > 1}
    if duplicates:
        raise ValueError(
            f"questions: {file}: question_id {sorted(duplicates)} found several times; wanted "
            "unique ids"
        )
    return found


def read_answers(key: str, file: str, questions: list[Question]) -> dict[str, list[str]]:
    """Read {question id: one answer per turn} for the questions that the file answers.

    Raises ValueError for an invalid row; `key` names the setting in the message.
    """
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
    """Raise ValueError if a turn of a question has no answer."""
    missing = [q.id for q in questions if len(answers.get(q.id, [])) < len(q.turns)]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(questions)} questions have turns without an answer, "
            f"the first is {missing[0]}; give answers to these questions"
        )


def read_references(file: str | None, questions: list[Question]) -> dict[str, list[str]]:
    """Read reference answers to some of the questions; without a file there are none.

    Raises ValueError if a question has references for only some of its turns.
    """
    if not file:
        return {}
    references = read_answers("references", file, questions)
    check_answered("references", references, [q for q in questions if q.id in references])
    return references


def read_difficulties(file: str | None, questions: list[Question]) -> dict[str, float] | None:
    """Read {question index: instruction difficulty}; without a file None.

    Raises ValueError if a column is missing, or the difficulty of a question.
    """
    if file is None:
        return None
    with open(file, newline="") as stream:
        header, *lines = list(csv.reader(stream)) or [[]]
    if "instruction_difficulty" not in header[1:]:
        raise ValueError(
            f"instruction_difficulty: {file} has the columns {header}; wanted index and "
            "instruction_difficulty"
        )
    column = header.index("instruction_difficulty")
    difficulties = {line[0]: float(line[column]) for line in lines}
    missing = [question.id for question in questions if question.id not in difficulties]
    if missing:
        raise ValueError(
            f"instruction_difficulty: {file} lacks {len(missing)} questions, the first is "
            f"{missing[0]}; wanted the difficulties of these questions, or no file"
        )
    return difficulties
