"""Collect the answers to judge: from files, or from models that answer the questions now.

Answers of models are recorded in FastChat's format as they come; a rerun generates only the rest.
"""

from pathlib import Path

from tqdm import tqdm

from kd.distributed import barrier, rank, share_of
from kd.evaluation.judge.judgements import Answers
from kd.evaluation.judge.questions import Question, check_answered, read_answers
from kd.evaluation.models import fingerprint
from kd.generation.engines import LocalEngine
from kd.generation.records import (
    append_record,
    cut_torn_lines,
    digest,
    read_records,
    record_file,
)
from kd.gpu import device
from kd.settings.judge import JudgeSettings

# MT-Bench: Zheng et al. 2023, "Judging LLM-as-a-Judge", and FastChat's configuration.
TEMPERATURES = {"stem": 0.1, "humanities": 0.1, "writing": 0.7, "roleplay": 0.7} | dict.fromkeys(
    ("math", "coding", "reasoning", "extraction"), 0.0
)
DEFAULT_TEMPERATURE = 0.7


def collect_answers(settings: JudgeSettings, questions: list[Question]) -> dict[str, Answers]:
    """Collective: {name: answers} of all models and answer files.

    Raises ValueError, before any model answers, if a file lacks an answer.
    """
    from_files = {
        name: read_answers(name, file, questions) for name, file in settings.named_answers.items()
    }
    for name, answers in from_files.items():
        check_answered(name, answers, questions)
    from_models = {
        name: answer_questions(settings, name, path, questions)
        for name, path in settings.named_models.items()
    }
    return from_models | from_files


def answer_questions(
    settings: JudgeSettings, name: str, path: str, questions: list[Question]
) -> Answers:
    """Collective: let the model at `path` answer the questions that it has not answered yet."""
    folder = settings.folder / "answers"
    keys = {q.id: _answer_key(settings, path, q) for q in questions}
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        cut_torn_lines(str(folder), name)
    barrier()
    known = _recorded_answers(folder, name)
    barrier()  # no rank appends before all have read
    mine = share_of([q for q in questions if keys[q.id] not in known])
    if mine:
        engine = LocalEngine(path, settings.weights_dtype, device(), settings.max_new_tokens)
        batches = compose_batches(mine, settings.batch_size)
        with open(record_file(str(folder), name, rank()), "a") as file:
            for batch in tqdm(batches, desc=name, unit="batch", disable=rank() > 0):
                answers = answer_turns(engine, batch, [keys[q.id] for q in batch])
                for question, turns in zip(batch, answers, strict=True):
                    row = {"key": keys[question.id], "question_id": question.id, "model_id": name}
                    append_record(file, row | {"choices": [{"index": 0, "turns": turns}]})
    barrier()
    known = _recorded_answers(folder, name)
    return {q.id: known[keys[q.id]] for q in questions}


def _answer_key(settings: JudgeSettings, path: str, question: Question) -> str:
    asked = [question.id, question.category, question.turns]
    return digest([fingerprint(path), asked, settings.max_new_tokens, settings.seed])


def _recorded_answers(folder: Path, name: str) -> Answers:
    rows = read_records(str(folder), name)
    return {row["key"]: row["choices"][0]["turns"] for row in rows}


def compose_batches(questions: list[Question], size: int) -> list[list[Question]]:
    """Batches of questions with the same temperature and the same number of turns."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault((temperature(question), len(question.turns)), []).append(question)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def temperature(question: Question) -> float:
    """The sampling temperature of a question's category."""
    return TEMPERATURES.get(question.category, DEFAULT_TEMPERATURE)


def answer_turns(engine: LocalEngine, batch: list[Question], keys: list[str]) -> list[list[str]]:
    """Answer all turns of a batch; every prompt contains the answers of the turns before it."""
    conversations: list[list[dict]] = [[] for _ in batch]
    answers: list[list[str]] = [[] for _ in batch]
    for turn in range(len(batch[0].turns)):
        for conversation, question in zip(conversations, batch, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        seeds = [int(digest([key, turn])[:15], 16) for key in keys]
        generated = engine.answer(conversations, seeds, temperature(batch[0]))
        for conversation, turns, answer in zip(conversations, answers, generated, strict=True):
            turns.append(answer.text)
            conversation.append({"role": "assistant", "content": answer.text})
    return answers
