"""What a rank knows about its launcher: whether it exists, and whether it prints mistakes."""

import os
import socket

from kd.distributed import is_initialized, rank, world_size


def prints_mistakes() -> bool:
    """Whether the launcher prints a user's mistake: launch/start.py does, once for all ranks."""
    return "KD_LAUNCHER" in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ


def check_launcher() -> None:
    """Check that the other processes that WORLD_SIZE announces can exist.

    A variable left over in a shell would let this process wait for them forever. Raises ValueError
    if the variables of a rendezvous are missing, or if nobody listens where a launcher must.
    """
    if world_size() == 1 or is_initialized():
        return
    found = f"WORLD_SIZE={world_size()} in the environment"
    advice = "unset WORLD_SIZE, or start the processes with launch/, accelerate launch or torchrun"
    names = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if names:
        raise ValueError(f"{found} without {', '.join(names)}: no launcher set it; {advice}")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # another launcher, or by hand
        if rank() == 0:
            print(f"{found}: waiting for the others at {host}:{port}; if none come, {advice}")
        return
    try:
        socket.create_connection((host, int(port)), timeout=60).close()
    except OSError as error:
        raise ValueError(f"{found}, but nobody listens at {host}:{port}; {advice}") from error
