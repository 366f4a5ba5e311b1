"""Answer the samples that have no answer yet, by a server or by a model in this process.

Work is shared by all ranks; each rank appends its answers to its own raw file.
"""

from tqdm import tqdm

from kd.distributed import barrier, rank, share_of, world_size
from kd.generation.engines import LocalEngine
from kd.generation.records import append_record, read_raw_answers, record_file
from kd.generation.sampling import Sample, compose_batches
from kd.generation.server import ChatServer, Completion, Failure
from kd.gpu import device
from kd.settings.generation import GenerationSettings, ServerSettings


def answer_missing(
    settings: GenerationSettings,
    server: ServerSettings,
    samples: list[Sample],
    answers: dict[str, dict],
) -> dict[str, dict]:
    """Collective: answer the samples that are missing in `answers`; return all answers by key.

    No model is loaded if nothing is missing. Raises ValueError if samples remain without an answer
    and the recipe does not set skip_failed.
    """
    if server.server:
        _request_missing(settings, server, samples, answers)
    else:
        _generate_missing(settings, samples, answers)
    barrier()
    answers, errors = read_raw_answers(settings.output_dir)
    failed = [sample for sample in samples if sample.key not in answers]
    if failed and not server.skip_failed:
        raise ValueError(
            f"{len(failed)} of {len(samples)} samples have no answer, the first because: "
            f"{errors.get(failed[0].key, 'no error was recorded')}. Run the same command to "
            "request them again, or set skip_failed: true to write train.jsonl without them"
        )
    return answers


def _request_missing(
    settings: GenerationSettings,
    server: ServerSettings,
    samples: list[Sample],
    answers: dict[str, dict],
) -> None:
    mine = share_of([sample for sample in samples if sample.key not in answers])
    if not mine:
        return
    client = ChatServer(
        server.server,
        server.key_variable,
        max(1, server.concurrency // world_size()),
        server.request_timeout,
        server.retries,
    )
    with open(record_file(settings.output_dir, "raw", rank()), "a") as file:

        def record(i: int, result: Completion | Failure) -> None:
            append_record(file, served_row(mine[i], result))

        client.ask([chat_request(sample) for sample in mine], record, progress=rank() == 0)


def chat_request(sample: Sample) -> dict:
    """The sample as arguments of a chat completion."""
    keys = ("model", "temperature", "top_p", "max_new_tokens")
    request = {key: sample.config[key] for key in keys} | {"messages": sample.conversation}
    if "template_arguments" in sample.config:  # the name that vLLM, SGLang and llama-server use
        request["extra_body"] = {"chat_template_kwargs": sample.config["template_arguments"]}
    return request | {"seed": sample.seed % 2**31}  # some servers keep only 31 bits


def served_row(sample: Sample, result: Completion | Failure) -> dict:
    """The record of a server's result in raw.jsonl."""
    if isinstance(result, Failure):
        return {"key": sample.key, "error": result.message, "status": result.status}
    return raw_row(sample, result.text, result.finish == "stop", result.completion_tokens) | {
        "finish": result.finish,
        "prompt_tokens": result.prompt_tokens,
        "served_by": result.served_by,
    }


def raw_row(sample: Sample, answer: str, stopped: bool, tokens: int) -> dict:
    """The record of an answer in raw.jsonl; `stopped` is False for a truncated answer."""
    return {
        "key": sample.key,
        "config": sample.config,
        "sample": sample.index,
        "prompt": sample.prompt.messages,
        "answer": answer,
        "stopped": stopped,
        "tokens": tokens,
    }


def _generate_missing(
    settings: GenerationSettings, samples: list[Sample], answers: dict[str, dict]
) -> None:
    batches = compose_batches(samples, settings.batch_size)
    mine = share_of([batch for batch in batches if any(s.key not in answers for s in batch)])
    if not mine:
        return
    engine = LocalEngine(
        settings.model,
        settings.weights_dtype,
        device(),
        settings.max_new_tokens,
        [prompt for prompt in settings.system_prompt or [] if prompt],
        settings.arguments,
    )
    with open(record_file(settings.output_dir, "raw", rank()), "a") as file:
        for batch in tqdm(mine, desc="generating", unit="batch", disable=rank() > 0):
            conversations = [sample.conversation for sample in batch]
            seeds = [sample.seed for sample in batch]
            generated = engine.answer(conversations, seeds, *batch[0].sampling)
            for sample, answer in zip(batch, generated, strict=True):
                if sample.key not in answers:
                    row = raw_row(sample, answer.text, answer.stopped, answer.tokens)
                    append_record(file, row)
