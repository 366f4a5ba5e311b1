"""What a log says of several ranks; and TensorBoard's curves and final figures of a resumed run."""

import json
from types import SimpleNamespace

import pytest
from jobs.step_metrics import WORK
from processes import start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from kd.training.step_metrics import of_the_run
from kd.training.tensorboard import write_hparams, write_no_step_twice


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[list[dict]]:
    """Of two ranks what each of two logs says."""
    out = tmp_path_factory.mktemp("figures")
    job = start("torchrun", "--nproc-per-node", 2, "tests/jobs/step_metrics.py", out)
    files = [out / f"{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), job.stdout[-4000:]
    return [json.loads(file.read_text()) for file in files]


def test_every_rank_has_the_same_figures_and_a_second_log_has_nothing_of_the_first(found):
    one, two = found
    shared = [[{k: v for k, v in log.items() if k != "pace"} for log in rank] for rank in found]
    assert shared[0] == shared[1] and shared[0][0] == shared[0][1]
    assert one[0]["pace"] == [3.0, 32] and two[0]["pace"] == [4.0, 32]  # each rank's own


def test_means_are_over_the_tokens_of_all_ranks_and_times_are_of_a_step(found):
    figures = found[0][0]
    assert figures["cross_entropy"] == (20 + 80) / 40  # not the mean of two means
    assert figures["top1_agreement"] == 12 / 40 and figures["on_policy_divergence"] == 8 / 4
    assert figures["padding_share"] == pytest.approx(1 - (2 * 7 + 2 * 8) / 64)
    assert figures["generated_length"] == 11 / 2 and figures["generated_cut_share"] == 1 / 2
    assert figures["memory_gib"] == 2.0  # of the fullest
    # Two steps; the slowest rank's ten seconds are the step's, a phase is the mean rank's.
    assert figures["seconds_step"] == 5.0 and figures["target_tokens_per_second"] == 44 / 10
    assert figures["seconds_student"] == 5.0 / 2 / 2 and figures["seconds_loss"] == 2.0 / 2 / 2
    assert figures["seconds_teacher"] == 0.0 and "seconds_generation" not in figures
    position, target, peak = WORK
    operations = (position * 64 + target * 44) / 2  # of a rank
    assert figures["matrix_peak_share"] == pytest.approx(operations / 10 / peak)
    machine = {"memory_gib", "target_tokens_per_second", "matrix_peak_share", "seconds_step"}
    assert not machine & set(of_the_run(figures)) and "padding_share" in of_the_run(figures)


def logged(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("checkpoint, kept", [("run/checkpoint-4", 4), (None, 0)])
def test_steps_behind_the_checkpoint_are_shown_once_as_they_were_done_again(
    tmp_path, checkpoint, kept
):
    with SummaryWriter(tmp_path) as writer:
        for step in range(1, 7):
            writer.add_scalar("train/loss", 0.0, step)
    callback = TensorBoardCallback()
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=[callback]), is_world_process_zero=lambda: True
    )
    write_no_step_twice(trainer, str(tmp_path), checkpoint)
    for step in range(kept + 1, 9):
        callback.tb_writer.add_scalar("train/loss", 1.0, step)
    callback.tb_writer.close()
    wanted = [(step, float(step > kept)) for step in range(1, 9)]
    assert logged(tmp_path) == {"train/loss": wanted}


def test_the_final_figures_have_their_curves_names_and_draw_no_curve(tmp_path):
    recipe = {"learning_rate": 1e-4, "student": "s", "data": "x" * 200, "dataloader_num_workers": 2}
    metrics = {"train_loss": 3.0, "eval_loss": 2.0, "eval_agreement": 0.5}
    write_hparams(str(tmp_path), recipe, metrics)
    assert logged(tmp_path) == {}
    contents = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    page = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert {metric.name.tag for metric in page.metric_infos} == {"eval/loss", "eval/top1_agreement"}
    assert {column.name for column in page.hparam_infos} == {"learning_rate", "student"}
