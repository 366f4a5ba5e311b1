"""The metrics of a log over several ranks, and TensorBoard's curves and final metrics."""

import json
from types import SimpleNamespace

import pytest
import torch
from jobs.step_metrics import WORK
from processes import start
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from kd.losses.metrics import REPORTED
from kd.training.step_metrics import SHARES, StepMetrics, reproducible
from kd.training.tensorboard import open_writer, write_hparams


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[list[dict]]:
    """Return [rank][log]: the metrics of two logs on each of two ranks."""
    out = tmp_path_factory.mktemp("metrics")
    job = start("torchrun", "--nproc-per-node", 2, "tests/jobs/step_metrics.py", out)
    files = [out / f"{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), job.stdout[-4000:]
    return [json.loads(file.read_text()) for file in files]


def test_all_ranks_log_the_same_metrics_and_each_log_starts_from_zero(found):
    one, two = found
    shared = [[{k: v for k, v in log.items() if k != "pace"} for log in rank] for rank in found]
    assert shared[0] == shared[1] and shared[0][0] == shared[0][1]
    assert one[0]["pace"] == [3.0, 32] and two[0]["pace"] == [4.0, 32]  # differs between ranks


def test_every_token_of_a_long_interval_is_counted():
    metrics = StepMetrics(torch.device("cpu"), ["cross_entropy"])
    batch = {"tokens": torch.tensor([1]), "input_ids": torch.zeros(1, 1)}
    for tokens in (2.0**24, 1.0, 1.0, 1.0):
        metrics.add(torch.full((len(REPORTED),), tokens), batch)
    assert metrics.sums.tolist() == [2**24 + 3] * len(REPORTED)


def test_means_are_over_the_tokens_of_all_ranks_and_times_are_per_step(found):
    metrics = found[0][0]
    assert metrics["cross_entropy"] == (20 + 80) / 40  # not the mean of two means
    assert metrics["top1_agreement"] == 12 / 40 and metrics["on_policy_divergence"] == 8 / 4
    assert metrics["padding_share"] == pytest.approx(1 - (2 * 7 + 2 * 8) / 64)
    assert metrics["generated_length"] == 11 / 2 and metrics["generated_cut_share"] == 1 / 2
    assert metrics["memory_gib"] == 2.0  # of the fullest process
    # Two steps. The slowest rank's ten seconds count for the steps, the mean rank's for a phase.
    assert metrics["seconds_step"] == 5.0 and metrics["target_tokens_per_second"] == 44 / 10
    assert metrics["seconds_student"] == 5.0 / 2 / 2 and metrics["seconds_loss"] == 2.0 / 2 / 2
    assert metrics["seconds_teacher"] == 0.0 and "seconds_generation" not in metrics
    operations = (WORK.per_position * 64 + WORK.per_target * 44) / 2  # per rank
    assert metrics["matrix_peak_share"] == pytest.approx(operations / 10 / WORK.measured_rate)
    read = 2 * 7 + 2 * 8  # tokens without padding, of both ranks
    utilization = WORK.model_per_token * read / 2 / 10 / WORK.vendor_rate
    assert metrics["model_flop_utilization"] == pytest.approx(utilization)
    shares = {name: metrics[name] for name in SHARES}
    assert found[0][2] == pytest.approx(shares)  # two equal logs
    machine = {"memory_gib", "target_tokens_per_second", "seconds_step", *SHARES}
    assert not machine & set(reproducible(metrics)) and "padding_share" in reproducible(metrics)


def logged(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("checkpoint, kept", [("run/checkpoint-4", 4), (None, 0)])
def test_steps_repeated_after_a_checkpoint_show_once_with_their_new_values(
    tmp_path, checkpoint, kept
):
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 7):
            writer.add_scalar("train/loss", 0.0, step)
    callback = TensorBoardCallback()
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=[callback]), is_world_process_zero=lambda: True
    )
    open_writer(trainer, str(tmp_path), checkpoint)
    for step in range(kept + 1, 9):
        callback.tb_writer.add_scalar("train/loss", 1.0, step)
    callback.tb_writer.close()
    expected = [(step, float(step > kept)) for step in range(1, 9)]
    assert logged(tmp_path) == {"train/loss": expected}


def test_hparams_start_with_the_settings_that_differ_and_with_held_out_figures(tmp_path):
    """As TensorBoard's own backend reads the folders of two runs."""
    recipe = {"beta": 0.5, "learning_rate": 1e-4, "data": "x" * 200, "dataloader_num_workers": 2}
    for run, rate in (("one", 1e-4), ("two", 2e-4)):
        with SummaryWriter(tmp_path / run) as writer:
            for tag in ("train/loss", "eval/loss", "eval/divergence"):
                writer.add_scalar(tag, 1.0, 1)
        write_hparams(str(tmp_path / run), recipe | {"learning_rate": rate})
        assert len(logged(tmp_path / run)["eval/loss"]) == 1  # no points were added
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(runs, str(tmp_path))
    backend, context = Context(TBContext(data_provider=provider)), RequestContext()
    found = backend.hparams_metadata(context, "")
    page = backend.experiment_from_metadata(context, "", True, found, [])
    assert [(info.name, info.differs) for info in page.hparam_infos] == [
        ("learning_rate", True),
        ("beta", False),
    ]
    tags = [metric.name.tag for metric in page.metric_infos]
    assert tags == ["eval/divergence", "eval/loss", "train/loss"]
