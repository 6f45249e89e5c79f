"""The process that runs torchrun for a stage: `python -m ... PROCESSES RUN STAGE SHARD FOLDER`.

torchrun handles signals, which only a process's main thread can do, and a stage may be trained in
any thread. So it has a process of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from secateur.tasks.training.launch import FAILURES


def main(processes: str, *settings: str) -> None:
    """Run the processes to their end, and write down which of them failed."""
    # Errors come through the folder, and torchrun's logs would repeat them.
    logging.disable()
    # A rendezvous on a free port of this machine, at an address that needs no name service.
    launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", processes]
    try:
        run(parse_args([*launcher, "-m", "secateur.tasks.training.rank_process", *settings]))
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        Path(settings[-1], FAILURES).write_text(json.dumps(failures))
        raise SystemExit(1) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
