"""One run on five roads: launch file, accelerate, torchrun, srun (in test_slurm.py) and Python."""

import json
import os
from pathlib import Path

import pytest
from one_run import check_same_run, flags
from processes import ROOT, begin, start, succeed

SCRIPT = "train/distill.py"
ACCELERATE = ("accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml")
TWO = ["torchrun", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def launched(models, tmp_path_factory) -> Path:
    """The run of a launch file with two processes, to which the others are compared."""
    output = tmp_path_factory.mktemp("roads") / "launched"
    succeed("launch/cpu.sh", SCRIPT, *flags(models, output))
    return output


@pytest.mark.slow
@pytest.mark.parametrize("road", [(*ACCELERATE, "--main_process_port", "0"), TWO], ids=" ".join)
def test_two_processes_train_the_same_student_on_every_road(road, launched, models, tmp_path):
    succeed(*road, SCRIPT, *flags(models, tmp_path / "run"))
    check_same_run(launched, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_nodes_of_one_process_are_one_run(launcher, launched, models, tmp_path):
    """Two starts on this machine stand for two nodes."""
    port = str(20000 + os.getpid() % 9000)
    nodes = []
    for rank in ("0", "1"):
        if launcher == "accelerate":
            start = [*ACCELERATE, "--num_machines", "2", "--machine_rank", rank]
            start += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
            start += ["--num_processes", "2"]
        else:
            start = ["torchrun", "--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1"]
            start += ["--master-addr", "127.0.0.1", "--master-port", port]
        command = [*start, SCRIPT, *flags(models, tmp_path / "run")]
        nodes.append(begin(*command))
    printed = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    check_same_run(launched, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["teacher_sharded_over"] == "node"


@pytest.mark.slow
def test_an_accelerate_launch_that_forgets_its_other_machines_is_an_error(tmp_path):
    """Without deepspeed_multinode_launcher: standard it starts one run on each machine."""
    nodes = ("--num_machines", "2", "--num_processes", "2", "--machine_rank", "0")
    nodes += ("--main_process_ip", "127.0.0.1", "--main_process_port", "29511")
    script = ("train/sft.py", "--config", tmp_path / "none.yaml")
    done = start("accelerate", "launch", "--use_deepspeed", *nodes, *script)
    (ROOT / ".deepspeed_env").unlink(missing_ok=True)  # accelerate writes it for other machines
    assert done.returncode != 0
    assert "found 1 process in this run, but accelerate was told of 2 machines" in done.stdout


@pytest.mark.slow
def test_one_process_is_the_same_run_with_and_without_a_launcher(models, tmp_path):
    succeed("python", SCRIPT, *flags(models, tmp_path / "python"))
    succeed("launch/h100.sh", SCRIPT, *flags(models, tmp_path / "launched"))
    check_same_run(tmp_path / "python", tmp_path / "launched")
    record = json.loads((tmp_path / "python" / "run.json").read_text())
    assert record["recipe"]["deepspeed"] == "none"
    assert record["chosen"]["deepspeed"] == "one process"


@pytest.mark.slow
def test_deepspeed_works_in_one_process_without_a_launcher(models, tmp_path):
    zero2 = {"deepspeed": "ds_configs/student_zero2.json"}
    succeed("python", SCRIPT, *flags(models, tmp_path / "run", max_steps=2, **zero2))
    assert (tmp_path / "run" / "done.json").exists()


def test_a_world_smaller_than_its_step_is_an_error(tmp_path):
    """Two tasks of srun that each start a launcher of their own."""
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "1"}
    done = start("python", "train/sft.py", "--config", tmp_path / "none.yaml", **step)
    assert done.returncode == 2 and "found 1 process in this run" in done.stdout
    assert "the SLURM step is on 2 nodes" in done.stdout
