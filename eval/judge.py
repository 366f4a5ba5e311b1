"""Let a judge grade answers (MT-Bench), or choose the better of two (AlpacaEval).

python eval/judge.py --questions mt_bench/question.jsonl --references mt_bench/reference_gpt-4.jsonl \
    --models teacher=runs/teacher student=runs/student --judge gpt-4o --server https://api.openai.com/v1

python eval/judge.py --mode pair --questions alpaca_eval.json --answers baseline=alpaca_eval.json \
    --models student=runs/student --baseline baseline --benchmark alpaca_eval --judge gpt-4o --server ...

Any OpenAI-compatible server (the key: in the environment, OPENAI_API_KEY); without --server the judge
is a model in this process. Models answer first (--models), or their answers are given (--answers
NAME=FILE). Everything asked is kept in OUT_DIR/judge/BENCHMARK: a rerun asks only what is missing.
Numbers in OUT_DIR/judge/BENCHMARK/results/NAME.json. Grades of different judges do not compare.
"""

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kd.distributed import device, print_rank0, rank, start_gloo
from kd.evaluation.judge.judge_prompts import read_prompts
from kd.evaluation.judge.judged_answers import answer_questions
from kd.evaluation.judge.judging import (
    Judge,
    Judgement,
    pair_result,
    score_result,
    wanted_judgements,
)
from kd.evaluation.judge.local_judge import LocalJudge
from kd.evaluation.judge.questions import Question, check_answered, read_answers, read_questions
from kd.evaluation.models import check_path, fingerprint, parse_models
from kd.evaluation.results import write_result
from kd.generation.records import append, cut_torn_lines, read_records, record_file
from kd.generation.sampling import digest
from kd.generation.server import ChatServer, Completion, Failure
from kd.recipe import parse, require_file, setting
from kd.run.exit import run

JUDGEMENTS = "judgements"


