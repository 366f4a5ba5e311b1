"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd in one folder.

Both nodes share the host and its network. They are called 127.0.0.1 and 127.0.0.2, so that the
names printed by `scontrol show hostnames` can be reached. Each node has eight simulated GPUs.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from processes import ROOT, succeed

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again
AuthInfo=socket={base}/munge.sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/{tracker}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
InactiveLimit=0
ReturnToService=2
MinJobAge=86400
SlurmctldTimeout=15
SlurmdTimeout=30
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=100
NodeName=127.0.0.[1-2] NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]},{ports[2]} CPUs=128 RealMemory=2000000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=spot Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""  # noqa: E501
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


def compile_operator() -> None:
    """Compile what DeepSpeed needs on a CPU, before a job with a short time limit waits for it."""
    build = "from kd.run.build_lock import use_build_locks; use_build_locks(); "
    build += "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    succeed(sys.executable, "-c", build, DS_ACCELERATOR="cpu")


def install() -> str | None:
    """Install what SLURM lacks; return the reason if that is impossible."""
    wanted = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
    missing = [name for name in wanted if not shutil.which(name, path=search_path())]
    if not missing:
        return None
    if os.geteuid() or not shutil.which("apt-get"):
        return f"no {', '.join(missing)}; wanted apt-get install {' '.join(PACKAGES)}"
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True}
    subprocess.run(["apt-get", "update"], **quiet)
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    done = subprocess.run(command, **quiet, text=True)
    return done.stderr[-500:] if done.returncode else None


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


FREEZER = Path("/sys/fs/cgroup/freezer")


def can_track(tracker: str) -> bool:
    """Whether SLURM can track processes this way here; by cgroup it takes root and a freezer."""
    return tracker != "cgroup" or (os.geteuid() == 0 and os.access(FREEZER / "tasks", os.W_OK))


class Cluster:
    """The daemons of a cluster, and commands to it.

    `tracker`: cgroup, as on most clusters, where a signal reaches only the first process of a task,
    or linuxproc, where it reaches all of them.
    """

    def __init__(self, tracker: str) -> None:
        self.tracker = tracker
        # Short, because it holds UNIX sockets; world-readable, as munged requires.
        self.base = Path(tempfile.mkdtemp(prefix="kdslurm", dir="/tmp"))
        self.base.chmod(0o755)
        for name in ("munge", "state", "dev"):
            (self.base / name).mkdir(mode=0o700 if name == "munge" else 0o755)
        self.conf = self.base / "slurm.conf"
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{search_path()}",
            "SLURM_CONF": str(self.conf),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        host = socket.gethostname().split(".")[0]
        values = {"host": host, "user": user, "base": self.base, "ports": free_ports(3)}
        values["tracker"] = self.tracker
        values["first_job"] = random.randint(1000, 10**6)  # logs and ports contain the job's number
        self.conf.write_text(CONF.format(**values))
        for i in range(8):  # a GPU's file must be a character device; any user may link to one
            (self.base / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        gpus = f"AutoDetect=off\nName=gpu File={self.base}/dev/nvidia[0-7]\n"
        (self.base / "gres.conf").write_text(gpus)
        cgroup = "CgroupPlugin=autodetect\n"
        if self.tracker == "cgroup":
            cgroup = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={FREEZER.parent}\n"
        (self.base / "cgroup.conf").write_text(cgroup)
        (self.base / "plugstack.conf").write_text("")
        key = self.base / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key": "key", "pid": "pid", "log": "log", "seed": "seed"}
        flags = [f"--{k}-file={self.base}/munge/{v}" for k, v in files.items()]
        self.daemon("munged", "-F", f"--socket={self.base}/munge.sock", *flags)
        assert wait_for(lambda: (self.base / "munge.sock").exists(), 60), self.told("munged")
        self.daemon("slurmctld", "-D")
        for node in ("127.0.0.1", "127.0.0.2"):
            self.start_node(node)
        nodes = ["sinfo", "-h", "-p", "main", "-N", "-o", "%T"]
        idle = wait_for(lambda: self.run(*nodes).split() == ["idle", "idle"], 120)
        assert idle, self.run(*nodes) + self.told("slurmctld")

    def told(self, daemon: str) -> str:
        return (self.base / f"{daemon}.out").read_text()[-3000:]

    def start_node(self, node: str) -> None:
        self.daemon("slurmd", "-D", "-N", node, name=node)

    def daemon(self, *command: str, name: str = "") -> None:
        out = open(self.base / f"{name or command[0]}.out", "a")  # noqa: SIM115
        self.daemons[name or command[0]] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],  # no daemon outlives a killed test run
            env=self.environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    def submit(self, *arguments, **environment: str) -> str:
        """Submit launch/slurm/train.sbatch and return the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *(str(part) for part in arguments)],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> list[str]:
        """A field of scontrol's record, for each element of an array."""
        for _ in range(5):  # on a busy machine the controller may be slow, and scontrol gives up
            text = self.run("scontrol", "-o", "show", "job", job)
            found = re.findall(rf"(?:^| ){name}=(\S+)", text, re.MULTILINE)
            if found:
                return found
        raise AssertionError(text)

    def wait(self, job: str, seconds: float) -> list[str]:
        """Wait for the final states of all elements of a job."""
        ended = wait_for(lambda: set(self.field(job, "JobState")) <= ENDED, seconds)
        assert ended, self.run("scontrol", "show", "job", job)
        return self.field(job, "JobState")

    def processes(self) -> list[psutil.Process]:
        """All living processes of the jobs of this cluster."""
        found = []
        for process in psutil.process_iter():
            own = environment(process)
            if own.get("SLURM_CONF") == str(self.conf) and "SLURM_JOB_ID" in own:
                found.append(process)
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def crash(self, node: str) -> None:
        """Simulate a power loss: kill everything on a node at once; start_node brings it back."""
        own = [p for p in self.processes() if environment(p).get("SLURMD_NODENAME") == node]
        parents = [parent for p in own if (parent := parent_of(p))]
        steps = {p for p in parents if p.name() == "slurmstepd"}
        for process in [psutil.Process(self.daemons[node].pid), *steps, *own]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.daemons[node].wait()

    def stop(self) -> None:
        self.run("scancel", "--user", str(os.geteuid()))
        wait_for(lambda: not self.run("squeue", "-h").strip() and not self.processes(), 30)
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.base, ignore_errors=True)
        if self.tracker == "cgroup":
            for folder in sorted(FREEZER.glob("slurm_*/**/"), reverse=True):  # the innermost first
                with contextlib.suppress(OSError):
                    folder.rmdir()


def environment(process: psutil.Process) -> dict[str, str]:
    """The environment of a process that may have ended already."""
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def parent_of(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.NoSuchProcess:
        return None


def free_ports(count: int) -> list[int]:
    """Free ports below the kernel's ephemeral range and above those of the ranks' rendezvous."""
    found: list[socket.socket] = []
    while len(found) < count:
        trial = socket.socket()
        try:
            trial.bind(("0.0.0.0", random.randint(30000, 32000)))
            found.append(trial)
        except OSError:
            trial.close()
    ports = [trial.getsockname()[1] for trial in found]
    for trial in found:
        trial.close()
    return ports


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False
