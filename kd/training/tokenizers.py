"""The tokenizers of a run: one that both models share, or one for each model."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kd.data.template import writes_the_date
from kd.data.tokenizer import check_same_tokenizer, load_tokenizer, set_template_arguments
from kd.data.vocabularies import shared_vocabulary
from kd.distributed import print_rank0
from kd.models.adapters import model_tokenizer
from kd.recipe import parse_json_object
from kd.settings.teacher import OWN_BASE
from kd.settings.training_recipe import Recipe
from kd.teachers.cache_files import TeacherCache
from kd.teachers.cached import open_cache
from kd.teachers.fingerprint import manifest_of


@dataclass
class Tokenizers:
    """The tokenizers of a run, and the teacher cache that was checked against them."""

    student: PreTrainedTokenizerBase  # with the chat template of the run
    teacher: PreTrainedTokenizerBase | None = None  # only if the vocabularies differ
    cache: TeacherCache | None = None


def load_tokenizers(recipe: Recipe) -> Tokenizers:
    """Load the tokenizers, open the teacher cache, and set the chat template of the run.

    The cache is opened here because a student without a chat template takes the cache's. Raises
    ValueError if teacher and student have different tokenizers without align_tokenizers, or if the
    cache was made with other settings.
    """
    teacher = recipe.teacher
    found = Tokenizers(load_tokenizer(recipe.model_name, recipe.model.chat_template))
    if recipe.cached_teacher:
        found.cache = open_cache(teacher, recipe.objective, recipe.model, found.student)
        tokens, folder = found.cache.tokens, teacher.teacher_cache
        print_rank0(f"teacher: cache {folder} with {tokens} target tokens, no model")
    elif teacher and teacher.teacher == OWN_BASE:
        print_rank0("teacher: the student without its adapters")
    elif teacher:
        theirs = model_tokenizer(teacher.teacher)
        if teacher.align_tokenizers:
            found.teacher = theirs
        else:
            print_rank0(share_tokenizer(found.student, theirs))
    set_template(found.student, recipe)
    if found.teacher:
        print_rank0(shared_vocabulary(found.student, found.teacher))
    return found


def load_scoring_tokenizer(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, dict]:
    """Load the tokenizer that both models share, and describe the teacher cache to be made.

    Returns (tokenizer, manifest of the cache). Raises ValueError for different tokenizers.
    """
    tokenizer = load_tokenizer(recipe.model_name, recipe.model.chat_template)
    print_rank0(share_tokenizer(tokenizer, model_tokenizer(recipe.teacher.teacher)))
    # The manifest records the chat template before its arguments.
    manifest = manifest_of(recipe.teacher, recipe.objective, recipe.model, tokenizer)
    set_template(tokenizer, recipe)
    return tokenizer, manifest


def share_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Describe whose chat template both models read; a student without one takes the teacher's.

    Raises ValueError if the vocabularies differ.
    """
    check_same_tokenizer(teacher, student)
    if student.chat_template is None:
        student.chat_template = teacher.chat_template
        return "chat template: the teacher's, because the student has none"
    if student.chat_template == teacher.chat_template:
        return "chat template: the student's, equal to the teacher's"
    return "chat template: the student's, which differs from the teacher's"


def set_template(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Fix the variables of the chat template, which is saved with the tokenizer.

    Raises ValueError for a variable that the template does not read.
    """
    arguments = parse_json_object("template_arguments", recipe.model.template_arguments)
    set_template_arguments(tokenizer, arguments)
    template = tokenizer.chat_template
    if isinstance(template, str) and writes_the_date(template):
        print_rank0(
            "note: the chat template writes today's date into every conversation; "
            'template_arguments: {date_string: "26 Jul 2024"} fixes the date'
        )
