"""How far a merged model is from what was trained: an adapter on four-bit weights."""

import copy

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kd.evaluation.likelihood import AGREEMENT, make_batches, row_sums, teacher_states
from kd.evaluation.rows import encode_heldout, load_sources
from kd.models.load import four_bit, keep_packing_of_four_bit_weights

MAX_LENGTH, BATCH = 512, 4


def four_bit_difference(
    merged: PreTrainedModel,
    base: str,
    adapter: str,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[dict],
    count: int,
) -> dict:
    """KL from the trained model to the merged one and both cross-entropies, in nats a token.

    Without rows, or where their files are gone, only that is told.
    """
    try:
        raw = load_sources(copy.deepcopy(sources), 0)
    except ValueError as error:
        return {"text": f"adapter on 4 bit against merged: not measured ({error}); give --data"}
    raw = {label: rows[:count] for label, rows in raw.items()}
    if not raw:
        return {"text": "adapter on 4 bit against merged: not measured (no rows); give --data"}
    rows = encode_heldout(raw, tokenizer, MAX_LENGTH)
    batches = make_batches(rows, tokenizer.pad_token_id, BATCH)
    trained = load_four_bit(base, adapter, merged.dtype)
    states = teacher_states(trained, batches, len(tokenizer))
    del trained  # before the next one computes
    sums = row_sums(merged.eval(), batches, len(tokenizer), states, "merged").rows.sum(0)
    tokens = sum(row.targets for row in rows)
    means = dict(zip(AGREEMENT, (sums / tokens).tolist(), strict=True))
    return {
        "tokens": tokens,
        "rows": len(rows),
        **means,
        "text": (
            f"adapter on 4 bit against merged, {tokens} target tokens: cross-entropy "
            f"{means['teacher_cross_entropy']:.4f} and {means['cross_entropy']:.4f} nats a token, "
            f"KL {means['forward_kl']:.4f}, top-1 agreement {means['top1_agreement']:.1%}"
        ),
    }


def load_four_bit(base: str, adapter: str, dtype: torch.dtype) -> PreTrainedModel:
    """As it was trained: NF4 base, the adapter beside it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=four_bit(dtype), device_map={"": device}
    )
    keep_packing_of_four_bit_weights(model)
    return PeftModel.from_pretrained(model, adapter).get_base_model().eval()
