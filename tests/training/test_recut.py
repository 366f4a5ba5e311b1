"""The optimizer's state of ZeRO-2 is cut for other ranks number by number."""

import pytest
import torch

from kd.training.checkpoints import recut

TOTAL = 23  # numbers of one parameter group


def parts(ranks: int) -> list[dict]:
    """What the ranks save: the weights 0 ... 22, padded to parts of equal length."""
    size = -(-TOTAL // (2 * ranks)) * 2
    padded = torch.full((size * ranks,), -1.0)
    padded[:TOTAL] = torch.arange(TOTAL)
    found = []
    for i in range(ranks):
        own = padded[i * size : (i + 1) * size]
        kept = own[: max(0, min(size, TOTAL - i * size))]  # weights are stored without padding
        state = {"step": torch.tensor(7.0), "exp_avg": own + 100}
        found.append(
            {
                "ds_config": {"zero_optimization": {"stage": 2}},
                "optimizer_state_dict": {
                    "single_partition_of_fp32_groups": [kept],
                    "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 0.1}]},
                },
            }
        )
    return found


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("after", [1, 2, 3, 8, 16])
def test_all_ranks_together_have_every_number_once(before, after, monkeypatch):
    """With 16 ranks of two numbers each, the last ones have none."""
    weights, moments = [], []
    monkeypatch.setattr(recut, "world_size", lambda: after)
    for own in range(after):
        monkeypatch.setattr(recut, "rank", lambda own=own: own)
        state = recut.own_part(parts(before))["optimizer_state_dict"]
        (kept,), (padding,) = state["single_partition_of_fp32_groups"], state["group_paddings"]
        own_state = state["base_optimizer_state"]["state"][0]
        assert own_state["step"] == 7 and len(own_state["exp_avg"]) == len(kept) + padding
        weights.append(kept)
        moments.append(own_state["exp_avg"][: len(kept)])
    assert torch.equal(torch.cat(weights), torch.arange(TOTAL, dtype=torch.float))
    assert torch.equal(torch.cat(moments), torch.arange(TOTAL) + 100.0)


def test_state_in_blocks_is_refused():
    """8-bit optimizers store one scale for many numbers."""
    found = parts(2)
    for part in found:
        part["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["absmax"] = torch.ones(3)
    with pytest.raises(ValueError, match="absmax is stored in blocks"):
        recut.own_part(found)


def test_an_order_that_depends_on_the_ranks_is_refused():
    usual = {"zero_optimization": {"stage": 2}}
    robin = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    recut.check_order(usual, usual)
    for configs in ((usual, robin), (robin, usual)):
        with pytest.raises(ValueError, match="round_robin_gradients: true"):
            recut.check_order(*configs)
