"""Local rows of a benchmark, checked before a model is loaded: the fields that its task reads.

lm_eval takes a field that a row lacks for a literal text, and a target that is no choice for a
wrong answer: all rows would score 0.
"""

from pathlib import Path

from jinja2 import Environment, meta
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from kd.data.files import BadRow, read_file

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")


def check_rows(task: str, files: dict[str, str], manager: TaskManager, folder: Path) -> None:
    """Check the rows, {split: file}, of a task whose task file is in `folder`.

    Raises ValueError that names the row and the fields that were found and wanted.
    """
    config = load_yaml(folder / f"{task}.yaml", resolve_func=False)
    wanted = [] if "process_docs" in config else sorted(fields_read(config))
    found: list[str] = []
    for file in files.values():
        try:
            reader = read_file(file)
        except ValueError as error:
            raise ValueError(f"task_data: {task}: {error}") from error
        for place, row in reader.rows(range(len(reader))):
            if isinstance(row, BadRow):
                raise ValueError(f"task_data: {task}: {row}")
            found = found or list(row)
            missing = [field for field in wanted if field not in row]
            if missing:
                raise ValueError(
                    f"task_data: {task}: {place} has no field {', '.join(missing)}; found "
                    f"{', '.join(row)}; wanted {', '.join(wanted)}, as in lm_eval's data set"
                )
    try:
        for loaded in manager.load([task])["tasks"].values():
            for number, document in enumerate(loaded.eval_docs, 1):
                check_target(loaded, document, f"task_data: {task}: row {number}")
    except BadTarget:
        raise
    except Exception as error:  # the functions of a task may raise anything
        told = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"task_data: {task}: lm_eval cannot read rows with the fields {', '.join(found)} "
            f"({type(error).__name__}: {told}); wanted rows as in its data set of {task}"
        ) from error


class BadTarget(ValueError):
    """The target of a row is not one of its choices."""


def fields_read(config: dict) -> set[str]:
    """Return the fields that the templates of a task name; those of its functions are unknown."""
    fields: set[str] = set()
    for template in (config.get(key) for key in TEMPLATES):
        if isinstance(template, str) and template.isidentifier():
            fields.add(template)
        elif isinstance(template, str):
            fields |= meta.find_undeclared_variables(Environment().parse(template))
    return fields


def check_target(task: object, document: dict, place: str) -> None:
    """Raise BadTarget if a document's target is not one of its choices, as lm_eval counts them."""
    if task.OUTPUT_TYPE != "multiple_choice":
        task.doc_to_text(document), task.doc_to_target(document)
        return
    choices = task.doc_to_choice(document)
    target = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    for answer in target if isinstance(target, list) else [target]:
        valid = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
        if not valid:
            raise BadTarget(
                f"{place}: the answer is {answer!r}; wanted one of {choices} or its number"
            )
