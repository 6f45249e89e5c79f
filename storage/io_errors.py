"""Errors of the operating system and of stores, as errors of one sentence with a remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import BotoCoreError, ConnectionError, HTTPClientError

from secateur.errors import StorageError, UnavailableError
from secateur.storage.urls import redact_credentials

REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "check its permissions, or the credentials of the store",
    errno.EPERM: "check its permissions, or the credentials of the store",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOTDIR: "a part of its path is a file; choose another path",
}
OTHER_REMEDY = "check the disk or the connection and run the same command again"
# Errors that may pass. s3fs reports a store's own failures as EREMOTEIO, EBUSY or EIO, or without
# a number.
TRANSIENT = {
    None,
    errno.EIO,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
}


@contextmanager
def wrap_io_errors(subject: str, verb: str) -> Iterator[None]:
    """Turn an error of the operating system or store into a StorageError of one sentence.

    Args:
        subject: the file or folder, as the sentence names it.
        verb: the failed action as a participle, such as `read`.
    """
    try:
        yield
    except (FileExistsError, StorageError):
        raise
    except FileNotFoundError as error:
        raise StorageError(
            f"{subject} does not exist; check the path, and that the run has reached this step"
        ) from error
    except (OSError, BotoCoreError) as error:
        number = getattr(error, "errno", None)
        reason = str(getattr(error, "strerror", None) or error)
        reason = " ".join(redact_credentials(reason).split())
        remedy = REMEDIES.get(number or 0, OTHER_REMEDY)
        message = f"{subject} cannot be {verb}: {reason}; {remedy}"
        # A traceback would print the cause, with its credentials.
        cause = error if redact_credentials(str(error)) == str(error) else None
        raise _error_class(error, number)(message) from cause


def _error_class(error: BaseException, number: int | None) -> type[StorageError]:
    """Return UnavailableError if the cause may pass, because it is not in the request itself."""
    if isinstance(error, BotoCoreError):
        transient = isinstance(error, (ConnectionError, HTTPClientError))
    else:
        # s3fs reports a refused key as a PermissionError without a number.
        transient = number in TRANSIENT and not isinstance(error, PermissionError)
    return UnavailableError if transient else StorageError


def is_refused_put(error: BaseException) -> bool:
    """Check whether a store refused a conditional put because the object exists."""
    # Stores report this in different ways.
    cause: Any = error.__cause__
    code = getattr(cause, "response", {}).get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code == "PreconditionFailed"
