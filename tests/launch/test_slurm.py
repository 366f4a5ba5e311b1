"""launch/slurm/ on real clusters of two nodes. However a job is stopped, no saved step is lost.

What a signal does is tested under both ways in which SLURM tracks processes.
"""

import contextlib
import json
import re
import shlex
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from documentation import in_page
from one_run import check_same_run
from one_run import flags as small_flags
from processes import ROOT, logged_steps, succeed
from short_answers import write_recipes
from slurm_cluster import Cluster, can_track, compile_operator, environment, install, wait_for
from small import small_rows

from kd.recipe import as_flags

pytestmark = pytest.mark.slow
FOLDERS = sorted(path for path in (ROOT / "recipes").glob("?_*") if path.is_dir())
LOGS = ROOT / "runs" / "slurm"
BATCH = "launch/slurm/train.sbatch"


TRACKERS = [name for name in ("cgroup", "linuxproc") if can_track(name)]
once = pytest.mark.parametrize("cluster", TRACKERS[:1], indirect=True)


@pytest.fixture(scope="module")
def clusters():
    """{tracker: cluster}."""
    reason = install()
    if reason:
        pytest.skip(reason)
    compile_operator()
    found = {tracker: Cluster(tracker) for tracker in TRACKERS}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the jobs then, too
    try:
        for cluster in found.values():
            cluster.start()
        yield found
    finally:
        for cluster in found.values():
            cluster.stop()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(params=TRACKERS)
def cluster(request, clusters):
    """The cluster with the tracker of the test."""
    return clusters[request.param]


@pytest.fixture(autouse=True)
def no_orphans(clusters):
    """No process of a test's jobs outlives the test."""
    yield
    own = lambda: [p for each in clusters.values() for p in each.processes()]  # noqa: E731
    assert wait_for(lambda: not own(), 120), own()


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
    cluster, models: Path, output: Path, *sbatch, name: str, site: str = "", **changes
) -> Run:
    """Submit a distillation on two nodes: ZeRO-2 student, teacher sharded over both by ZeRO-3."""
    (models / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(64))))
    flags = {
        "student": models / "student",
        "teacher": models / "teacher",
        "teacher_sharded_over": "all",
        "data": json.dumps([{"path": str(models / "rows.jsonl")}]),
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "logging_steps": 1,
        "dataloader_num_workers": 1,
        "disable_tqdm": "true",
        "output_dir": output,
    } | changes
    words = [f"SITE={site}"] if site else []
    script = [BATCH, "NUM_PROCESSES=1", *words, "train/distill.py", *as_flags(flags)]
    LOGS.mkdir(parents=True, exist_ok=True)
    log = "--output=runs/slurm/%x-%j.out"
    job = cluster.submit("--nodes=2", "--job-name", name, log, *sbatch, *script)
    return Run(cluster, output, job, name)


def test_time_limit_loses_no_step_and_a_cancelled_job_stays_cancelled(clusters, models, tmp_path):
    """The jobs of both clusters wait together for the limit, which SLURM counts in minutes."""
    limit = ("--time=00:03:00", "--signal=B:USR1@60")
    steps = {"max_steps": 5000, "save_steps": 5000}
    jobs = [
        distill(cluster, models, tmp_path / tracker, *limit, name="limit", **steps)
        for tracker, cluster in clusters.items()
    ]
    with contextlib.ExitStack() as stack:
        for run in jobs:
            run.await_steps(2)
            stack.enter_context(standing_still(run.ranks()))
        for run in jobs:
            assert wait_for(lambda run=run: any(map(signalled, run.ranks())), 300), run.told()
    for run in jobs:
        assert wait_for(lambda run=run: "resuming from" in run.printed(), 400), run.told()
        stopped = int(re.search(r"stopped by SIGUSR1 after step (\d+)", run.printed()).group(1))
        assert f"resuming from {run.output}/checkpoint-{stopped}" in run.printed()
        first = run.printed().split("resuming from")[0]
        assert logged_steps(first) == stopped
        run.cluster.run("scancel", run.job)
    for run in jobs:
        assert run.end() == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits
    for run in jobs:
        assert run.end() == "CANCELLED"


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


