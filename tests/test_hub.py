"""Models of the hub: only the needed files, each fetched once, and no rank dies of waiting."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from hub_server import HubServer
from one_run import flags
from processes import ROOT, start, succeed

TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", 2)
FETCH = "import sys; from kd.pretrained import model_folder; print(model_folder(sys.argv[1]))"
PATIENCE = 15  # seconds of ddp_timeout; the hub takes twice as long


@pytest.fixture
def repository(models, tmp_path):
    """A model as a hub may have it: in two files of weights, and in other formats as well."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(models / "student", tmp_path / "repository")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(models / "student").save_pretrained(
        folder, max_shard_size="50KB"
    )
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not needed")
    return folder


def test_processes_fetch_each_needed_file_once(repository, tmp_path):
    """The hub sends no weights before all processes have asked it, so none finds them cached."""
    both = threading.Event()

    def hold(file: str) -> None:
        if file.endswith(".safetensors"):
            assert both.wait(300)

    with HubServer({"someone/model": repository}, hold) as hub:
        command = [sys.executable, "-c", FETCH, "someone/model"]
        environment = os.environ | hub.environment(tmp_path / "hf")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
        try:
            while hub.asked["someone/model"] < 4:  # each process asks twice: is it there, and what
                assert all(rank.poll() is None for rank in ranks)
                time.sleep(0.1)
            both.set()
            printed = [rank.communicate(timeout=300)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], printed
    files = {file.name for file in repository.iterdir() if file.is_file()}
    wanted = files - {"pytorch_model.bin", "consolidated.safetensors"}
    assert sum(file.endswith(".safetensors") for file in wanted) > 1
    assert hub.downloads == {("someone/model", file): 1 for file in wanted}


def test_a_missing_model_is_told_once_by_two_ranks_under_torchrun(models, tmp_path):
    run = flags(models, tmp_path / "run", student="someone/typo")
    done = start(*TORCHRUN, "train/distill.py", *run, HF_HUB_OFFLINE="1", HF_HOME=tmp_path)
    assert done.returncode, done.stdout
    assert done.stdout.count("someone/typo: no folder of this name") == 1, done.stdout
    assert done.stdout.count("error: someone/typo") == 1 and "[rank " not in done.stdout


def test_a_cache_without_the_weights_is_told(repository, tmp_path):
    with HubServer({"someone/model": repository}) as hub:
        program = FETCH.replace("argv[1]", "argv[1], weights=False")
        command = ("python", "-c", program, "someone/model")
        folder = succeed(*command, **hub.environment(tmp_path)).split()[-1]
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = start("python", "-c", FETCH, "someone/model", **offline)
    assert done.returncode and f"ValueError: {folder}/model-0" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("caches", "late"), [("shared", "teacher"), ("of each rank", "student")])
def test_no_rank_dies_while_another_rank_downloads(models, tmp_path, caches, late):
    """The hub takes longer than the ranks may wait in a collective; with separate caches, for one.

    A rank's cache stands for that of its node.
    """
    served = {f"someone/{key}": models / key for key in ("student", "teacher")}
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"os.environ['HF_HOME'] += os.environ['RANK'] * {caches == 'of each rank'}\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    changes = {"teacher_deepspeed": "ds_configs/teacher_zero3.json", "ddp_timeout": PATIENCE}
    changes |= {name.split("/")[1]: name for name in served}
    run = flags(models, tmp_path / "run", max_steps=1, **changes)
    with HubServer(served) as hub:
        environment = hub.environment(tmp_path / "hf")
        if caches == "of each rank":
            for name in served:
                succeed("python", "-c", FETCH, name, **environment | {"HF_HOME": f"{tmp_path}/hf0"})
        hub.downloads.clear()
        held = f"someone/{late}/model.safetensors"
        hub.hold = lambda file: time.sleep(2 * PATIENCE * (file == held))
        succeed(*TORCHRUN, script, "train/distill.py", *run, **environment)
    weights = {(name, "model.safetensors"): 1 for name in served}
    assert weights.items() <= hub.downloads.items() and set(hub.downloads.values()) == {1}
