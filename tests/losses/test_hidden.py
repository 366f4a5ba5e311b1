"""Hidden-state losses and the layer map. tests/training/test_gradients.py tests their gradients."""

import pytest
import torch
from small import small_model, small_tokenizer
from torch.nn.functional import normalize

from kd.losses.hidden import HIDDEN_LOSSES, layer_map
from kd.models.blocks import layer_states


@pytest.mark.parametrize("name", HIDDEN_LOSSES)
def test_losses_are_zero_at_equality_and_positive_elsewhere(name):
    a, b = torch.randn(2, 7, 16, dtype=torch.float64)
    assert HIDDEN_LOSSES[name](a, a).abs().max() < 1e-12 and (HIDDEN_LOSSES[name](a, b) > 0).all()


def test_cosine_is_half_the_squared_distance_of_unit_vectors():
    a, b = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = (normalize(a, dim=-1) - normalize(b, dim=-1)).square().sum(-1) / 2
    torch.testing.assert_close(HIDDEN_LOSSES["cosine"](a, b), expected)


def test_by_default_every_block_maps_to_an_evenly_spaced_one_and_the_last_to_the_last():
    assert layer_map(None, 3, 6) == ((1, 2), (2, 4), (3, 6))
    assert layer_map(None, 4, 4) == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert layer_map(["0:0", "2:5"], 3, 6) == ((0, 0), (2, 5))


@pytest.mark.parametrize("pair", ["2", "a:1", "4:1", "1:7", "1:2:3"])
def test_an_invalid_pair_is_named_in_the_error(pair):
    with pytest.raises(ValueError, match="hidden_layers: .*" + pair):
        layer_map([pair], 3, 6)


def test_layer_states_equal_output_hidden_states():
    tokenizer = small_tokenizer()
    model = small_model(tokenizer).eval()
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
        with layer_states(model, [0, 1, 2]) as found:
            model(input_ids=ids)
    assert found.keys() == {0, 1}  # the last one is last_hidden_state
    assert all(torch.equal(found[n], expected[n]) for n in found)
