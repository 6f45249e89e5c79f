"""Room `storage`: making the S3 client's retries visible, which it announces in debug messages only.

It tries a request 5 times, and after errors of the connection 5 rounds of that, waiting longer each time. Below that, aiohttp
sends a request a second time at once, and says nothing, where the server had closed a connection that was kept open.
"""

from __future__ import annotations

import logging
import sys

from secateur.storage.urls import redact_credentials

# The messages with which the libraries announce that a request will be sent again.
RETRIES = {"botocore.retryhandler": "Retry needed, action of", "s3fs": "Retryable error"}


class _Visible(logging.Handler):
    """Prints announcements of retries on stderr, and counts them; no other debug message is formatted or passed on, for
    they may hold what is sent."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith(RETRIES[record.name]):
            self.count += 1
            why = (
                f" ({redact_credentials(str(record.args[0]))})"
                if record.name == "s3fs" and isinstance(record.args, tuple)
                else ""
            )
            print(
                f"the store failed to answer a request{why}; trying again ({self.count} so far)",
                file=sys.stderr,
                flush=True,
            )
        elif record.levelno >= logging.WARNING:
            logging.getLogger().handle(record)


def show_retries() -> None:
    """Prints every retry of this process from now on; showing them twice is showing them once."""
    for name in RETRIES:
        logger = logging.getLogger(name)
        if _handler not in logger.handlers:
            logger.addHandler(_handler)
            logger.setLevel(logging.DEBUG)
            logger.propagate = False


_handler = _Visible()
