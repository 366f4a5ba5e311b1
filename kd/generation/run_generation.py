"""Start and finish a generation run: its folder, its record and its training rows."""

import json
from dataclasses import asdict
from pathlib import Path

from kd.credentials import check_key_variable
from kd.distributed import barrier, print_rank0, rank
from kd.generation.estimate import estimate, usage
from kd.generation.filter_report import FilterReport
from kd.generation.records import cut_torn_lines, read_raw_answers
from kd.generation.sampling import Sample
from kd.run.atomic import write_text
from kd.run.finished import DONE, mark_done
from kd.run.run_record import write_record
from kd.settings.generation import FilterSettings, GenerationSettings, ServerSettings


def start_run(
    settings: GenerationSettings, server: ServerSettings, filters: FilterSettings
) -> dict[str, dict]:
    """Collective: prepare the output folder and return the existing answers by key.

    A finished run is not skipped: with other filters the same answers give other training rows.
    """
    folder = settings.output_dir
    if server.server:
        check_key_variable(server.key_variable)  # before run.json records it
    if rank() == 0:
        removed = cut_torn_lines(folder, "raw") + cut_torn_lines(folder, "rewards")
        if removed:
            print(f"removed an incomplete last line of {removed} bytes")
        (Path(folder) / DONE).unlink(missing_ok=True)
        write_record(folder, [settings, server, filters])
    barrier()
    answers, _ = read_raw_answers(folder)
    barrier()  # no rank appends before all have read
    return answers


def print_plan(
    settings: GenerationSettings,
    server: ServerSettings,
    samples: list[Sample],
    answers: dict[str, dict],
) -> None:
    """Print how many samples exist and how many are missing; with a server, estimate the cost."""
    keys = {sample.key for sample in samples}
    prompts = len(samples) // settings.samples_per_prompt
    print_rank0(
        f"samples: {len(samples)} = {prompts} prompts x {settings.samples_per_prompt}; "
        f"{len(keys & set(answers))} exist already"
    )
    unused = len(set(answers) - keys)
    if unused:
        print_rank0(
            f"raw files: {unused} samples of other settings or prompts are not used in train.jsonl"
        )
    if server.server:
        missing = [sample for sample in samples if sample.key not in answers]
        existing = {key: row for key, row in answers.items() if key in keys}
        print_rank0(estimate(missing, existing, settings, server))


def finish_run(
    settings: GenerationSettings,
    server: ServerSettings,
    answers: dict[str, dict],
    rows: list[dict],
    report: FilterReport,
) -> None:
    """Write train.jsonl and the done marker; print the counts and two examples."""
    if server.server:
        print(usage(answers, server))
    path = Path(settings.output_dir) / "train.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(report)
    for row in (rows[0], rows[-1])[: len(rows)]:
        question, answer = (message["content"][:300] for message in row["messages"][-2:])
        print(f"\n> {question}\n{answer}")
    mark_done(settings.output_dir, asdict(report))
    print(f"\nsaved to {path}")
