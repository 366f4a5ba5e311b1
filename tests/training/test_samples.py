"""Sample texts equal Transformers' greedy generation."""

import torch
from transformers import AutoModelForCausalLM

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.models.heads import LossInputs, return_loss
from kd.training.samples import decode_greedily, markdown_table, prompt_of


def test_the_wrapped_student_generates_what_greedy_generation_does(models, tokenizer):
    """Prompts of different lengths in one batch, padded on the right."""
    begun = [
        tokenizer.encode(text) for text in ("What does the sort of", "Return", "a list of all")
    ]
    model = AutoModelForCausalLM.from_pretrained(models / "student").eval()
    expected = []
    for ids in begun:
        written = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=8, eos_token_id=None
        )
        expected.append(written[0, len(ids) :].tolist())

    return_loss(model)

    def next_tokens(batch):
        asked = LossInputs(batch["labels"], None, model.config.vocab_size)
        return model(batch["input_ids"], batch["position_ids"], loss_inputs=asked)

    assert decode_greedily(next_tokens, begun, 8, set()) == expected
    end = expected[0][3]
    cut = expected[0][: expected[0].index(end)]
    assert decode_greedily(next_tokens, begun, 8, {end})[0] == cut


def test_the_prompt_of_plain_text_is_its_first_tokens():
    chat = EncodedRow.from_labels([5, 6, 7, 8, 9], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 8, 9])
    assert prompt_of(chat) == [5, 6, 7]
    ids = list(range(100))
    assert prompt_of(EncodedRow.from_labels(ids, [IGNORE_INDEX, *ids[1:]])) == ids[:32]
    long = list(range(400))  # the end of a long prompt, to which the answer belongs
    assert (
        prompt_of(EncodedRow.from_labels(long, [IGNORE_INDEX] * 300 + long[300:])) == long[44:300]
    )


def test_texts_are_escaped_in_table_cells():
    lines = markdown_table({"prompt": ["a | b\n<b>"], "student": [""]}).splitlines()
    assert lines[2] == "| a &#124; b<br>&lt;b> | (nothing) |"