@once
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


@once
def test_job_with_a_mistake_is_not_requeued(cluster, models, tmp_path):
    run = distill(cluster, models, tmp_path / "run", name="mistake", max_steps=4, soft_weight=2)
    assert run.end() == "FAILED" and run.restarts() == 0
    assert "soft_weight: 2.0; wanted 0 to 1" in run.batch_log()


def site(folder: Path, lines: str) -> str:
    """A site file that runs shell lines on every node, in place of the command."""
    (folder / "site.sh").write_text(f"inside=(bash {folder}/lines.sh)\nexport FROM_SITE=here\n")
    (folder / "lines.sh").write_text(f"{lines}\n")
    return str(folder / "site.sh")


@once
def test_failure_differs_from_a_signal_and_the_failed_nodes_log_is_shown(cluster, models, tmp_path):
    """Node 1 fails by itself, once node 0 runs; then SLURM ends node 0 by a signal."""
    up = tmp_path / "up"
    failure = f'until [[ -e {up} ]]; do sleep 0.2; done; echo "device 3 fell off the bus"; exit 1'
    first = f"[[ $PET_NODE_RANK == 0 && $FROM_SITE == here ]] || {{ {failure}; }}"
    other = site(tmp_path, f"{first}\ntouch {up}\nexec sleep 300")
    run = distill(cluster, models, tmp_path / "run", "--export=NONE", name="failure", site=other)
    assert run.end() == "FAILED" and run.restarts() == 0
    assert "device 3 fell off the bus" in run.batch_log()
    assert (LOGS / f"failure-{run.job}.ended").read_text() == "failure 1\nsignal 0\n"


@once
def test_job_gives_up_after_three_starts_that_come_no_further(cluster, models, tmp_path):
    """The first saves a step; the others are stopped before the next one."""
    early = site(tmp_path, "echo saved 5 > $KD_OUTCOME; kill -TERM $PPID; exit 1")
    run = distill(cluster, models, tmp_path / "run", name="early", site=early)
    assert run.end() == "FAILED" and run.restarts() == 3
    assert "three starts came no further than step 5" in run.batch_log()


@once
@pytest.mark.parametrize(
    ("flags", "words", "told"),
    [
        (["--ntasks-per-node=2"], ["NUM_PROCESSES=1"], "found 2(x2) tasks per node; wanted 1"),
        (["--cpus-per-task=1"], ["NUM_PROCESSES=4"], "found 1 CPUs for 4 processes on a node"),
        ([], ["NUM_PROCESSES=1", "SITE=none.sh"], "SITE: no file none.sh"),
        ([], ["train/none.py"], "no script 'train/none.py'"),
    ],
    ids=["tasks", "CPUs", "site", "script"],
)
def test_an_allocation_that_cannot_work_is_refused(cluster, flags, words, told):
    log = "--output=runs/slurm/%x-%j.out"
    job = cluster.submit(
        *("--nodes=2", "--job-name=refused", log, *flags, BATCH, *words, "train/sft.py")
    )
    assert cluster.wait(job, 60) == ["FAILED"]
    assert told in (LOGS / f"refused-{job}.out").read_text()


def pipeline(cluster, recipes: Path, work: Path) -> dict[str, str]:
    """Submit a pipeline and return {name: job}, or {"error:": its text}."""
    heldout = json.dumps([{"path": str(work / "rows.jsonl"), "count": 4}])
    text = cluster.run("python", "launch/slurm/pipeline.py", recipes, heldout, "--cpus-per-task=2")
    return dict(line.split(maxsplit=1) for line in text.strip().splitlines())


