"""Measure how probable models find held-out rows: token perplexity, and bits per byte of text.

python eval/perplexity.py --models teacher=runs/teacher student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

Target tokens are training's: of chat the assistant's, of text all but the first. --rolling true
counts text as lm-evaluation-harness does: every token, the first behind an end-of-sequence token,
long texts in windows of max_length. One file a model is written, OUT_DIR/perplexity/NAME.json, with
the sums of every row. `launch/PROFILE.sh eval/perplexity.py ...` shares the work between processes.
"""

from dataclasses import dataclass
from pathlib import Path

from kd.distributed import print_rank0, start_gloo
from kd.evaluation.likelihood import make_batches, row_sums
from kd.evaluation.models import EvaluationSettings
from kd.evaluation.results import (
    describe,
    is_measured,
    likelihood_result,
    likelihood_text,
    write_result,
)
from kd.evaluation.rows import encode_heldout, load_sources, rows_hash
from kd.recipe import parse, setting
from kd.run.exit import run


@dataclass
class PerplexitySettings:
    out_dir: str = setting("results", "folder of the results; perplexity/NAME.json in it")
    rolling: bool = setting(
        False, "of text every token, in windows, as lm-evaluation-harness; else cut at max_length"
    )


def main() -> None:
    settings, perplexity = parse(EvaluationSettings, PerplexitySettings, description=__doc__)
    raw = load_sources(settings.sources, settings.mixture_seed)
    start_gloo()
    for name, path in settings.named_models.items():
        measure(name, path, settings, perplexity, raw)


def measure(
    name: str, path: str, settings: EvaluationSettings, perplexity: PerplexitySettings, raw: dict
) -> None:
    """Measure one model unless its file holds the same measurement already."""
    file = Path(perplexity.out_dir) / "perplexity" / f"{name}.json"
    tokenizer = settings.tokenizer(path)
    description = describe(settings, path, rows_hash(raw), tokenizer, rolling=perplexity.rolling)
    if is_measured(file, description):
        return
    rows = encode_heldout(raw, tokenizer, settings.max_length, perplexity.rolling)
    batches = make_batches(rows, tokenizer.pad_token_id, settings.batch_size)
    sums = row_sums(settings.load(path), batches, len(tokenizer), description=name)
    result = likelihood_result(rows, sums.rows[:, 0])
    write_result(file, description, result)
    print_rank0(f"{likelihood_text(name, result)}\nwrote {file}")


if __name__ == "__main__":
    run(main)
