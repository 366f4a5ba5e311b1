"""Fine-tune a model on text and chat: full weights, LoRA or QLoRA.

launch/cpu.sh train/sft.py --config recipes/small/a_teacher.yaml
"""

from kd.data.sources import check_sources
from kd.run.exit import run as run_script
from kd.settings.training_recipe import parse_sft
from kd.training.preflight import check_surroundings


def main() -> None:
    recipe = parse_sft(description=__doc__, check_sources=check_sources)
    if not recipe.show_rows:
        check_surroundings(recipe)
    # Not at the top: torch and Transformers take seconds to import, and mistakes are told before.
    from kd.training.out_of_memory import explain_out_of_memory
    from kd.training.recipe_checks import check_recipe
    from kd.training.resume import find_resume_point, is_finished
    from kd.training.run_plan import plan_run
    from kd.training.run_training import finish, load_student, make_trainer, train
    from kd.training.settle import settle
    from kd.training.tokenizers import load_tokenizers
    from kd.training.training_rows import load_rows, print_rows

    if print_rows(recipe) or is_finished(recipe):
        return
    recipe = settle(recipe)
    check_recipe(recipe)
    tokenizers = load_tokenizers(recipe)
    resume = find_resume_point(recipe)
    rows = load_rows(recipe, tokenizers, resume)
    run = plan_run(recipe, tokenizers, rows, resume)
    with explain_out_of_memory(recipe):
        trainer = make_trainer(run, load_student(run))
        metrics = train(trainer, run)
    finish(trainer, run, metrics)


if __name__ == "__main__":
    run_script(main)
