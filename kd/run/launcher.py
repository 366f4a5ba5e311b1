"""What a rank knows about its launcher: its place among the others, and whether they can exist."""

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from kd.distributed import is_initialized, rank, rank_prefix, world_size

LOOPBACK = "127."


def print_mistake(text: str) -> None:
    """Print a user's mistake, unless another rank of this node has printed the same one.

    The first rank that finds a mistake prints it: it may not be rank 0, which the launcher may then
    end before it comes as far. Only another mistake than the first names its rank.
    """
    marks = marks_of_launch()
    prefix = rank_prefix()
    if marks:
        if not any(marks.parent.glob(f"{marks.name}*")):
            prefix = ""
        try:
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            marks.with_name(marks.name + digest).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            prefix = rank_prefix()  # better printed by every rank than by none
    print(f"{prefix}error: {text}", file=sys.stderr, flush=True)


def marks_of_launch() -> Path | None:
    """The common beginning of files that the ranks of one launch on this node share.

    None if no launcher is known that starts ranks: an earlier run in the same shell must not count.
    """
    own = os.environ
    if world_size() > 1 and own.get("TORCHELASTIC_ERROR_FILE"):  # LAUNCH/attempt_0/RANK/error.json
        return Path(own["TORCHELASTIC_ERROR_FILE"]).parents[1] / "mistake-"
    if world_size() > 1 and "SLURM_STEP_ID" in own:  # all tasks of a node have one parent
        step = f"{own['SLURM_JOB_ID']}.{own['SLURM_STEP_ID']}-{os.getppid()}"
        return Path(tempfile.gettempdir()) / f"kd-{step}-"
    return None


def join_step() -> None:
    """Take this process for a rank if srun started it as one of several tasks.

    Raises ValueError if SLURM does not say where the first task runs.
    """
    own = os.environ
    if "RANK" in own or int(own.get("SLURM_STEP_NUM_TASKS", 1)) == 1 or "SLURM_PROCID" not in own:
        return
    show = ["scontrol", "show", "hostnames", own["SLURM_STEP_NODELIST"]]
    done = subprocess.run(show, capture_output=True, text=True)
    if done.returncode or not done.stdout.split():
        raise ValueError(f"scontrol names no host of {own['SLURM_STEP_NODELIST']}: {done.stderr}")
    tasks = tasks_per_node(own["SLURM_STEP_TASKS_PER_NODE"])[int(own["SLURM_NODEID"])]
    one_gpu = own.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # of its own
    own |= {
        "RANK": own["SLURM_PROCID"],
        "WORLD_SIZE": own["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if one_gpu else own["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks),
        "MASTER_ADDR": done.stdout.split()[0],
        "MASTER_PORT": str(10000 + int(own["SLURM_JOB_ID"]) % 20000),
    }


def tasks_per_node(text: str) -> list[int]:
    """The number of tasks on each node, from SLURM's short form: 2(x3),1 is [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def check_launcher() -> None:
    """Check that the other processes that the environment announces can exist.

    A variable left over in a shell would let this process wait for them forever, and a step on
    several nodes without a launcher would be as many separate runs. Raises ValueError if the
    variables of a rendezvous are missing, if nobody listens where a launcher must, and if the ranks
    are on fewer nodes than SLURM has started.
    """
    check_nodes()
    if world_size() == 1 or is_initialized():
        return
    found = f"WORLD_SIZE={world_size()} in the environment"
    advice = "unset WORLD_SIZE, or start the processes with launch/, accelerate launch or torchrun"
    names = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if names:
        raise ValueError(f"{found} without {', '.join(names)}: no launcher set it; {advice}")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # another launcher, or by hand
        if rank() == 0 and "SLURM_PROCID" not in os.environ:
            print(f"{found}: waiting for the others at {host}:{port}; if none come, {advice}")
    else:
        try:
            socket.create_connection((host, int(port)), timeout=60).close()
        except OSError as error:
            raise ValueError(f"{found}, but nobody listens at {host}:{port}; {advice}") from error
    choose_interface(host)


def check_nodes() -> None:
    """Raise ValueError if SLURM or accelerate was told of more nodes than the ranks are on."""
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if nodes > 1 and world_size() < nodes * local:
        raise ValueError(
            f"found {world_size()} process{'es' if world_size() > 1 else ''} in this run, but the "
            f"SLURM step is on {nodes} nodes: each would train a run of its own. Tell torchrun or "
            "accelerate of all nodes (docs/cluster.md), or submit launch/slurm/train.sbatch"
        )
    promised = machines_of_accelerate()
    if world_size() < promised:
        raise ValueError(
            f"found {world_size()} process in this run, but accelerate was told of {promised} "
            "machines: each would train a run of its own. Set deepspeed_multinode_launcher: "
            "standard in the accelerate configuration, or use one of accelerate_configs/"
        )


def machines_of_accelerate() -> int:
    """The number of machines of the `accelerate launch` that started this process, else 1.

    Its DeepSpeed launcher goes on with one machine if it finds no hostfile, and tells nobody.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # accelerate sets it for every launch
        return 1
    import psutil

    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
            if any(Path(word).name == "accelerate" for word in words[:2]) and "launch" in words:
                script = [i for i, word in enumerate(words) if word.endswith(".py")]
                flags = " ".join(words[: script[0] if script else None])
                given = re.search(r"--num[_-]machines[ =](\d+)", flags)
                file = re.search(r"--config[_-]file[ =](\S+)", flags)
                text = Path(file[1]).read_text() if file and not given else ""
                given = given or re.search(r"^num_machines: *(\d+)", text, re.MULTILINE)
                return int(given[1]) if given else 1
    return 1


def choose_interface(master: str) -> None:
    """Let gloo use the interface that reaches the other nodes, where it would choose loopback.

    gloo takes the address of the host's own name, which Debian sets to 127.0.1.1. Has no effect if
    GLOO_SOCKET_IFNAME is set, or if all ranks are on one node.
    """
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) == world_size()
    if (
        alone
        or "GLOO_SOCKET_IFNAME" in os.environ
        or not resolves_to_loopback(socket.gethostname())
    ):
        return
    import psutil

    own = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith(LOOPBACK)
    }
    # The second address is nobody's: it leads to the interface of the default route.
    for target in (master, "192.0.2.1"):
        name = own.get(source_address(target))
        if name:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def resolves_to_loopback(host: str) -> bool:
    """Whether a host name leads to this machine's loopback interface."""
    try:
        return socket.gethostbyname(host).startswith(LOOPBACK)
    except OSError:
        return False


def source_address(target: str) -> str | None:
    """The address from which this machine would send to `target`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return None
        return probe.getsockname()[0]
