"""launch/slurm/ on a real cluster of two nodes: stopped in every way, and nothing is lost that was saved."""

import json
import re
import time
from pathlib import Path

import pytest
from processes import ROOT
from slurm_cluster import Cluster, install, wait_for
from small import small_rows

pytestmark = pytest.mark.slow
LOGS = ROOT / "runs" / "slurm"


@pytest.fixture(scope="module")
def cluster():
    reason = install()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def no_orphans(cluster, time_limited):
    """After every test nothing of its jobs is left."""
    yield
    own = lambda: [p for p in cluster.processes() if job_of(p) != time_limited.job]  # noqa: E731
    assert wait_for(lambda: not own(), 45), own()


def job_of(process) -> str:
    try:
        return process.environ()["SLURM_JOB_ID"]
    except Exception:  # it has just ended
        return ""


class Run:
    """One submitted job, its output_dir and what its first node has printed."""

    def __init__(self, cluster, output: Path, job: str, name: str):
        self.cluster, self.output, self.job, self.name = cluster, output, job, name

    def printed(self) -> str:
        file = LOGS / f"{self.name}-{self.job}-node0.out"
        return file.read_text() if file.exists() else ""

    def batch_log(self) -> str:
        return (LOGS / f"{self.name}-{self.job}.out").read_text()

    def steps(self) -> int:
        return self.printed().count("'grad_norm'")

    def await_steps(self, count: int) -> None:
        assert wait_for(lambda: self.steps() >= count, 400), self.printed()[-3000:]

    def end(self, seconds: float = 600) -> str:
        states = self.cluster.wait(self.job, seconds)
        assert len(states) == 1
        return states[0]

    def restarts(self) -> int:
        return int(self.cluster.field(self.job, "Restarts")[0])


def distill(cluster, models: Path, output: Path, *sbatch, name: str, processes=1, **changes) -> Run:
    """The student on two nodes, under ZeRO-2, its teacher sharded over both by ZeRO-3."""
    (models / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(64))))
    flags = {
        "student": models / "student",
        "teacher": models / "teacher",
        "data": json.dumps([{"path": str(models / "rows.jsonl")}]),
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "logging_steps": 1,
        "dataloader_num_workers": 1,
        "disable_tqdm": "true",
        "output_dir": output,
    } | changes
    spelt = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
    script = ["launch/slurm/train.sbatch", "train/distill.py", *spelt]
    environment = {"PROFILE": "cpu", "NUM_PROCESSES": str(processes)}
    LOGS.mkdir(parents=True, exist_ok=True)
    log = "--output=runs/slurm/%x-%j.out"
    job = cluster.submit("--nodes=2", "--job-name", name, log, *sbatch, *script, **environment)
    return Run(cluster, output, job, name)


@pytest.fixture(scope="module")
def time_limited(cluster, models, tmp_path_factory):
    """Runs beside all other tests: a real time limit takes its minutes."""
    limit = ("--time=00:03:00", "--signal=B:USR1@60")
    output = tmp_path_factory.mktemp("limit") / "run"
    rates = {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1}
    return distill(cluster, models, output, *limit, name="limit", **rates)


def test_a_warning_ends_the_step_is_requeued_and_every_step_is_done_once(cluster, models, tmp_path):
    """scancel --batch --signal=USR1 is what SLURM does before a time limit, without the wait."""
    run = distill(cluster, models, tmp_path / "run", name="warned", max_steps=40, save_steps=1000)
    run.await_steps(5)
    cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    assert run.end() == "COMPLETED", run.printed()[-3000:] + run.batch_log()
    assert run.restarts() == 1 and (run.output / "done.json").exists()
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+) of 40", run.printed()).group(1)
    assert f"going on from {run.output}/checkpoint-{stopped}" in run.printed()
    assert run.steps() == 40
    assert (LOGS / f"warned-{run.job}-node1.out").exists()  # a log for every node


def test_preemption_loses_no_step(cluster, models, tmp_path):
    low = ("--partition=spot", "--gpus-per-node=6")
    run = distill(
        cluster, models, tmp_path / "run", *low, name="spot", max_steps=80, save_steps=100
    )
    run.await_steps(5)
    high = ("--partition=urgent", "--gpus-per-node=6", "--nodes=2", "--output=/dev/null")
    urgent = cluster.submit(*high, "--wrap", "srun true")
    assert cluster.wait(urgent, 300) == ["COMPLETED"]
    assert run.end() == "COMPLETED", run.printed()[-3000:] + run.batch_log()
    assert run.restarts() >= 1 and run.steps() == 80
    assert "stopped by SIGTERM after step" in run.printed()


