"""Protection of credentials in URLs: the URLs of a plan are written to manifests and reports."""

from __future__ import annotations

import re

from secateur.errors import StorageError

USER = re.compile(r"(?<=://)[^/?#\s]*@")  # `key:secret@` before the host
SIGNED = re.compile(
    r"[?&](X-Amz-\w+|AWSAccessKeyId|Signature|sig|se|token)=[^&\s\"']*", re.IGNORECASE
)


def redact_credentials(text: str) -> str:
    """Return a text with the credentials of its URLs replaced by `***`."""
    return SIGNED.sub(r"?\1=***", USER.sub("***@", text))


def check_url(url: str) -> None:
    """Check that a path or URL contains no credentials.

    Raises:
        StorageError: it does. The message does not repeat them.
    """
    redacted = redact_credentials(url)
    if redacted != url:
        raise StorageError(
            f"{redacted} holds credentials, which would be written into the run; give them in the "
            f"environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE) and leave them "
            f"out of the URL"
        )
