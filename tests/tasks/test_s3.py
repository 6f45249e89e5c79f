"""A whole run with shards and results on S3, compared with the same run on the local disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3fs
import webdataset

from secateur.errors import PlanError
from secateur.storage.folder import Folder
from secateur.tasks.data.samples import read_stage_samples
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.results.valuation_results import read_scores
from secateur.tasks.valuation.query import find_influential
from tests.tasks.small import curate_small, make_data, small_plan


@pytest.mark.parametrize("store_at", ["bucket", "seaweedfs"])
def test_a_run_on_s3_equals_the_run_on_disk(
    store_at: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bucket = f"{request.getfixturevalue(store_at)}/{tmp_path.name}"
    make_data(tmp_path)
    store = s3fs.S3FileSystem()
    store.put(f"{tmp_path}/", f"{bucket}/digits/", recursive=True)
    local = curate_small(small_plan(tmp_path))
    remote_plan = small_plan(
        tmp_path,
        root=f"{bucket}/runs",
        data={"shards": f"{bucket}/digits/train-{{0..1}}.tar"},
        targets={"clean": {"shards": f"{bucket}/digits/target-0.tar"}},
    )
    remote = curate_small(remote_plan)
    assert read_decisions(remote, 0).equals(read_decisions(local, 0))
    assert read_scores(remote, 1).drop("shard").equals(read_scores(local, 1).drop("shard"))
    assert [hit.key for hit in find_influential(remote, "clean").hits] == [
        hit.key for hit in find_influential(local, "clean").hits
    ]
    pruned = read_stage_samples(remote, 1).urls
    assert all(url.startswith(f"{bucket}/runs/small/") for url in pruned)
    for there, here in zip(pruned, read_stage_samples(local, 1).urls, strict=True):
        assert store.cat_file(there) == Path(here).read_bytes()
    store.get_file(pruned[0], f"{tmp_path}/fetched.tar")
    assert len(list(webdataset.WebDataset(f"{tmp_path}/fetched.tar", shardshuffle=False))) > 0
    assert curate_small(remote.plan).url == remote.url  # a second run finds everything written


def test_a_store_that_ignores_conditional_puts_is_refused_unless_the_plan_accepts_the_risk(
    rclone: str, tmp_path: Path
) -> None:
    make_data(tmp_path)
    root = f"{rclone}/{tmp_path.name}"
    with pytest.raises(PlanError, match=r"ignores conditional puts.*`commits: last_writer_wins`"):
        curate_small(small_plan(tmp_path, root=root))
    assert Folder(root).files() == []
    run = curate_small(small_plan(tmp_path, root=root, commits="last_writer_wins"))
    assert read_decisions(run, 0).equals(read_decisions(curate_small(small_plan(tmp_path)), 0))
