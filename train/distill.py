"""Train a student on text and on its teacher's distribution over every target token.

launch/cpu.sh train/distill.py --config recipes/small/d_distill.yaml
"""

from kd.data.sources import check_sources
from kd.run.exit import run as run_script
from kd.settings.training_recipe import parse_distillation
from kd.training.preflight import check_surroundings


def main() -> None:
    recipe = parse_distillation(description=__doc__, check_sources=check_sources)
    if not recipe.show_rows:
        check_surroundings(recipe)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.training.out_of_memory import explain_out_of_memory
    from kd.training.recipe_checks import check_recipe
    from kd.training.resume import find_resume_point, is_finished
    from kd.training.run_plan import plan_run
    from kd.training.run_training import finish, load_student, make_trainer, set_up_teacher, train
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
        student = load_student(run)
        teacher = set_up_teacher(run, student)
        trainer = make_trainer(run, student, teacher)
        metrics = train(trainer, run)
    finish(trainer, run, metrics)


if __name__ == "__main__":
    run_script(main)
