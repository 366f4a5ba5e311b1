"""A model's answers to the turns of a question set: what a judge reads.

Rows are in FastChat's answer format, appended as they come; a rerun asks only what is missing.
"""

from pathlib import Path

from tqdm import tqdm

from kd.distributed import barrier, device, rank, share_of
from kd.evaluation.judge.questions import Question
from kd.evaluation.models import fingerprint
from kd.generation.engines import LocalEngine
from kd.generation.records import append, cut_torn_lines, read_records, record_file
from kd.generation.sampling import digest

# MT-Bench's own: Zheng et al. 2023, "Judging LLM-as-a-Judge", and FastChat's configuration.
TEMPERATURES = {"stem": 0.1, "humanities": 0.1, "writing": 0.7, "roleplay": 0.7} | dict.fromkeys(
    ("math", "coding", "reasoning", "extraction"), 0.0
)
OTHER_TEMPERATURE = 0.7


def answer_key(path: str, question: Question, max_new_tokens: int, seed: int) -> str:
    asked = [question.id, question.category, question.turns]
    return digest([fingerprint(path), asked, max_new_tokens, seed])


def answer_questions(
    name: str,
    path: str,
    questions: list[Question],
    folder: Path,
    dtype: str,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> dict[str, list[str]]:
    """{question id: an answer a turn} of the model at `path`; what is missing is answered now."""
    keys = {q.id: answer_key(path, q, max_new_tokens, seed) for q in questions}
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        cut_torn_lines(str(folder), name)
    barrier()
    known = answers_by_key(folder, name)
    barrier()  # nobody appends before all have read
    missing = [q for q in questions if keys[q.id] not in known]
    mine = share_of(missing)
    if mine:
        engine = LocalEngine(path, dtype, device(), max_new_tokens)
        with open(record_file(str(folder), name, rank()), "a") as file:
            for batch in tqdm(
                batches(mine, batch_size), desc=name, unit="batch", disable=rank() > 0
            ):
                talks = all_turns(engine, batch, [keys[q.id] for q in batch])
                for question, turns in zip(batch, talks, strict=True):
                    row = {"key": keys[question.id], "question_id": question.id, "model_id": name}
                    append(file, row | {"choices": [{"index": 0, "turns": turns}]})
    barrier()
    known = answers_by_key(folder, name)
    return {q.id: known[keys[q.id]] for q in questions}


def answers_by_key(folder: Path, name: str) -> dict[str, list[str]]:
    rows = read_records(str(folder), name)
    return {row["key"]: row["choices"][0]["turns"] for row in rows}


def batches(questions: list[Question], size: int) -> list[list[Question]]:
    """Of one temperature and number of turns each."""
    groups: dict[tuple, list[Question]] = {}
    for question in questions:
        groups.setdefault((temperature_of(question), len(question.turns)), []).append(question)
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def temperature_of(question: Question) -> float:
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def all_turns(engine: LocalEngine, batch: list[Question], keys: list[str]) -> list[list[str]]:
    """The answers of every turn, each asked with the answers before it."""
    talks: list[list[dict]] = [[] for _ in batch]
    answers: list[list[str]] = [[] for _ in batch]
    for turn in range(len(batch[0].turns)):
        for talk, question in zip(talks, batch, strict=True):
            talk.append({"role": "user", "content": question.turns[turn]})
        seeds = [int(digest([key, turn])[:15], 16) for key in keys]
        found = engine.answer(talks, seeds, temperature_of(batch[0]))
        for talk, said, answer in zip(talks, answers, found, strict=True):
            said.append(answer.text)
            talk.append({"role": "assistant", "content": answer.text})
    return answers