def examples() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "launch/slurm/README.md").read_text(), re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.mark.parametrize("example", examples(), ids=lambda line: " ".join(line.split()[-3:]))
def test_every_example_of_the_page_is_accepted_and_starts_only_when_let(cluster, example):
    """Held back, since the models of these recipes are on a hub."""
    held = (
        f"{example} --hold"
        if "pipeline" in example
        else example.replace("sbatch", "sbatch --hold", 1)
    )
    text = cluster.run("bash", "-c", held)
    jobs = re.findall(r"(\d+)$", text, re.MULTILINE)
    assert len(jobs) == (7 if "pipeline" in example else 1), text
    states = {tuple(set(cluster.field(job, "JobState"))) for job in jobs}
    cluster.run("scancel", *jobs)
    assert states == {("PENDING",)}


def test_a_mistake_is_not_requeued(cluster, models, tmp_path):
    run = distill(cluster, models, tmp_path / "run", name="mistake", max_steps=4, soft_weight=2)
    assert run.end() == "FAILED" and run.restarts() == 0
    assert "soft_weight: 2.0; wanted 0 to 1" in run.batch_log()


def test_a_time_limit_loses_no_step_and_a_cancelled_job_stays_so(cluster, time_limited):
    run = time_limited
    assert wait_for(lambda: "going on from" in run.printed(), 900), run.batch_log()
    stopped = int(re.search(r"stopped by SIGUSR1 after step (\d+)", run.printed()).group(1))
    assert f"going on from {run.output}/checkpoint-{stopped}" in run.printed()
    first = run.printed().split("going on from")[0]
    assert first.count("'grad_norm'") == stopped
    cluster.run("scancel", run.job)
    assert run.end() == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits here
    assert run.end() == "CANCELLED"
    assert wait_for(lambda: not cluster.processes(), 45)


def write_recipes(models: Path, work: Path) -> Path:
    folder = work / "recipes"
    folder.mkdir(parents=True)
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(40))))
    data = f"data:\n  - {{path: {work}/rows.jsonl}}\nglobal_batch_size: 4\nlogging_steps: 1\n"
    prompts = [{"prompt": f"Say something about {i}."} for i in range(6)]
    (work / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    train = data + "max_steps: 3\nsave_steps: 50\n"
    student = f"{train}output_dir: {work}/runs"
    (folder / "1_teacher.yaml").write_text(
        f"model: {models}/teacher\nlora_rank: 4\n{train}output_dir: {work}/runs/teacher\n"
    )
    (folder / "2_answers.yaml").write_text(
        f"model: {work}/runs/merged\nprompts:\n  - {{path: {work}/prompts.jsonl}}\n"
        f"max_new_tokens: 4\noutput_dir: {work}/runs/answers\n"
    )
    teacher = f"teacher: {work}/runs/merged\n"
    (folder / "3_b_distill.yaml").write_text(
        f"student: {models}/student\n{teacher}{student}/distill\n".replace("steps: 3", "steps: 300")
    )
    (folder / "3_a_sft.yaml").write_text(f"model: {models}/student\n{student}/sft\n")
    return folder


def pipeline(cluster, recipes: Path, work: Path) -> dict[str, str]:
    heldout = json.dumps([{"path": str(work / "rows.jsonl"), "count": 4}])
    environment = ["env", "PROFILE=cpu", "NUM_PROCESSES=1"]
    text = cluster.run(*environment, "launch/slurm/pipeline.sh", recipes, heldout)
    return dict(line.split() for line in text.strip().splitlines())


def test_pipeline_stops_where_a_step_fails(cluster, models, tmp_path):
    recipes = write_recipes(models, tmp_path)
    text = (recipes / "1_teacher.yaml").read_text()
    (recipes / "1_teacher.yaml").write_text(text.replace(f"{models}/teacher", f"{tmp_path}/none"))
    jobs = pipeline(cluster, recipes, tmp_path)
    assert cluster.wait(jobs["teacher"], 300) == ["FAILED"]
    for name in list(jobs)[1:]:
        assert set(cluster.wait(jobs[name], 60)) == {"CANCELLED"}, name
