"""launch/slurm/ on a real cluster of two nodes. However a job is stopped, no saved step is lost."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from documentation import in_page
from processes import ROOT, logged_steps
from slurm_cluster import ENDED, Cluster, environment, install, wait_for
from small import small_rows

from kd.recipe import as_flags

pytestmark = pytest.mark.slow
LOGS = ROOT / "runs" / "slurm"


@pytest.fixture(scope="module")
def cluster():
    reason = install()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the jobs then, too
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def no_orphans(cluster, time_limited):
    """No process of a test's jobs outlives the test."""
    yield
    own = lambda: [p for p in cluster.processes() if job_of(p) != time_limited.job]  # noqa: E731
    assert wait_for(lambda: not own(), 45), own()


def job_of(process) -> str:
    return environment(process).get("SLURM_JOB_ID", "")


class Run:
    """One submitted job, its output_dir and the output of its first node."""

    def __init__(self, cluster, output: Path, job: str, name: str):
        self.cluster, self.output, self.job, self.name = cluster, output, job, name

    def printed(self) -> str:
        file = LOGS / f"{self.name}-{self.job}-node0.out"
        return file.read_text() if file.exists() else ""

    def batch_log(self) -> str:
        return (LOGS / f"{self.name}-{self.job}.out").read_text()

    def told(self) -> str:
        return self.printed()[-3000:] + self.batch_log()

    def steps(self) -> int:
        return logged_steps(self.printed())

    def await_steps(self, count: int) -> None:
        assert wait_for(lambda: self.steps() >= count, 400), self.printed()[-3000:]

    def end(self, seconds: float = 600) -> str:
        states = self.cluster.wait(self.job, seconds)
        assert len(states) == 1
        return states[0]

    def restarts(self) -> int:
        return int(self.cluster.field(self.job, "Restarts")[0])

    def ranks(self) -> list[psutil.Process]:
        return ranks_of(self.cluster, self.job)


def ranks_of(cluster, job: str) -> list[psutil.Process]:
    own = [p for p in cluster.processes() if job_of(p) == job]
    return [p for p in own if "RANK" in environment(p)]


@contextlib.contextmanager
def standing_still(ranks: list[psutil.Process]) -> Iterator[None]:
    """Suspend ranks, because a run of tiny models could end before SLURM acts on it."""
    assert ranks
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


def signalled(rank: psutil.Process) -> bool:
    """Return whether a suspended rank was sent a signal: SLURM resumes it, or the signal waits."""
    try:
        status = Path(f"/proc/{rank.pid}/status").read_text()
    except FileNotFoundError:  # resumed, and ended already
        return True
    waiting = re.search(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE).group(1)
    return "T (stopped)" not in status or int(waiting, 16) != 0


def distill(
    cluster, models: Path, output: Path, *sbatch, name: str, profile="cpu", **changes
) -> Run:
    """Submit a distillation on two nodes: ZeRO-2 student, teacher sharded over both by ZeRO-3."""
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
    script = ["launch/slurm/train.sbatch", "train/distill.py", *as_flags(flags)]
    variables = {"PROFILE": profile, "NUM_PROCESSES": "1"}
    LOGS.mkdir(parents=True, exist_ok=True)
    log = "--output=runs/slurm/%x-%j.out"
    job = cluster.submit("--nodes=2", "--job-name", name, log, *sbatch, *script, **variables)
    return Run(cluster, output, job, name)


@pytest.fixture(scope="module")
def time_limited(cluster, models, tmp_path_factory):
    """A job with a real time limit, which runs for minutes next to the other tests."""
    limit = ("--time=00:03:00", "--signal=B:USR1@60")
    output = tmp_path_factory.mktemp("limit") / "run"
    rates = {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1}
    return distill(cluster, models, output, *limit, name="limit", **rates)


def test_warned_job_requeues_itself_during_imports_and_after_a_step(cluster, models, tmp_path):
    """Send the warning that SLURM sends before a time limit: scancel --batch --signal=USR1.

    Without --batch the signal reaches only the launchers and ranks, here before they handle it.
    """
    run = distill(cluster, models, tmp_path / "run", name="warned", max_steps=80, save_steps=1000)
    assert wait_for(lambda: len(run.ranks()) == 2, 120), run.batch_log()
    cluster.run("scancel", "--signal=TERM", run.job)
    assert wait_for(lambda: run.restarts() == 1, 120), run.batch_log()
    assert run.steps() == 0 and "outcome: none, after a warning" in run.batch_log()
    run.await_steps(5)
    with standing_still(ranks := run.ranks()):
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)
        assert wait_for(lambda: any(map(signalled, ranks)), 120), run.told()
    assert run.end() == "COMPLETED", run.told()
    assert run.restarts() == 2 and (run.output / "done.json").exists()
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+) of 80", run.printed()).group(1)
    assert f"resuming from {run.output}/checkpoint-{stopped}" in run.printed()
    assert run.steps() == 80  # each step once
    assert run.printed().count("rows per step: 8 = 2 processes") == 2  # one run, not one per node
    assert (LOGS / f"warned-{run.job}-node1.out").exists()  # one log per node


