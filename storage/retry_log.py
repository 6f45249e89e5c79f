"""Visible retries: prints the retries of the S3 client, which it logs as debug messages only.

The client tries a request 5 times. After connection errors it repeats this for up to 5 rounds, and
waits longer each time. Below it, aiohttp immediately sends a request a second time if the server
had closed a connection that was kept open. aiohttp logs nothing about this.
"""

from __future__ import annotations

import logging
import sys

from secateur.storage.urls import redact_credentials

# The start of the messages by which the libraries announce that they will send a request again.
RETRIES = {"botocore.retryhandler": "Retry needed, action of", "s3fs": "Retryable error"}


class _RetryPrinter(logging.Handler):
    """Prints announced retries on stderr, and counts them."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        # Other debug messages are neither formatted nor passed on: they may contain what is sent.
        if str(record.msg).startswith(RETRIES[record.name]):
            self.count += 1
            reason = _retry_reason(record)
            print(
                f"the store failed to answer a request{reason}; trying again ({self.count} so far)",
                file=sys.stderr,
                flush=True,
            )
        elif record.levelno >= logging.WARNING:
            logging.getLogger().handle(record)


def _retry_reason(record: logging.LogRecord) -> str:
    """Return the reason of a retry in parentheses, if the message contains it."""
    if record.name == "s3fs" and isinstance(record.args, tuple):
        return f" ({redact_credentials(str(record.args[0]))})"
    return ""


def show_retries() -> None:
    """Print every retry of this process from now on. Further calls change nothing."""
    for name in RETRIES:
        logger = logging.getLogger(name)
        if _printer not in logger.handlers:
            logger.addHandler(_printer)
            # The announcements are debug messages, which must not reach the root logger.
            logger.setLevel(logging.DEBUG)
            logger.propagate = False


_printer = _RetryPrinter()
