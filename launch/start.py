"""Start the processes of a run in this process, as accelerate or torchrun would.

python launch/start.py accelerate launch [flags] SCRIPT [flags]
python launch/start.py torchrun [flags] SCRIPT [flags]

Without its first two words the command starts the same run. What this adds: a user's mistake is one
line and exit code 2, without a page about failed children; a signal ends with 128 + its number, and
a second Ctrl-C ends at once; and on one node the ranks find each other on the loopback interface
only, where torch would listen on all interfaces.
"""

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
MISTAKE = 2  # the exit code of kd.run.exit for a user's mistake
LOOPBACK = "loopback"
# Torch passes these on to the ranks, and this file SIGINT. SIGUSR1 is a warning to the run.
SIGNALS = "SIGTERM,SIGHUP,SIGQUIT,SIGUSR1"
# Torch logs these of every end by a signal or a mistake; the ranks have said why they ended.
ROUTINE = ("Sending process", "failed (exitcode", "Received %s death signal")


def start(command: list[str]) -> int:
    """Run `accelerate launch` or `torchrun` with its flags; return the exit code."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # while torch is imported
    os.environ["PET_SIGNALS_TO_HANDLE"] = SIGNALS
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for module in ("multiprocessing.api", "agent.server.api"):
        logger = logging.getLogger(f"torch.distributed.elastic.{module}")
        logger.addFilter(lambda record: not str(record.msg).startswith(ROUTINE))
    accelerated = command[0] == "accelerate"
    if accelerated:
        from accelerate.commands.launch import launch_command, launch_command_parser

        arguments = launch_command_parser().parse_args(command[2:])
    else:
        arguments = run.parse_args(command[1:])
    if os.environ.get("NNODES", "1") == "1":
        stay_on_loopback(arguments)
    handle_interrupts()
    try:
        launch_command(arguments) if accelerated else run.run(arguments)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        return report(error)
    return 0


def stay_on_loopback(arguments: argparse.Namespace) -> None:
    """Set a rendezvous on the loopback interface in `arguments`, and the one of gloo and NCCL."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        """The rendezvous of one node, whose store listens on a socket that is bound here."""

        def get_backend(self) -> str:
            return LOOPBACK

        def next_rendezvous(self):
            if not self._store:
                listener = socket.create_server((self.master_addr, 0))
                self.master_port = listener.getsockname()[1]
                self._store = TCPStore(
                    self.master_addr,
                    self.master_port,
                    world_size=1,
                    is_master=True,
                    timeout=self.timeout,
                    master_listen_fd=listener.detach(),
                )
            return super().next_rendezvous()

    rendezvous_handler_registry.register(
        LOOPBACK, lambda given: Loopback("127.0.0.1", 0, 0, 1, given.run_id, timeout=900)
    )
    for library in ("GLOO", "NCCL"):
        interface = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    arguments.rdzv_backend, arguments.rdzv_endpoint = LOOPBACK, "127.0.0.1:0"
    arguments.standalone = False


def handle_interrupts() -> None:
    """Pass the first Ctrl-C to the ranks and wait until they have saved; the second ends them."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, kill)
        told = "SIGINT: a training saves after this step; Ctrl-C again ends at once\n"
        os.write(2, told.encode())  # print is not allowed in a handler
        raise SignalException("interrupted", signal.Signals(number))

    def kill(number: int, frame: FrameType | None) -> None:
        import psutil

        os.write(2, b"SIGINT again: ended at once\n")
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupt)


def report(error: Exception) -> int:
    """Print what the ranks have not told yet and return the exit code of the first that failed."""
    number, first = error.get_first_failure()
    if first.exitcode == MISTAKE:
        pass  # the ranks have told it
    elif isinstance(first.message, dict):  # it has printed its traceback
        told = f"rank {number} failed first, with exit code {first.exitcode}: see its traceback"
        print(told, file=sys.stderr, flush=True)
    elif not first.exitcode > 128:  # Ctrl-C, or a signal after which the state was saved
        print(error, file=sys.stderr, flush=True)
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
