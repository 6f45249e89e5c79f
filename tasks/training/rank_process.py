"""One of the processes that train a stage together: `python -m ... RUN STAGE SHARD FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from secateur.errors import PlanError, SecateurError
from secateur.influence.process_group import current_ranks
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.run import Run
from secateur.tasks.training.launch import ALIVE, STEPS
from secateur.tasks.training.train import train_segments

FAILED, REFUSED = 1, 2  # exit codes


def main(url: str, stage: str, shard: str, name: str) -> None:
    """Train a stage to its end. What goes wrong is left in the folder for the starting process."""
    folder = Path(name)
    threading.Thread(target=_end_with_starter, args=(folder / ALIVE,), daemon=True).start()
    signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        _train(Run.open(url), int(stage), shard, folder)
    except SystemExit as end:
        code = int(str(end.code))
    except SecateurError as error:
        code = REFUSED
        _write_error(folder, type(error).__name__, str(error))
    except Exception as error:
        code = FAILED
        _write_error(folder, type(error).__name__, str(error))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`, because torch's threads may wait for a process that is gone.
    os._exit(code)


def _train(run: Run, stage: int, shard: str, folder: Path) -> None:
    backend = "gloo"
    if torch.device(run.plan.device).type == "cuda":
        _choose_gpu()
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    ranks = current_ranks()
    with open(folder / STEPS, "ab", buffering=0) as steps:

        def report(_: int) -> None:
            if ranks.is_first:
                steps.write(b".")

        train_segments(run, stage, read_stage_samples(run, stage), ranks, shard, report)
    dist.destroy_process_group()


def _choose_gpu() -> None:
    """Take the GPU of this process's number.

    Raises:
        PlanError: there are fewer GPUs than processes.
    """
    number = int(os.environ["LOCAL_RANK"])
    count = torch.cuda.device_count()
    if number >= count:
        raise PlanError(
            f"`launch` has {os.environ['WORLD_SIZE']} processes and there are {count} GPUs, and "
            f"each process needs its own; lower `launch.processes`"
        )
    torch.cuda.set_device(number)


def _end_with_starter(pipe: Path) -> None:
    """End this process when the starting one has ended, even if it was killed."""
    with open(pipe, "rb") as alive:
        alive.read()
    os._exit(FAILED)


def _write_error(folder: Path, kind: str, message: str) -> None:
    error = {"kind": kind, "message": message, "traceback": traceback.format_exc()}
    (folder / f"error-{os.environ['RANK']}.json").write_text(json.dumps(error))


def _terminate(*_: object) -> None:
    """Let what is being written be removed. Python's default would end at once."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