@dataclass
class JudgeSettings:
    questions: str = setting("", "file of questions, in MT-Bench's or AlpacaEval's format")
    references: str | None = setting(None, "file of reference answers, in the same format")
    judge_prompts: str | None = setting(None, "FastChat's judge_prompts.jsonl; without: our own")
    benchmark: str = setting("mt_bench", "name of this comparison: a folder of the results")
    models: list[str] = field(
        default_factory=list, metadata={"help": "NAME=PATH of models that answer the questions"}
    )
    answers: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FILE of answers that are there already"}
    )
    mode: Literal["score", "pair"] = setting("score", "grades from 1 to 10, or the better of two")
    baseline: str | None = setting(None, "with pair: which of models and answers is compared with")
    verdict: Literal["token", "text"] = setting(
        "token", "with pair: one token with its log-probability, or an explanation and a verdict"
    )
    orders: Literal["both", "seeded"] = setting(
        "both", "with pair: each pair twice, or in one order that the question draws"
    )
    instruction_difficulty: str | None = setting(
        None, "AlpacaEval's CSV of index and difficulty, for the length-controlled win rate"
    )
    judge: str = setting("", "the judge's name at the server, or without one a model's path")
    server: str | None = setting(None, "URL, such as https://api.openai.com/v1")
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that holds the key")
    concurrency: int = setting(16, "requests under way at a time")
    request_timeout: float = setting(600.0, "seconds for one verdict")
    retries: int = setting(8, "further tries of a request: 429, 5xx, time-outs, torn answers")
    judge_max_new_tokens: int = setting(2048, "tokens of a verdict at most")
    max_new_tokens: int = setting(1024, "tokens of an answer at most")
    batch_size: int = setting(8, "answers at a time in each process")
    seed: int = setting(0, "draws the answers")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "of models and of a local judge; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    out_dir: str = setting("results", "folder of the results; judge/BENCHMARK in it")

    def __post_init__(self) -> None:
        for key in ("questions", "judge"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; --help says what it means")
        require_file("instruction_difficulty", self.instruction_difficulty)
        self.named_models = parse_models(self.models) if self.models else {}
        self.named_answers = dict(item.partition("=")[::2] for item in self.answers)
        names = [*self.named_models, *self.named_answers]
        if len(names) != len(self.models) + len(self.answers) or not names:
            raise ValueError(
                f"models, answers: found {names}; wanted at least one NAME=..., each name once"
            )
        if self.mode == "pair" and self.baseline not in names:
            raise ValueError(f"baseline: {self.baseline}; wanted one of {', '.join(names)}")
        if self.server is None:
            check_path("judge", self.judge)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        self.folder = Path(self.out_dir) / "judge" / self.benchmark


def main() -> None:
    (settings,) = parse(JudgeSettings, description=__doc__)
    questions = read_questions(settings.questions)
    references = {}
    if settings.references:
        references = read_answers("references", settings.references, questions)
        given = [question for question in questions if question.id in references]
        check_answered("references", references, given)
    check_verdict(settings, questions)
    difficulties = read_difficulties(settings.instruction_difficulty, questions)
    judge = Judge(
        settings.judge,
        settings.mode,
        settings.verdict,
        settings.orders,
        settings.judge_max_new_tokens,
        read_prompts(settings.judge_prompts),
    )
    # Before anything is answered: a wrong URL or a missing key shows at once.
    client = open_client(settings) if settings.server else None
    start_gloo()
    answers = all_answers(settings, questions)
    if rank():
        return
    wanted = {
        name: wanted_judgements(judge, name, questions, answers[name], references, *against)
        for name, against in opponents(settings, answers).items()
    }
    rows = ask_missing(settings, client, [j for found in wanted.values() for j in found])
    for name, found in wanted.items():
        result = summarise(settings, judge, found, rows, answers, difficulties)
        file = settings.folder / "results" / f"{name}.json"
        write_result(file, describe(settings, judge, questions, references, found), result)
        show(name, result, file)


def check_verdict(settings: JudgeSettings, questions: list[Question]) -> None:
    several = sum(len(question.turns) > 1 for question in questions)
    if settings.mode == "pair" and settings.verdict == "token" and several:
        raise ValueError(
            f"verdict: token, and {several} questions have several turns; one token is asked for "
            "pairs of answers to single questions (AlpacaEval). Set verdict: text"
        )


def read_difficulties(file: str | None, questions: list[Question]) -> dict[str, float] | None:
    """{index of a question: its difficulty}. Raises ValueError where one has none."""
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
    found = {line[0]: float(line[column]) for line in lines}
    without = [question.id for question in questions if question.id not in found]
    if without:
        raise ValueError(
            f"instruction_difficulty: {file} has nothing of {len(without)} questions, the first "
            f"{without[0]}; wanted the file of these questions, or none"
        )
    return found


def open_client(settings: JudgeSettings) -> ChatServer:
    return ChatServer(
        settings.server,
        settings.key_variable,
        settings.concurrency,
        settings.request_timeout,
        settings.retries,
    )


def all_answers(
    settings: JudgeSettings, questions: list[Question]
) -> dict[str, dict[str, list[str]]]:
    """{name: {question id: an answer a turn}}; files are read before models answer."""
    given = {n: read_answers(n, f, questions) for n, f in settings.named_answers.items()}
    for name, found in given.items():
        check_answered(name, found, questions)
    own = {
        name: answer_questions(
            name,
            path,
            questions,
            settings.folder / "answers",
            settings.dtype,
            settings.max_new_tokens,
            settings.batch_size,
            settings.seed,
        )
        for name, path in settings.named_models.items()
    }
    return own | given


def opponents(settings: JudgeSettings, answers: dict) -> dict[str, tuple]:
    """{judged name: the baseline and its answers, or nothing}."""
    if settings.mode == "score":
        return dict.fromkeys(answers, ())
    against = (settings.baseline, answers[settings.baseline])
    return {name: against for name in answers if name != settings.baseline}


def ask_missing(
    settings: JudgeSettings, client: ChatServer | None, wanted: list[Judgement]
) -> dict[str, dict]:
    """{key: row with a verdict} of all that is wanted. Raises ValueError where some failed."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    folder = str(settings.folder)
    cut_torn_lines(folder, JUDGEMENTS)
    known = verdicts(folder)
    missing = [judgement for judgement in wanted if judgement.key not in known]
    characters = sum(len(m["content"]) for j in missing for m in j.request["messages"])
    print_rank0(
        f"judgements: {len(wanted)} wanted, {len(wanted) - len(missing)} there already, "
        f"{len(missing)} to ask ({characters} characters of prompts)"
    )
    if missing:
        client = client or LocalJudge(
            settings.judge, settings.dtype, device(), settings.judge_max_new_tokens
        )
        with open(record_file(folder, JUDGEMENTS, 0), "a") as file:

            def record(i: int, result: Completion | Failure) -> None:
                append(file, judged_row(missing[i], result))

            client.ask([judgement.request for judgement in missing], record)
        known = verdicts(folder)
    failed = [judgement for judgement in wanted if judgement.key not in known]
    if failed:
        errors = [r for r in read_records(folder, JUDGEMENTS) if "error" in r]
        raise ValueError(
            f"{len(failed)} of {len(wanted)} judgements have no answer, the last for: "
            f"{errors[-1]['error']}. The same command asks them again"
        )
    return known


def verdicts(folder: str) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for row in read_records(folder, JUDGEMENTS):
        if "error" not in row:
            found.setdefault(row["key"], row)
    return found


def judged_row(judgement: Judgement, result: Completion | Failure) -> dict:
    row = {
        "key": judgement.key,
        "model": judgement.model,
        "question_id": judgement.question.id,
        "turn": judgement.turn,
        "order": judgement.order,
    }
    if isinstance(result, Failure):
        return row | {"error": result.message, "status": result.status}
    return row | {"request": judgement.request} | asdict(result)


def summarise(
    settings: JudgeSettings,
    judge: Judge,
    wanted: list[Judgement],
    rows: dict[str, dict],
    answers: dict[str, dict[str, list[str]]],
    difficulties: dict[str, float] | None,
) -> dict:
    served = sorted({rows[judgement.key]["served_by"] for judgement in wanted})
    if settings.mode == "score":
        return {"served_by": served, **score_result(wanted, rows)}
    own, other = answers[wanted[0].model], answers[settings.baseline]
    return {
        "served_by": served,
        **pair_result(judge, wanted, rows, own, other, difficulties),
    }


def describe(
    settings: JudgeSettings,
    judge: Judge,
    questions: list[Question],
    references: dict[str, list[str]],
    wanted: list[Judgement],
) -> dict:
    """All that the numbers depend on."""
    name = wanted[0].model
    path = settings.named_models.get(name)
    return {
        "model": path or settings.named_answers[name],
        "model_files_hash": fingerprint(path) if path else None,
        "benchmark": settings.benchmark,
        "mode": settings.mode,
        "judge": settings.judge,
        "verdict": settings.verdict if settings.mode == "pair" else "text",
        "orders": settings.orders if settings.mode == "pair" else None,
        "baseline": settings.baseline,
        "questions_hash": digest([asdict(question) for question in questions])[:16],
        "references_hash": digest(references)[:16],
        "prompts_hash": digest(judge.prompts)[:16],
        "judgements_hash": digest(sorted(judgement.key for judgement in wanted))[:16],
        "max_new_tokens": settings.max_new_tokens if path else None,
        "dtype": settings.dtype if path else None,
        "seed": settings.seed if path else None,
        "instruction_difficulty": settings.instruction_difficulty,
    }


def show(name: str, result: dict, file: Path) -> None:
    overall = result["overall"]
    mean = "no verdict" if overall["mean"] is None else f"{overall['mean']:.4g}"
    kind = "win rate" if "consistency" in result else "grade"
    turns = ", ".join(
        f"turn {turn} {found['mean']:.4g}"
        for turn, found in result["turns"].items()
        if found["mean"] is not None
    )
    print_rank0(
        f"{name}: {kind} {mean} over {overall['n']} ({turns}); without a verdict: "
        f"{overall['without_verdict']}"
    )
    if "consistency" in result:
        controlled, same = result["length_controlled_win_rate"], result["consistency"]
        print_rank0(
            f"{name}: ties {result['ties']}; at equal length "
            + ("not computed: too few" if controlled is None else f"{controlled:.4g}")
            + ("" if same is None else f"; {same:.1%} of the pairs have one winner in both orders")
        )
    print_rank0(f"wrote {file}")


if __name__ == "__main__":
    run(main)
