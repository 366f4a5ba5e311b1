"""A forked worker either starts or is replaced; a hanging one does not block the job."""

import os
import time

import psutil
from torch.utils.data import DataLoader

from kd.data import workers
from kd.data.workers import Worker, Workers


class HangsAtFirst(Worker):
    """The first worker hangs, like a child that never returns from fork()."""

    def run(self) -> None:
        try:
            os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().run()
        time.sleep(600)


class HangingWorkers(Workers):
    Process = HangsAtFirst


def test_a_worker_that_hangs_in_fork_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "START_TIMEOUT", 0.5)
    monkeypatch.setattr(HangsAtFirst, "mark", str(tmp_path / "hung"), raising=False)
    before = set(psutil.Process().children())
    loader = DataLoader(
        range(12), num_workers=2, multiprocessing_context=HangingWorkers(), timeout=60
    )
    batches = iter(loader)
    assert (tmp_path / "hung").exists()
    assert len(set(psutil.Process().children()) - before) == 2  # without the one that hung
    assert [int(batch) for batch in batches] == list(range(12))


def test_a_worker_that_dies_at_once_is_reported_without_a_timeout(monkeypatch):
    monkeypatch.setattr(workers, "START_TIMEOUT", 60.0)
    monkeypatch.setattr(Worker, "run", lambda self: os._exit(7))
    begin = time.monotonic()
    worker = Workers().Process(target=print)
    worker.start()
    worker.join()
    assert worker.exitcode == 7 and time.monotonic() - begin < 30
