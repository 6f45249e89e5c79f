"""Room `storage`: URLs, and the credentials that must not be in them: what a plan names is written into manifests and reports."""

from __future__ import annotations

import re

from secateur.errors import StorageError

USER = re.compile(r"(?<=://)[^/?#\s]*@")  # `key:secret@` before the host
SIGNED = re.compile(
    r"[?&](X-Amz-\w+|AWSAccessKeyId|Signature|sig|se|token)=[^&\s\"']*", re.IGNORECASE
)


def redact_credentials(text: str) -> str:
    """A text in which the credentials of URLs are `***`."""
    return SIGNED.sub(r"?\1=***", USER.sub("***@", text))


def check_url(url: str) -> None:
    """Refuses a path or URL that holds credentials.

    Raises:
        StorageError: it does; the sentence does not repeat them.
    """
    if redact_credentials(url) != url:
        raise StorageError(
            f"{redact_credentials(url)} holds credentials, which would be written into the run; give them in the environment "
            f"(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE) and leave them out of the URL"
        )
