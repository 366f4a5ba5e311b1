"""One generation run: what train/generate.py does between its settings and train.jsonl.

The processes of a launch profile share the work; each appends to files of its own.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from kd.data.near_duplicates import Overlap
from kd.distributed import barrier, device, rank, share_of, world_size
from kd.generation.estimate import estimate
from kd.generation.filters import (
    FilterReport,
    candidates,
    overlaps,
    with_answer,
    write_rows,
)
from kd.generation.records import (
    append,
    cut_torn_lines,
    read_answers,
    read_records,
    record_file,
)
from kd.generation.sampling import (
    Question,
    Sample,
    compose_batches,
    distinct,
    load_questions,
)
from kd.generation.server import ChatServer, Completion, Failure
from kd.run.exit import DONE, mark_done
from kd.run.run_record import write_record
from kd.settings.generation import FilterSettings, GenerationSettings, ServerSettings


def choose_questions(
    settings: GenerationSettings, filters: FilterSettings, evaluation: Overlap
) -> list[Question]:
    """The prompts to ask: each once, and none that the evaluation data has.

    Raises ValueError where rationales want a gold answer and a row has none.
    """
    read = load_questions(settings)
    once = distinct(read)
    questions = [q for q in once if not overlaps(q.prompt, evaluation)]
    for question in questions if filters.rationales else []:
        if not isinstance(question.gold, str) or not question.gold.strip():
            raise ValueError(
                f"rationales: the prompt {question.prompt[-1]['content'][:80]!r} has no gold "
                "answer; wanted prompt and completion (columns: {completion: its_name})"
            )
    if rank() == 0:
        print(
            f"prompts: {len(read)} read, {len(read) - len(once)} repeated, "
            f"{len(once) - len(questions)} left out for overlap with the evaluation data"
        )
    if not questions:
        raise ValueError("prompts: all of them are in evaluation_data; wanted others")
    return questions


def earlier_answers(settings: list) -> dict[str, dict]:
    """What is in the raw files; every process sees the same, before any of them appends.

    There is no early way out of a finished run: where nothing is missing no model is loaded.
    """
    folder = settings[0].output_dir
    if rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        cut = cut_torn_lines(folder, "raw") + cut_torn_lines(folder, "rewards")
        if cut:
            print(f"cut a torn last line of {cut} bytes")
        (Path(folder) / DONE).unlink(missing_ok=True)
        write_record(folder, settings)
    barrier()
    answers, _ = read_answers(folder)
    barrier()
    return answers


def report_start(
    settings: GenerationSettings,
    server: ServerSettings,
    samples: list[Sample],
    answers: dict[str, dict],
) -> None:
    """Say what there is, what is missing, and what that will cost."""
    if rank():
        return
    keys = {sample.key for sample in samples}
    distinct_prompts = len(samples) // settings.samples_per_prompt
    print(
        f"samples: {len(samples)} = {distinct_prompts} prompts x {settings.samples_per_prompt}; "
        f"{len(keys & set(answers))} there already"
    )
    foreign = len(set(answers) - keys)
    if foreign:
        print(f"raw files: {foreign} samples of other settings or prompts, left out of train.jsonl")
    if server.server:
        missing = [sample for sample in samples if sample.key not in answers]
        ours = {key: row for key, row in answers.items() if key in keys}
        print(estimate(missing, ours, settings, server), flush=True)


def ask_missing(
    settings: GenerationSettings,
    server: ServerSettings,
    samples: list[Sample],
    answers: dict[str, dict],
) -> None:
    """Append what the server says: this process's share of what is not answered yet."""
    mine = share_of([sample for sample in samples if sample.key not in answers])
    if mine:
        client = ChatServer(
            server.server,
            server.key_variable,
            max(1, server.concurrency // world_size()),
            server.request_timeout,
            server.retries,
        )
        with open(record_file(settings.output_dir, "raw", rank()), "a") as file:

            def record(i: int, result: Completion | Failure) -> None:
                append(file, served_row(mine[i], result))

            client.ask([request_of(sample) for sample in mine], record, progress=rank() == 0)
    barrier()


def request_of(sample: Sample) -> dict:
    """A sample as the arguments of a chat completion."""
    keys = ("model", "temperature", "top_p", "max_new_tokens")
    request = {key: sample.config[key] for key in keys} | {"messages": sample.conversation}
    if "template_arguments" in sample.config:  # vllm, SGLang and llama-server call them so
        request["extra_body"] = {"chat_template_kwargs": sample.config["template_arguments"]}
    return request | {"seed": sample.seed % 2**31}  # some servers keep no more bits


def served_row(sample: Sample, result: Completion | Failure) -> dict:
    if isinstance(result, Failure):
        return {"key": sample.key, "error": result.message, "status": result.status}
    return raw_row(sample, result.text, result.finish == "stop", result.completion_tokens) | {
        "finish": result.finish,
        "prompt_tokens": result.prompt_tokens,
        "served_by": result.served_by,
    }


def raw_row(sample: Sample, answer: str, stopped: bool, tokens: int) -> dict:
    return {
        "key": sample.key,
        "config": sample.config,
        "sample": sample.index,
        "prompt": sample.question.prompt,
        "answer": answer,
        "stopped": stopped,
        "tokens": tokens,
    }


def generate_missing(settings: GenerationSettings, samples: list[Sample], known: set[str]) -> None:
    """Append the answers that are not `known`: this process's share of the unfinished batches."""
    batches = compose_batches(samples, settings.batch_size)
    unfinished = [batch for batch in batches if any(s.key not in known for s in batch)]
    if not unfinished:
        return
    mine = share_of(unfinished)
    if mine:
        from kd.generation.engines import LocalEngine  # a server needs none of its imports

        hidden = [h for h in settings.system_prompt or [] if h]
        engine = LocalEngine(
            settings.model,
            settings.dtype,
            device(),
            settings.max_new_tokens,
            hidden,
            settings.arguments,
        )
        with open(record_file(settings.output_dir, "raw", rank()), "a") as file:
            for batch in tqdm(mine, desc="generating", unit="batch", disable=rank() > 0):
                asked = [sample.conversation for sample in batch]
                seeds = [sample.seed for sample in batch]
                found = engine.answer(asked, seeds, *batch[0].drawing)
                for sample, answer in zip(batch, found, strict=True):
                    if sample.key not in known:
                        append(file, raw_row(sample, answer.text, answer.stopped, answer.tokens))
    barrier()


def check_failures(
    samples: list[Sample], answers: dict[str, dict], errors: dict[str, str], server: ServerSettings
) -> None:
    """Raise ValueError where samples have no answer and the recipe does not let them go."""
    failed = [sample for sample in samples if sample.key not in answers]
    if failed and not server.skip_failed:
        raise ValueError(
            f"{len(failed)} of {len(samples)} samples have no answer, the first for: "
            f"{errors.get(failed[0].key, 'nothing was recorded')}. The same command asks them "
            "again; skip_failed: true makes train.jsonl without them"
        )


def score_missing(
    settings: GenerationSettings,
    filters: FilterSettings,
    samples: list[Sample],
    answers: dict[str, dict],
    evaluation: Overlap,
) -> dict[str, float]:
    """Rewards by sample key; appends those that are missing, in the same batches at every start."""
    if not filters.reward_model:
        return {}

    def read() -> dict[str, float]:
        rows = read_records(settings.output_dir, "rewards")
        return {r["key"]: r["reward"] for r in rows if r["model"] == filters.reward_model}

    good = list(candidates(samples, answers, filters, evaluation, FilterReport()))
    texts = {s.key: with_answer(s, answers[s.key]["answer"]) for s in good}
    ordered = sorted(texts, key=lambda key: -len(str(texts[key])))
    size = filters.reward_batch_size
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    known = read()
    unfinished = [batch for batch in batches if any(key not in known for key in batch)]
    barrier()  # nobody appends before all have read
    mine = share_of(unfinished)
    if mine:
        from kd.generation.rewards import RewardModel

        model = RewardModel(filters.reward_model, settings.dtype, device())
        with open(record_file(settings.output_dir, "rewards", rank()), "a") as file:
            for batch in tqdm(mine, desc="scoring", unit="batch", disable=rank() > 0):
                rewards = model.score([texts[key] for key in batch])
                for key, reward in zip(batch, rewards, strict=True):
                    row = {"key": key, "model": filters.reward_model, "reward": reward}
                    if key not in known:
                        append(file, row)
    barrier()
    return read()


def finish(settings: GenerationSettings, rows: list[dict], report: FilterReport) -> None:
    """Write train.jsonl and the done marker; show counts and two answers."""
    path = Path(settings.output_dir) / "train.jsonl"
    write_rows(path, rows)
    print(report)
    for row in (rows[0], rows[-1])[: len(rows)]:
        question, answer = (message["content"][:300] for message in row["messages"][-2:])
        print(f"\n> {question}\n{answer}")
    mark_done(settings.output_dir, asdict(report))
    print(f"\nsaved to {path}")
