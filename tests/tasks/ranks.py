"""What the tests of several processes share: starting and killing them, and comparing ledgers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from threading import Thread

import psutil
import torch
from torch import Tensor, nn

from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.tasks.run import Run
from tests.tasks.digits import Digits


def torchrun(processes: int, module: str, *arguments: str) -> None:
    """Run a module in several processes, or in one without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


RECORD_COLUMNS = ("contributions", "samples", "weights", "losses", "errors", "windows")


def ledger_distance(
    one: Run, other: Run, stage: int = 0, first: int | None = None, in_order: bool = True
) -> float:
    """Return the largest relative distance between tensors of two runs' ledgers and checkpoints.

    Integers, such as the samples, must be the same.

    Args:
        first: how many segments are compared; all if None.
        in_order: whether the records of a step must be in the same order.
    """
    segments = one.folder.stage(stage).segments()
    other_segments = other.folder.stage(stage).segments()
    assert len(segments) == len(other_segments) > 1
    distances = [0.0]
    for a, b in list(zip(segments, other_segments, strict=True))[:first]:
        ledger, first_step = read_ledger(a)
        other_ledger, other_first_step = read_ledger(b)
        assert first_step == other_first_step
        if not in_order:
            ledger, other_ledger = _sorted(ledger), _sorted(other_ledger)
        state = {n: t for n, t in read_checkpoint(a).items() if not n.startswith("random")}
        other_state = {n: t for n, t in read_checkpoint(b).items() if not n.startswith("random")}
        for mine, theirs in ((ledger, other_ledger), (state, other_state)):
            assert mine.keys() == theirs.keys()
            for name, tensor in mine.items():
                assert tensor.shape == theirs[name].shape, name
                if not tensor.is_floating_point():
                    assert torch.equal(tensor, theirs[name]), name
                elif tensor.numel():
                    distance = (tensor - theirs[name]).norm() / tensor.norm().clamp(min=1e-30)
                    distances.append(float(distance))
    return max(distances)


def _sorted(ledger: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ledger with the records of each step in the order of their samples."""
    samples = ledger["samples"]
    order = (ledger["steps"] * (samples.max() + 1) + samples).argsort(stable=True)
    return ledger | {name: ledger[name][order] for name in RECORD_COLUMNS}


class NegatedDigits(Digits):
    """Its sign of every output is negative, so that any number of processes draw the same."""

    def signed_losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return -self.losses(model, batch)


class SlowDigits(Digits):
    """The digits with a pause in every step, so that a process can be killed during one."""

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        time.sleep(0.1)
        return super().losses(model, batch)


def kill_a_process(run: Run, segments: int, seconds: float, rank: int) -> Thread:
    """Kill one of the processes that train a run's first stage, with -9.

    Args:
        segments: how many segments are committed before.
        seconds: how long to wait after that.
    """

    def kill() -> None:
        found: list[psutil.Process] = []
        while len(run.folder.stage(0).segments()) < segments or not found:
            time.sleep(0.02)
            found = [one for one in find_processes(run) if _rank(one) == str(rank)]
        time.sleep(seconds)
        with suppress(psutil.Error):
            found[0].kill()

    thread = Thread(target=kill, daemon=True)
    thread.start()
    return thread


def find_processes(run: Run) -> list[psutil.Process]:
    """Return the processes that train a run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if run.url in command and any("secateur.tasks.training" in word for word in command):
                found.append(process)
    return found


def _rank(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        return process.environ().get("RANK")
    return None
