"""Score a recipe's rows with its teacher once; train/distill.py then loads no teacher.

launch/cpu.sh train/cache_teacher.py --config recipes/small/d_distill.yaml --teacher_cache runs/small/cache
"""  # noqa: E501

from kd.data.sources import check_sources
from kd.distributed import print_rank0
from kd.run.exit import run as run_script
from kd.run.folder_lock import lock_folder
from kd.settings.training_recipe import parse_distillation


def main() -> None:
    """Use the recipe of train/distill.py; then train with it and the same --teacher_cache.

    Run the same command again to continue an interrupted run.
    """
    recipe = parse_distillation(description=__doc__, on_policy=False, check_sources=check_sources)
    lock_folder("teacher_cache", recipe.teacher.teacher_cache)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.teachers.cache_error import print_cache_error
    from kd.teachers.scoring import describe, fill_cache
    from kd.training.run_plan import plan_scoring
    from kd.training.settle import settle
    from kd.training.tokenizers import load_scoring_tokenizer
    from kd.training.training_rows import load_documents

    recipe = settle(recipe, trains=False)
    tokenizer, manifest = load_scoring_tokenizer(recipe)
    documents = load_documents(recipe, tokenizer)
    plan_scoring(recipe, documents)
    cache, references = fill_cache(recipe, documents, manifest, tokenizer)
    print_rank0(describe(cache))
    print_cache_error(recipe, tokenizer, cache, references)
    print_rank0(f"saved to {recipe.teacher.teacher_cache}")


if __name__ == "__main__":
    run_script(main)
