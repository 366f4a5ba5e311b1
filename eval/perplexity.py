"""Measure the token perplexity of models on held-out rows, and bits per byte of text.

python eval/perplexity.py --models teacher=runs/teacher student=runs/student \
    --data '[{"path": "heldout.jsonl"}]' --out_dir results

Target tokens are those of training: the assistant's tokens of a chat, all but the first token of a
text. With --rolling true, text is counted as in lm-evaluation-harness. The result of each model is
OUT_DIR/perplexity/NAME.json, with the sums of every row. A rerun measures only missing results.
With a launch file in front, the processes share the batches.
"""

from pathlib import Path

from kd.data.sources import check_sources
from kd.distributed import print_rank0, start_gloo
from kd.recipe import all_mistakes, parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import EvaluationSettings, PerplexitySettings


def main() -> None:
    with all_mistakes():
        settings, perplexity = parse(EvaluationSettings, PerplexitySettings, description=__doc__)
        check_sources(settings.sources)
    check_writable("out_dir", perplexity.out_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.likelihood import make_batches, row_sums
    from kd.evaluation.models import model_for, tokenizer_for
    from kd.evaluation.results import (
        describe,
        is_measured,
        likelihood_result,
        likelihood_text,
        write_result,
    )
    from kd.evaluation.rows import encode_heldout, load_sources, rows_hash

    raw = load_sources(settings.sources, settings.mixture_seed)
    start_gloo()
    for name, path in settings.named_models.items():
        file = Path(perplexity.out_dir) / "perplexity" / f"{name}.json"
        tokenizer = tokenizer_for(settings, path)
        rolling = perplexity.rolling
        description = describe(settings, path, rows_hash(raw), tokenizer, rolling=rolling)
        if is_measured(file, description):
            continue
        in_text = settings.control_tokens_in_text
        rows = encode_heldout(raw, tokenizer, settings.max_length, rolling, in_text)
        batches = make_batches(rows, tokenizer.pad_token_id, settings.batch_size)
        sums = row_sums(model_for(settings, path), batches, len(tokenizer), description=name)
        result = likelihood_result(rows, sums.rows[:, 0])
        write_result(file, description, result)
        print_rank0(f"{likelihood_text(name, result)}\nwrote {file}")


if __name__ == "__main__":
    run(main)
