"""Send the judge every request that has no verdict yet; judgements.jsonl records the verdicts."""

from dataclasses import asdict

from kd.distributed import print_rank0
from kd.evaluation.judge.judgements import Judgement
from kd.evaluation.judge.local_judge import LocalJudge
from kd.generation.records import append_record, cut_torn_lines, read_records, record_file
from kd.generation.server import ChatServer, Completion, Failure
from kd.gpu import device
from kd.settings.judge import JudgeSettings

STEM = "judgements"


def open_client(settings: JudgeSettings) -> ChatServer | None:
    """The client of the judge's server; None for a local judge.

    Raises ValueError if the URL is invalid or the key is missing.
    """
    if not settings.server:
        return None
    return ChatServer(
        settings.server,
        settings.key_variable,
        settings.concurrency,
        settings.request_timeout,
        settings.retries,
    )


def request_missing(
    settings: JudgeSettings, client: ChatServer | None, plan: dict[str, list[Judgement]]
) -> dict[str, dict]:
    """Request the missing judgements; return the rows of all verdicts by key.

    Raises ValueError if some judgements have no verdict in the end.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    folder = str(settings.folder)
    cut_torn_lines(folder, STEM)
    known = read_verdicts(folder)
    planned = [judgement for judgements in plan.values() for judgement in judgements]
    missing = [judgement for judgement in planned if judgement.key not in known]
    characters = sum(len(m["content"]) for j in missing for m in j.request["messages"])
    print_rank0(
        f"judgements: {len(planned)} in total, {len(planned) - len(missing)} exist already, "
        f"{len(missing)} to request ({characters} characters of prompts)"
    )
    if missing:
        client = client or LocalJudge(
            settings.judge, settings.weights_dtype, device(), settings.judge_max_new_tokens
        )
        with open(record_file(folder, STEM, 0), "a") as file:

            def record(i: int, result: Completion | Failure) -> None:
                append_record(file, verdict_row(missing[i], result))

            client.ask([judgement.request for judgement in missing], record)
        known = read_verdicts(folder)
    failed = [judgement for judgement in planned if judgement.key not in known]
    if failed:
        errors = [row for row in read_records(folder, STEM) if "error" in row]
        raise ValueError(
            f"{len(failed)} of {len(planned)} judgements have no verdict, the last because: "
            f"{errors[-1]['error']}. Run the same command to request them again"
        )
    return known


def read_verdicts(folder: str) -> dict[str, dict]:
    """The first row with a verdict of every key."""
    verdicts: dict[str, dict] = {}
    for row in read_records(folder, STEM):
        if "error" not in row:
            verdicts.setdefault(row["key"], row)
    return verdicts


def verdict_row(judgement: Judgement, result: Completion | Failure) -> dict:
    """The record of a judgement in judgements.jsonl."""
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
