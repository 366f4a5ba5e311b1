"""The influence of layers, against formulas in float64 and against students without them."""

import json
import math

import pytest
import torch
from small import small_model, small_rows, small_tokenizer

from kd.evaluation.influence import (
    angle,
    angular_distances,
    choose_by_influence,
    greedy_removal,
    perplexity_without,
    text_batches,
)
from kd.models.inherit import inherit


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def parent(tokenizer):
    """Four layers; the third returns its input, and the second nearly does."""
    model = small_model(tokenizer, num_hidden_layers=4).eval()
    with torch.no_grad():
        for n, scale in ((1, 0.05), (2, 0.0)):
            model.model.layers[n].self_attn.o_proj.weight *= scale
            model.model.layers[n].mlp.down_proj.weight *= scale
    return model


@pytest.fixture(scope="module")
def batches(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in small_rows(12)))
    return text_batches([{"path": str(file)}], tokenizer, 64, 300, 2)


def test_the_rows_have_at_most_the_given_number_of_tokens(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in small_rows(200)))
    source = [{"path": str(file)}]

    def tokens(limit: int) -> int:
        batches = text_batches(source, tokenizer, 64, limit, 4)
        # Everything after the last target of a row is padding.
        ends = [(row != -100).nonzero().max() + 1 for b in batches for row in b.inputs["labels"]]
        return int(sum(ends))

    assert 900 < tokens(1000) <= 1000 and 100 < tokens(200) <= 200
    with pytest.raises(ValueError, match="tokens: 3, but the first row alone has more"):
        text_batches(source, tokenizer, 64, 3, 4)


def test_the_angle_is_the_arccos_of_the_cosine_and_exact_near_equality():
    a, b = torch.randn(2, 50, 8, dtype=torch.float64)
    expected = torch.cosine_similarity(a, b, dim=-1).arccos() / math.pi
    torch.testing.assert_close(angle(a, b).double(), expected, rtol=1e-5, atol=1e-6)
    assert angle(a, a).abs().max() == 0.0
    torch.testing.assert_close(angle(a, -a), torch.ones(50))
    tiny = torch.tensor([[1.0, 1e-6]])
    torch.testing.assert_close(angle(tiny, torch.tensor([[1.0, 0.0]])) * math.pi, tiny[:, 1])


@pytest.mark.parametrize("run", [1, 2])
@torch.no_grad()
def test_angular_distances_agree_with_output_hidden_states(parent, batches, run):
    norm = parent.model.norm
    sums, count = torch.zeros(5 - run, dtype=torch.float64), 0
    for batch in batches:
        last = []
        hook = norm.register_forward_pre_hook(lambda _, inputs, last=last: last.append(inputs[0]))
        ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
        found = parent(ids, position_ids=positions, output_hidden_states=True).hidden_states
        hook.remove()
        states = [state.double() for state in (*found[:-1], last[0])]  # before the final norm
        targets = batch.inputs["labels"] != -100
        for n in range(5 - run):
            cosine = torch.cosine_similarity(states[n], states[n + run], dim=-1)
            sums[n] += (cosine.clamp(max=1.0).arccos() / math.pi)[targets].sum()
        count += targets.sum()
    expected = (sums / count).tolist()
    assert angular_distances(parent, batches, run) == pytest.approx(expected, abs=1e-6)


def test_perplexity_without_layers_is_that_of_the_student_without_them(parent, batches, tokenizer):
    whole = perplexity_without(parent, batches, len(tokenizer))
    assert perplexity_without(inherit(parent, [0, 1, 2, 3]), batches, len(tokenizer)) == whole
    found = perplexity_without(parent, batches, len(tokenizer), [1, 3])
    assert found == perplexity_without(inherit(parent, [0, 2]), batches, len(tokenizer)) != whole
    assert perplexity_without(parent, batches, len(tokenizer)) == whole  # all layers are back


@pytest.mark.parametrize("choice", ["angular", "angular_run"])
def test_the_layers_with_the_smallest_angles_are_removed(parent, batches, tokenizer, choice):
    layers, measured = choose_by_influence(choice, parent, batches, len(tokenizer), 2)
    assert layers == [0, 3] and len(measured["angular_distances"]) == (
        4 if choice == "angular" else 3
    )
    assert choose_by_influence(choice, parent, batches, len(tokenizer), 4)[0] == [0, 1, 2, 3]


def test_each_removed_layer_raises_the_perplexity_least(parent, batches, tokenizer):
    removed = greedy_removal(parent, batches, len(tokenizer), 2)
    students, gone = {}, []
    for layer, perplexity in removed.items():
        students = {
            n: perplexity_without(
                inherit(parent, [k for k in range(4) if k not in (*gone, n)]),
                batches,
                len(tokenizer),
            )
            for n in range(4)
            if n not in gone
        }
        assert perplexity == students[layer] == min(students.values())
        gone.append(layer)
    layers, measured = choose_by_influence("perplexity", parent, batches, len(tokenizer), 2)
    assert layers == sorted(set(range(4)) - set(gone)) and measured["perplexity_without"] == removed


def test_measurements_do_not_depend_on_the_batch_size(parent, tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in small_rows(12)))
    found = []
    for size in (1, 5):
        batches = text_batches([{"path": str(file)}], tokenizer, 64, 300, size)
        found.append(angular_distances(parent, batches))
        found[-1].append(perplexity_without(parent, batches, len(tokenizer)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
