"""Write a teacher's answers as training rows: sequence-level distillation (Kim & Rush 2016).

launch/cpu.sh train/generate.py --config recipes/small/a_answers.yaml
"""

from kd.data.sources import check_sources
from kd.distributed import rank, start_gloo
from kd.recipe import all_mistakes, parse
from kd.run.exit import run
from kd.run.folder_lock import lock_folder
from kd.settings.generation import FilterSettings, GenerationSettings, ServerSettings
from kd.settings.model_paths import check_path


def main() -> None:
    with all_mistakes():
        settings, server, filters = parse(
            GenerationSettings, ServerSettings, FilterSettings, description=__doc__
        )
        if settings.model and not server.server:  # a server knows models by names of its own
            check_path("model", settings.model)
        check_sources([*settings.sources, *filters.evaluation_sources])
    lock_folder("output_dir", settings.output_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.data.near_duplicates import Overlap
    from kd.generation.answering import answer_missing
    from kd.generation.decontamination import evaluation_texts
    from kd.generation.filters import training_rows
    from kd.generation.prompts import select_prompts
    from kd.generation.rewards import score_missing
    from kd.generation.run_generation import finish_run, print_plan, start_run
    from kd.generation.sampling import plan_samples

    evaluation = Overlap(evaluation_texts(filters.evaluation_sources, settings.mixture_seed))
    prompts = select_prompts(settings, filters, evaluation)
    samples = plan_samples(prompts, settings, served=server.server is not None)
    start_gloo()
    answers = start_run(settings, server, filters)
    print_plan(settings, server, samples, answers)
    if server.estimate_only:
        return
    answers = answer_missing(settings, server, samples, answers)
    rewards = score_missing(settings, filters, samples, answers, evaluation)
    if rank() == 0:
        rows, report = training_rows(samples, answers, filters, rewards, evaluation)
        finish_run(settings, server, answers, rows, report)


if __name__ == "__main__":
    run(main)
