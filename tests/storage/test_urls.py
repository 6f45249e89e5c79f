"""Tests of credentials in URLs: refused if they would be stored, hidden if they would be shown."""

from __future__ import annotations

import pytest

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.io_errors import wrap_io_errors
from secateur.storage.shards import expand_shard_urls
from secateur.storage.urls import redact_credentials

SECRET = "s3cr3t-of-the-tests"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{SECRET}@bucket/runs",
        f"https://host/a.tar?X-Amz-Signature={SECRET}&x=1",
        f"s3://b/a?sig={SECRET}",
    ],
)
def test_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    for use in (Folder, expand_shard_urls):
        with pytest.raises(
            StorageError, match="holds credentials, which would be written into the run"
        ) as raised:
            use(url)
        assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/runs", "/home/me@work/runs", "runs/a@b", "https://host/a@b/c.tar", "a?b.tar"],
)
def test_other_urls_do_not_change(url: str) -> None:
    assert redact_credentials(url) == url


def test_store_errors_show_no_credentials() -> None:
    with pytest.raises(StorageError) as raised, wrap_io_errors("s3://bucket/a", "read"):
        raise OSError(
            f'Could not connect to the endpoint URL: "http://key:{SECRET}@localhost:1/bucket/a"'
        )
    assert str(raised.value) == (
        "s3://bucket/a cannot be read: Could not connect to the endpoint URL: "
        '"http://***@localhost:1/bucket/a"; check the disk or the connection and run the same '
        "command again"
    )
    assert raised.value.__cause__ is None
