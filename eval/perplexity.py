"""Measure how probable models find held-out rows: token perplexity, and bits per byte of text.

python eval/perplexity.py --models teacher=runs/teacher student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

Target tokens are training's: of chat the assistant's, of text all. One file a model is written,
OUT_DIR/perplexity/NAME.json, with the sums of every row.
"""

from dataclasses import dataclass
from pathlib import Path

from kd.evaluation.likelihood import make_batches, row_sums
from kd.evaluation.models import EvaluationSettings
from kd.evaluation.results import describe, is_measured, likelihood_result, write_result
from kd.evaluation.rows import encode_heldout, load_sources, rows_hash
from kd.recipe import parse, setting
from kd.training.exit import run


@dataclass
class OutputSettings:
    out_dir: str = setting("results", "folder of the results; perplexity/NAME.json in it")


def main() -> None:
    settings, output = parse(EvaluationSettings, OutputSettings, description=__doc__)
    raw = load_sources(settings.sources, settings.mixture_seed)
    for name, path in settings.named_models.items():
        file = Path(output.out_dir) / "perplexity" / f"{name}.json"
        measure(name, path, settings, raw, file)


def measure(name: str, path: str, settings: EvaluationSettings, raw: dict, file: Path) -> None:
    """Measure one model unless `file` holds the same measurement already."""
    tokenizer = settings.tokenizer(path)
    description = describe(settings, path, rows_hash(raw), tokenizer)
    if is_measured(file, description):
        return
    rows = encode_heldout(raw, tokenizer, settings.max_length)
    batches = make_batches(rows, tokenizer.pad_token_id, settings.batch_size)
    sums = row_sums(settings.load(path), batches, len(tokenizer), description=name)
    result = likelihood_result(rows, sums)
    write_result(file, description, result)
    for source, means in [*result["sources"].items(), ("overall", result["overall"])]:
        bits = means["bits_per_byte"]
        print(
            f"{name}, {source}: perplexity {means['perplexity']:.4g} over {means['tokens']} tokens"
            + ("" if bits is None else f", {bits:.4g} bits per byte of text")
        )
    print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    run(main)
