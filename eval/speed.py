"""Measure how fast models generate, how large they are, and how much memory they use.

python eval/speed.py --models teacher=runs/teacher student=runs/student --out_dir results

All models get the same random prompts and generate the same number of tokens. The results are
medians after one warm-up repetition. The result of each model is OUT_DIR/speed/NAME.json. Peak
memory is measured on a GPU only. Timings hold for this machine while nothing else runs on it.
"""

from pathlib import Path

from kd.recipe import parse
from kd.run.exit import run
from kd.run.folder_lock import check_writable
from kd.settings.evaluation import ModelSelection, SpeedSettings


def main() -> None:
    selection, settings = parse(ModelSelection, SpeedSettings, description=__doc__)
    check_writable("out_dir", settings.out_dir)
    # Only now: these import torch and Transformers, which takes seconds; mistakes are told before.
    from kd.evaluation.models import model_for, tokenizer_for
    from kd.evaluation.results import describe_model, is_measured, write_result
    from kd.evaluation.speed import machine, speed_result, speed_text

    tokenizers = {name: tokenizer_for(selection, p) for name, p in selection.named_models.items()}
    vocab_size = min(map(len, tokenizers.values()))  # so that all models get the same prompts
    for name, path in selection.named_models.items():
        description = describe_model(
            selection,
            path,
            tokenizers[name],
            machine=machine(),
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            repeats=settings.repeats,
            batch_sizes=settings.batch_sizes,
            prompt_vocabulary=vocab_size,
        )
        file = Path(settings.out_dir) / "speed" / f"{name}.json"
        if is_measured(file, description):
            continue
        model = model_for(selection, path)
        result = speed_result(name, path, model, vocab_size, settings)
        del model  # free its memory before the next one is loaded
        write_result(file, description, result)
        print(f"{speed_text(name, result)}\nwrote {file}", flush=True)


if __name__ == "__main__":
    run(main)
