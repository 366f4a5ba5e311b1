"""The tokenized training rows and held-out rows of a run."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kd.data.row_cache import RowSettings, tokenised_rows
from kd.data.row_checks import row_key
from kd.data.show import shown_rows
from kd.data.sources import read_rows
from kd.data.tokenised_rows import TokenisedRows
from kd.distributed import print_rank0
from kd.settings.distillation import DataSettings
from kd.settings.training_recipe import Recipe
from kd.teachers.aligned_teacher import check_alignment
from kd.teachers.cached import Documents
from kd.training.overfit_check import check_rows
from kd.training.resume import ResumePoint
from kd.training.tokenizers import Tokenizers, load_tokenizers

HELDOUT_IN_TRAINING = "of eval_data found in data as well"


@dataclass
class TrainingRows:
    """Rows to train on and rows to evaluate on; a packed row holds several documents."""

    train: TokenisedRows
    heldout: TokenisedRows | None


def load_rows(recipe: Recipe, tokenizers: Tokenizers, resume: ResumePoint) -> TrainingRows:
    """Tokenize the rows, or read them from the cache of tokenized rows.

    Raises ValueError for unreadable rows, for documents that the teacher cache lacks, for fewer
    rows than one step needs, and if the run resumes from a checkpoint that was trained on others.
    """
    rows = tokenize(recipe, tokenizers.student, tokenizers.teacher)
    if tokenizers.cache:
        for part, kind in ((rows.train, "training"), (rows.heldout, "held-out")):
            if part:
                decode = tokenizers.student.decode
                tokenizers.cache.check(Documents([part]), f"{kind} documents", decode)
    resume.add_rows(rows.train.folder.name)  # a hash of the files, the settings and the tokenizer
    if recipe.training.check:
        longest = check_rows(rows.train.lengths, recipe.training.global_batch_size)
        rows.train = rows.train.subset(longest)
    else:
        check_batch(recipe, len(rows.train))
    return rows


def check_batch(recipe: Recipe, rows: int) -> None:
    """Raise ValueError if an epoch has fewer rows than one optimizer step is to have.

    Every step would then have a smaller batch than the recipe says.
    """
    wanted = recipe.training.global_batch_size
    if rows < wanted:
        kind = "packed training rows" if recipe.data.packing else "training rows"
        raise ValueError(
            f"global_batch_size: {wanted} rows per step, but the data has {rows} {kind}; wanted at "
            "most that many, or more data"
        )


def tokenize(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainingRows:
    """Tokenize all sources of a recipe; with a `teacher_tokenizer`, align the two tokenizations.

    Raises ValueError for unreadable rows, and if the two tokenizations align on too few tokens.
    """
    data = recipe.data

    def prepare(sources: list[dict], **sizes: int | None) -> TokenisedRows:
        settings = RowSettings(
            data.max_length,
            data.mixture_seed,
            data.on_bad_row,
            data.on_long_row,
            control_tokens=data.control_tokens_in_text,
            **sizes,
        )
        progress = not recipe.training.disable_tqdm
        rows = tokenised_rows(
            sources,
            settings,
            tokenizer,
            data.data_cache,
            data.data_workers,
            progress,
            teacher_tokenizer,
        )
        print_rank0(f"{rows.report}\ntokenized rows: {rows.folder}")
        if teacher_tokenizer:
            note = check_alignment(rows.report.aligned, rows.report.targets)
            if note:
                print_rank0(note)
        return rows

    train = prepare(data.sources, mixture_rows=data.mixture_rows, train_rows=data.train_rows)
    heldout = prepare(data.eval_sources) if data.eval_sources else None
    check_suspicious(data, train, heldout)
    if data.packing:
        train = train.packed(data.max_length)
    return TrainingRows(train, heldout)


def check_suspicious(
    data: DataSettings, train: TokenisedRows, heldout: TokenisedRows | None
) -> None:
    """Tell how many held-out rows are training rows.

    Raises ValueError with on_suspicious_row: error if there are any, or any other suspicious rows.
    """
    known = np.isin(heldout.keys, train.keys) if heldout else np.zeros(0, bool)
    if known.any():
        shared = set(heldout.keys[known].tolist())
        rows = read_rows(data.eval_sources, data.mixture_seed, data.on_bad_row)
        place = next(place for place, row in rows if row_key(row) in shared)
        heldout.report.suspicious[HELDOUT_IN_TRAINING] = [int(known.sum()), place]
        print_rank0(heldout.report.suspicions[-1])
    if data.on_suspicious_row == "error":
        found = [line for rows in (train, heldout) if rows for line in rows.report.suspicions]
        if found:
            raise ValueError(f"on_suspicious_row: error: {'; '.join(found)}; mend or remove them")


def load_documents(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """All documents that training asks a teacher cache for, held-out ones included.

    Raises ValueError for unreadable rows.
    """
    rows = tokenize(recipe, tokenizer)
    return Documents([part for part in (rows.train, rows.heldout) if part])


def print_rows(recipe: Recipe) -> bool:
    """Print the rows that `show_rows` asks for, as training reads them; False if it asks for none.

    Targets are marked. Raises ValueError for unreadable rows.
    """
    if recipe.show_rows:
        tokenizers = load_tokenizers(recipe)
        ours, theirs = tokenizers.student, tokenizers.teacher
        rows = tokenize(recipe, ours, theirs).train
        print_rank0(shown_rows(rows, ours, recipe.show_rows, theirs))
    return bool(recipe.show_rows)