@once
def test_pipeline_ends_with_a_report(cluster, models, tmp_path):
    jobs = pipeline(cluster, write_recipes(models, tmp_path), tmp_path)
    steps = ["teacher", "merge", "answers", "stage3", "perplexity", "agreement", "report"]
    assert list(jobs) == steps
    states = {name: cluster.wait(job, 900) for name, job in jobs.items()}
    assert states == {n: ["COMPLETED"] * (2 if n == "stage3" else 1) for n in steps}
    times = [[cluster.field(jobs[n], f"{edge}Time") for edge in ("Start", "End")] for n in steps]
    assert all(max(before[1]) <= min(after[0]) for before, after in pairwise(times))
    report = (tmp_path / "runs" / "results" / "report.md").read_text()
    assert all(name in report for name in ("teacher", "sft", "distill")), report


@once
def test_pipeline_submits_nothing_with_a_mistake_and_stops_where_a_step_fails(
    cluster, models, tmp_path
):
    recipes = write_recipes(models, tmp_path)
    right = (recipes / "3_a_sft.yaml").read_text()
    (recipes / "3_a_sft.yaml").write_text(right + "soft_weigth: 1\n")
    (told,) = pipeline(cluster, recipes, tmp_path).items()
    assert told[0] == "error:" and "3_a_sft.yaml: unknown key soft_weigth" in told[1]
    (recipes / "3_a_sft.yaml").write_text(right)
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"nothing": 1}\n')
    jobs = pipeline(cluster, recipes, tmp_path)
    assert cluster.wait(jobs["teacher"], 300) == ["FAILED"]
    for name in list(jobs)[1:]:
        assert set(cluster.wait(jobs[name], 60)) == {"CANCELLED"}, name


@once
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_experiment_is_a_chain_of_jobs(cluster, folder, monkeypatch):
    """Jobs are held; the models are on a hub."""
    heldout = json.dumps([{"path": "pyproject.toml"}])
    text = cluster.run("python", "launch/slurm/pipeline.py", folder, heldout, "--hold")
    names = [line.split()[0] for line in text.splitlines()]
    jobs = re.findall(r"(\d+)$", text, re.MULTILINE)
    cluster.run("scancel", *jobs)
    assert len(jobs) == len(names) >= 3 and names[-1] == "report", text


def test_the_last_array_element_requeues_only_itself(cluster, models, tmp_path):
    """It has the job id of the whole array."""
    lines = [["train/distill.py", *small_flags(models, tmp_path / name)] for name in ("a", "b")]
    lines[1] = [word if word != "4" else "60" for word in lines[1]]
    (tmp_path / "lines").write_text("".join(shlex.join(map(str, line)) + "\n" for line in lines))
    log = "--output=runs/slurm/%x-%A_%a.out"
    words = (BATCH, "NUM_PROCESSES=1", f"@{tmp_path}/lines")
    job = cluster.submit("--job-name=pair", "--array=1-2", log, *words)
    printed = LOGS / f"pair-{job}_2-node0.out"
    begun = lambda: printed.exists() and logged_steps(printed.read_text()) > 3  # noqa: E731
    assert wait_for(begun, 300), cluster.run("scontrol", "show", "job", job)
    assert cluster.field(f"{job}_2", "JobId") == [job]
    with standing_still(ranks := ranks_of(cluster, job)):
        cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
        assert wait_for(lambda: any(map(signalled, ranks)), 120), printed.read_text()
    assert set(cluster.wait(job, 400)) == {"COMPLETED"}
    first, last = (cluster.field(f"{job}_{i}", "Restarts") for i in (1, 2))
    assert (first, last) == (["0"], ["1"]) and "stopped by SIGUSR1" in printed.read_text()
    assert logged_steps(printed.read_text()) == 60


@once
def test_tasks_of_srun_are_the_ranks_of_one_run(cluster, models, tmp_path):
    """The same run as that of a launch file; each task is a rank on a node of its own."""
    srun = ["srun", "--nodes=2", "--ntasks=2", "--cpus-per-task=1"]
    text = cluster.run(*srun, "python", "train/distill.py", *small_flags(models, tmp_path / "srun"))
    assert "2 processes x 4 rows" in text, text
    succeed("launch/cpu.sh", "train/distill.py", *small_flags(models, tmp_path / "launched"))
    check_same_run(tmp_path / "launched", tmp_path / "srun")


@once
def test_lost_node_costs_at_most_one_save_interval(cluster, models, tmp_path):
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
