"""Let a teacher answer prompts, and make training rows of its answers.

launch/cpu.sh train/generate.py --config recipes/small/a_answers.yaml

The teacher is a model here (one process a GPU) or behind a server (`server`: an OpenAI-compatible
URL). Writes raw.jsonl (every answer, appended at once: run the same command again to go on) and
train.jsonl (the rows to train on). The processes of a launch profile or of torchrun share the work.
"""

from kd.data.near_duplicates import Overlap
from kd.data.sources import check_sources
from kd.distributed import rank, start_gloo
from kd.generation.estimate import used
from kd.generation.filters import evaluation_texts, training_rows
from kd.generation.records import read_answers
from kd.generation.run_generation import (
    ask_missing,
    check_failures,
    choose_questions,
    earlier_answers,
    finish,
    generate_missing,
    report_start,
    score_missing,
)
from kd.generation.sampling import wanted_samples
from kd.recipe import parse
from kd.run.exit import run
from kd.settings.generation import FilterSettings, GenerationSettings, ServerSettings


def main() -> None:
    settings, server, filters = parse(
        GenerationSettings, ServerSettings, FilterSettings, description=__doc__
    )
    for sources in (settings.sources, filters.evaluation_sources):
        check_sources(sources)
    evaluation = Overlap(evaluation_texts(filters.evaluation_sources, settings.mixture_seed))
    questions = choose_questions(settings, filters, evaluation)
    samples = wanted_samples(questions, settings, served=server.server is not None)
    start_gloo()
    answers = earlier_answers([settings, server, filters])
    report_start(settings, server, samples, answers)
    if server.estimate_only:
        return
    if server.server:
        ask_missing(settings, server, samples, answers)
    else:
        generate_missing(settings, samples, set(answers))
    answers, errors = read_answers(settings.output_dir)
    check_failures(samples, answers, errors, server)
    rewards = score_missing(settings, filters, samples, answers, evaluation)
    if rank() == 0:
        if server.server:
            print(used(answers, server))
        finish(settings, *training_rows(samples, answers, filters, rewards, evaluation))


if __name__ == "__main__":
    run(main)
