"""Credentials stay in the environment.

They are not in the run, the cache, Prefect's database and logs, or the output.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs

from secateur.errors import PlanError, StorageError
from secateur.storage.folder import Folder
from secateur.tasks.plan.plan_file import parse_plan
from tests.flows.test_cli import secateur, sentence, write_plan
from tests.servers import SECRET
from tests.tasks.small import make_data

WRONG = "wrong-secret-of-secateur-tests"
USER = "pass-of-secateur-tests"


def files_with(folder: Path, *secrets: str) -> list[str]:
    """Return the files below a folder that contain one of the secrets."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path)
        for path in paths
        if any(secret.encode() in path.read_bytes() for secret in secrets)
    ]


@pytest.mark.slow
def test_a_run_on_s3_neither_stores_nor_prints_credentials(seaweedfs: str, tmp_path: Path) -> None:
    """Run with all that Prefect can log, which its server stores, and again with a wrong secret."""
    make_data(tmp_path)
    root = f"{seaweedfs}/{tmp_path.name}"
    folders = {"PREFECT_HOME": str(tmp_path / "prefect"), "SECATEUR_CACHE": str(tmp_path / "cache")}
    loud = {"PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_SERVER_LOGGING_LEVEL": "DEBUG"}
    stages = [{"steps": 6, "batch_size": 20, "prune": {"policy": "top", "keep": 0.5}}]
    plan = write_plan(tmp_path, root=root, stages=stages)
    done = secateur("run", plan, **folders, **loud)
    assert done.returncode == 0, done.stderr
    refused = secateur("run", plan, **folders, AWS_SECRET_ACCESS_KEY=WRONG)
    assert "cannot be" in sentence(refused)
    (tmp_path / "printed").write_text(done.stdout + done.stderr + refused.stdout + refused.stderr)
    s3fs.S3FileSystem().get(root, str(tmp_path / "run"), recursive=True)
    assert len(list((tmp_path / "run").rglob("manifest.json"))) >= 8
    assert any((tmp_path / "prefect").rglob("*.db"))
    assert any((tmp_path / "cache").iterdir())
    assert files_with(tmp_path, SECRET, WRONG) == []


def test_errors_of_the_store_show_no_credentials(
    seaweedfs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use a wrong secret, and an endpoint that does not answer and whose URL holds credentials.

    The sentence, the traceback and the lines about retries hold none of them.
    """
    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"max_attempts": 0}}}
    )
    output = ""
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", WRONG),
        ("AWS_ENDPOINT_URL", f"http://user:{USER}@127.0.0.1:9"),
    ):
        monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StorageError, match="cannot be") as raised:
            Folder(f"{seaweedfs}/secrets").create("a", b"x")
        output += "".join(traceback.format_exception(raised.value))
    output += "".join(capsys.readouterr())
    assert "trying again" in output
    assert not any(secret in output for secret in (SECRET, WRONG, USER))


@pytest.mark.parametrize("key", ["root", "shards", "target"])
def test_a_plan_with_credentials_in_a_url_is_refused_without_repeating_them(
    tmp_path: Path, key: str
) -> None:
    """Otherwise it would be written into the run and sent to Prefect."""
    url = f"s3://key:{USER}@bucket/a.tar"
    changes: dict[str, dict[str, Any]] = {
        "root": {"root": url},
        "shards": {"data": {"shards": url}},
        "target": {"targets": {"t": {"shards": [url]}}},
    }
    text = Path(write_plan(tmp_path, **changes[key])).read_text()
    with pytest.raises(
        PlanError, match="holds credentials, which would be written into the run"
    ) as raised:
        parse_plan(text, "plan.yaml")
    assert USER not in "".join(traceback.format_exception(raised.value))
    assert os.listdir(tmp_path) == ["small.yaml"]
