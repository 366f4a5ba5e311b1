"""Compare a merged model with what was trained: the adapter on 4-bit weights."""

import copy

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.evaluation.likelihood import AGREEMENT, make_batches, row_sums, teacher_states
from kd.evaluation.rows import encode_heldout, load_sources
from kd.gpu import device
from kd.models.frozen import load_frozen
from kd.models.heads import causal_lm
from kd.models.load import nf4_config

MAX_LENGTH, BATCH_SIZE = 512, 4


def four_bit_difference(
    merged: PreTrainedModel,
    base: str,
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[dict],
    count: int,
) -> dict:
    """Measure the KL from the trained to the merged model and both cross-entropies, per token.

    Uses `count` rows of each source. The result has a printable "text"; it has nothing else if
    there are no rows or their files cannot be read.
    """
    missing = "4-bit adapter vs. merged model: not measured ({}); give --data"
    try:
        raw = load_sources(copy.deepcopy(sources), 0)
    except ValueError as error:
        return {"text": missing.format(error)}
    raw = {label: rows[:count] for label, rows in raw.items()}
    if not raw:
        return {"text": missing.format("no rows")}
    rows = encode_heldout(raw, tokenizer, MAX_LENGTH)
    batches = make_batches(rows, tokenizer.pad_token_id, BATCH_SIZE)
    dtype = merged.dtype
    trained = causal_lm(
        load_frozen(adapter, dtype, device(), base=base, quantization_config=nf4_config(dtype))
    )
    states = teacher_states(trained, batches, len(tokenizer))
    del trained  # its memory is free before the merged model runs
    sums = row_sums(merged.eval(), batches, len(tokenizer), states, "merged").rows.sum(0)
    tokens = sum(row.targets for row in rows)
    means = dict(zip(AGREEMENT, (sums / tokens).tolist(), strict=True))
    return {
        "tokens": tokens,
        "rows": len(rows),
        **means,
        "text": (
            f"4-bit adapter vs. merged model, {tokens} target tokens: cross-entropy "
            f"{means['teacher_cross_entropy']:.4f} vs. {means['cross_entropy']:.4f} nats per "
            f"token, KL {means['forward_kl']:.4f}, top-1 agreement {means['top1_agreement']:.1%}"
        ),
    }