def test_preemption_loses_no_step(cluster, models, tmp_path):
    low = ("--partition=spot", "--gpus-per-node=6")
    run = distill(
        cluster, models, tmp_path / "run", *low, name="spot", max_steps=80, save_steps=100
    )
    run.await_steps(5)
    high = ("--partition=urgent", "--gpus-per-node=6", "--nodes=2", "--output=/dev/null")
    with standing_still(ranks := run.ranks()):
        urgent = cluster.submit(*high, "--wrap", "srun true")
        assert wait_for(lambda: any(map(signalled, ranks)), 120), run.told()
    assert cluster.wait(urgent, 300) == ["COMPLETED"]
    assert run.end() == "COMPLETED", run.told()
    assert run.restarts() >= 1 and run.steps() == 80
    assert "stopped by SIGTERM after step" in run.printed()


def examples() -> list[str]:
    lines = in_page((ROOT / "docs/cluster.md").read_text())
    return [line for line in lines if "sbatch " in line or "launch/slurm/" in line]


@pytest.mark.parametrize("example", examples(), ids=lambda line: " ".join(line.split()[-3:]))
def test_every_example_of_the_guide_is_accepted_by_slurm(cluster, example):
    """Jobs are held, because the models of these recipes are on a hub."""
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


def test_job_with_a_mistake_is_not_requeued(cluster, models, tmp_path):
    run = distill(cluster, models, tmp_path / "run", name="mistake", max_steps=4, soft_weight=2)
    assert run.end() == "FAILED" and run.restarts() == 0
    assert "soft_weight: 2.0; wanted 0 to 1" in run.batch_log()


def profile(folder: Path, lines: str) -> str:
    """PROFILE for launch/slurm/train.sbatch: a shell script instead of a launch file."""
    file = folder / "profile.sh"
    file.write_text(f"#!/usr/bin/env bash\n{lines}\n")
    file.chmod(0o755)
    return os.path.relpath(file.with_suffix(""), ROOT / "launch")


def test_failure_differs_from_a_signal_and_the_failed_nodes_log_is_shown(cluster, models, tmp_path):
    """Node 1 fails by itself, once node 0 runs; then SLURM ends node 0 by a signal."""
    up = tmp_path / "up"
    failure = f'until [[ -e {up} ]]; do sleep 0.2; done; echo "device 3 fell off the bus"; exit 1'
    other = profile(tmp_path, f"[[ $NODE_RANK == 0 ]] || {{ {failure}; }}\ntouch {up}\nsleep 300")
    run = distill(cluster, models, tmp_path / "run", name="failure", profile=other)
    assert run.end() == "FAILED" and run.restarts() == 0
    assert "device 3 fell off the bus" in run.batch_log()
    assert (LOGS / f"failure-{run.job}.ended").read_text() == "failure 1\nsignal 0\n"


def test_job_gives_up_after_three_starts_without_a_checkpoint(cluster, models, tmp_path):
    """This happens when the time limit is shorter than the loading of the models."""
    early = profile(tmp_path, "kill -TERM $PPID; exit 1")  # to the shell next to the launcher
    run = distill(cluster, models, tmp_path / "run", name="early", profile=early)
    assert run.end() == "FAILED" and run.restarts() == 2
    assert "three starts without a checkpoint" in run.batch_log()


def test_time_limit_loses_no_step_and_a_cancelled_job_stays_cancelled(cluster, time_limited):
    run = time_limited
    assert wait_for(lambda: "resuming from" in run.printed(), 900), run.told()
    stopped = int(re.search(r"stopped by SIGUSR1 after step (\d+)", run.printed()).group(1))
    assert f"resuming from {run.output}/checkpoint-{stopped}" in run.printed()
    first = run.printed().split("resuming from")[0]
    assert logged_steps(first) == stopped
    cluster.run("scancel", run.job)
    assert run.end() == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits
    assert run.end() == "CANCELLED"
    assert wait_for(lambda: not cluster.processes(), 45)


