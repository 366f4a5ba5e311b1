"""Cut off a chat template that loops forever or that writes more and more.

Templates come with models of others, and Jinja's sandbox limits a single range but no nested loops.
"""

import contextlib
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

CPU_SECONDS = 10.0  # a conversation of a million tokens takes less than one
MEMORY = 2 * 2**30  # bytes; the same conversation needs a few MiB


@contextlib.contextmanager
def limit_rendering(name: str) -> Iterator[None]:
    """Limit processor time and memory while a chat template renders one conversation.

    Conversations are rendered in the main thread of a process, of this one or of a worker; only
    there can a timer interrupt. `name` is the tokenizer's. Raises ValueError beyond a limit.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise too_much(name, f"for {CPU_SECONDS:.0f} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    soft, hard = limit_memory()
    try:
        yield
    except (MemoryError, RecursionError) as error:
        what = "without end"
        if isinstance(error, MemoryError):
            what = f"beyond {MEMORY / 2**30:g} GiB of memory"
        raise too_much(name, what) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


def limit_memory() -> tuple[int, int]:
    """Allow this process MEMORY more address space; return the (soft, hard) limits from before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and before[0] == resource.RLIM_INFINITY:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    return before


def too_much(name: str, how: str) -> ValueError:
    """The error for a template that does not come to an end."""
    return ValueError(
        f"{name}: the chat template runs {how} on one conversation; set chat_template to a file "
        "with one that ends"
    )
