"""Runs on a store of which one request in twenty fails, or every request."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import s3fs

from secateur.errors import StorageError
from secateur.storage.folder import Folder
from secateur.storage.integrity import verify_folder
from secateur.tasks.results.pruning_results import read_decisions
from tests.proxy import KINDS, FaultyProxy
from tests.servers import Server
from tests.tasks.small import curate_small, make_data, small_plan


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits 1 second for an answer instead of 15, so stalls of 2 are too long."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})


@pytest.mark.slow
def test_a_run_is_correct_if_one_request_in_twenty_fails(
    seaweedfs: str,
    seaweed_server: Server,
    impatient: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Errors, resets, stalls, and answers that are lost after the request was performed.

    `benchmarks.faults` stalls for 30 seconds.
    """
    make_data(tmp_path)
    expected = read_decisions(curate_small(small_plan(tmp_path)), 0)
    proxy = FaultyProxy(seaweed_server.port, 0.05, 2.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    run = curate_small(small_plan(tmp_path, root=f"{seaweedfs}/{tmp_path.name}"))
    assert read_decisions(run, 0).equals(expected)
    assert min(proxy.faults[kind] for kind in KINDS) > 0
    assert capsys.readouterr().err.count("trying again") >= proxy.faults["error"]
    proxy.share = 0.0
    assert [f for f in verify_folder(Folder(run.url)) if f.what != "extra"] == []
    proxy.shutdown()


def test_a_store_that_never_answers_is_one_sentence(
    seaweedfs: str, seaweed_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(seaweed_server.port, 1.0, 0.0)
    monkeypatch.setattr("tests.proxy.KINDS", ("error",))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(
        StorageError, match=r"cannot be written: .*run the same command again"
    ) as raised:
        Folder(f"{seaweedfs}/never").create("a", b"x")
    assert "\n" not in str(raised.value)
    assert proxy.requests <= 25
    proxy.shutdown()