def write_recipes(models: Path, work: Path) -> Path:
    """Recipes of a teacher that learns short answers, because only finished answers become rows."""
    folder = work / "recipes"
    folder.mkdir(parents=True)
    words = ["lists", "keys", "files", "trees", "heaps", "loops", "rows", "names", "bytes"]
    asked = [{"role": "user", "content": f"What are {word}?"} for word in words]
    told = [{"role": "assistant", "content": f"Just {word}."} for word in words]
    rows = [{"messages": list(row)} for row in zip(asked, told, strict=True)]
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (work / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": m["content"]}) for m in asked)
    )
    train = "global_batch_size: 4\nlogging_steps: 1\nsave_steps: 500\nlearning_rate: 0.02\n"
    data = f"data:\n  - {{path: {work}/rows.jsonl}}\n"
    answers = f"data:\n  - {{path: {work}/runs/answers/train.jsonl}}\n"
    teacher, student = f"teacher: {work}/runs/merged\n", f"{models}/student\n{answers}{train}"
    recipes = {
        "1_teacher": f"model: {models}/teacher\nlora_rank: 8\n{data}{train}max_steps: 80\n"
        f"output_dir: {work}/runs/teacher\n",
        "2_answers": f"model: {work}/runs/merged\nprompts:\n  - {{path: {work}/prompts.jsonl}}\n"
        f"max_new_tokens: 24\noutput_dir: {work}/runs/answers\n",
        "3_a_sft": f"model: {student}max_steps: 3\noutput_dir: {work}/runs/sft\n",
        "3_b_distill": f"student: {student}{teacher}max_steps: 300\n"
        f"output_dir: {work}/runs/distill\n",
    }
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def pipeline(cluster, recipes: Path, work: Path) -> dict[str, str]:
    heldout = json.dumps([{"path": str(work / "rows.jsonl"), "count": 4}])
    variables = ["env", "PROFILE=cpu", "NUM_PROCESSES=1"]
    text = cluster.run(*variables, "launch/slurm/pipeline.sh", recipes, heldout)
    return dict(line.split() for line in text.strip().splitlines())


def test_pipeline_ends_with_a_report_and_the_last_array_element_requeues_only_itself(
    cluster, models, tmp_path
):
    jobs = pipeline(cluster, write_recipes(models, tmp_path), tmp_path)
    steps = ["teacher", "merge", "answers", "students", "perplexity", "agreement", "report"]
    assert list(jobs) == steps
    students = jobs["students"]
    log = LOGS / f"students-{students}_2-node0.out"
    begun = lambda: log.exists() and logged_steps(log.read_text()) > 3  # noqa: E731
    assert wait_for(lambda: begun() or cluster.field(students, "JobState")[0] in ENDED, 600)
    with standing_still(ranks := ranks_of(cluster, students)):
        states = {name: cluster.field(job, "JobState") for name, job in jobs.items()}
        assert begun() and set(states["report"]) == {"PENDING"}, states
        master = cluster.field(f"{students}_2", "JobId")
        assert master == [students]  # the last element has the id of the array
        cluster.run("scancel", "--batch", "--signal=USR1", f"{students}_2")
        assert wait_for(lambda: any(map(signalled, ranks)), 120), log.read_text()
    states = {name: cluster.wait(job, 600) for name, job in jobs.items()}
    assert states == {n: ["COMPLETED"] * (2 if n == "students" else 1) for n in steps}
    first, last = (cluster.field(f"{students}_{i}", "Restarts") for i in (1, 2))
    assert (first, last) == (["0"], ["1"]) and "stopped by SIGUSR1" in log.read_text()
    assert logged_steps(log.read_text()) == 300
    times = [[cluster.field(jobs[n], f"{edge}Time") for edge in ("Start", "End")] for n in steps]
    assert all(max(before[1]) <= min(after[0]) for before, after in pairwise(times))
    report = (tmp_path / "runs" / "results" / "report.md").read_text()
    assert all(name in report for name in ("teacher", "sft", "distill")), report


def test_pipeline_stops_where_a_step_fails(cluster, models, tmp_path):
    recipes = write_recipes(models, tmp_path)
    text = (recipes / "1_teacher.yaml").read_text()
    (recipes / "1_teacher.yaml").write_text(text.replace(f"{models}/teacher", f"{tmp_path}/none"))
    jobs = pipeline(cluster, recipes, tmp_path)
    assert cluster.wait(jobs["teacher"], 300) == ["FAILED"]
    for name in list(jobs)[1:]:
        assert set(cluster.wait(jobs[name], 60)) == {"CANCELLED"}, name


def test_lost_node_costs_at_most_one_save_interval(cluster, models, tmp_path):
    """Must be the last test: it also takes the node from the job with the time limit."""
    run = distill(cluster, models, tmp_path / "run", name="lost", max_steps=40, save_steps=4)
    run.await_steps(10)
    with standing_still(run.ranks()):
        cluster.crash("127.0.0.2")
        before = run.steps()
    assert wait_for(lambda: run.restarts() == 1, 120), run.batch_log()
    cluster.start_node("127.0.0.2")
    assert run.end() == "COMPLETED", run.told()
    begun = int(re.search(r"resuming from \S+/checkpoint-(\d+)", run.printed()).group(1))
    assert before - begun <= 4 and (run.output / "done.json").exists()
