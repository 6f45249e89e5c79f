"""Bad input ends in one sentence that says what is wrong, where and what to do.

Nothing half-written is left.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.shards import write_shards
from secateur.errors import PlanError, SecateurError, StorageError
from secateur.flows import pipeline_tasks
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.plan import Policy
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.reporting.dry_run import estimate_run
from secateur.tasks.reporting.summary import summarize_run
from secateur.tasks.results.pruning_results import PruneResult
from secateur.tasks.run import Run
from secateur.tasks.valuation.query import find_influential
from tests.tasks.small import curate_small, make_data, sample, small_plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_data(tmp_path)
    return tmp_path


def find_uncommitted(root: Path) -> list[str]:
    """The files that no manifest names."""
    manifests = {path.parent: path.read_text() for path in root.rglob("manifest.json")}

    def is_committed(path: Path) -> bool:
        return any(
            folder in path.parents and f'"{path.relative_to(folder).parts[0]}"' in text
            for folder, text in manifests.items()
        )

    files = [path for path in root.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return [str(path) for path in files if not is_committed(path)]


def assert_refused(folder: Path, kind: type[Exception], sentence: str, **changes: Any) -> None:
    """Check that running the plan ends in the sentence and leaves nothing half-written."""
    with pytest.raises(kind, match=sentence) as raised:
        curate_small(small_plan(folder, **changes))
    assert "\n" not in str(raised.value)
    assert find_uncommitted(folder / "runs") == []


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-1.tar").unlink()
    assert_refused(
        folder, StorageError, r"shard .*train-1\.tar does not exist; check `shards` in the plan"
    )


def test_a_truncated_shard_is_named(folder: Path) -> None:
    data = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(data[: len(data) // 2 // 512 * 512])
    assert_refused(folder, StorageError, r"train-1\.tar is truncated, damaged")


def test_a_truncated_shard_that_may_be_skipped_is_left_out_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(data[: len(data) // 2 // 512 * 512])
    plan = small_plan(folder, data={"shards": f"{folder}/train-{{0..1}}.tar", "damaged": "skip"})
    run = curate_small(plan)
    first = summarize_run(run)[0]
    assert first.samples == 70
    assert len(first.skipped) == 1
    assert "train-1.tar is truncated" in first.skipped[0]
    assert f"left out: {first.skipped[0]}" in capsys.readouterr().err
    (folder / "train-0.tar").rename(folder / "gone.tar")
    curate_small(plan)  # everything is committed, so the shard is not read again


def test_a_shard_that_changes_during_the_run_is_named(folder: Path) -> None:
    run = Run.start(small_plan(folder))
    list_stage_samples(run, 0)
    path = folder / "train-1.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    assert_refused(
        folder,
        StorageError,
        r"train-1\.tar has changed since it was listed; its sample digit-0070 is different",
    )


def test_a_pruned_shard_that_changed_is_not_trained_on(folder: Path) -> None:
    run = Run.start(small_plan(folder))
    curate_small(run.plan)
    shard = Path(read_stage_samples(run, 1).urls[0])
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    run.folder.stage(1).samples.remove()
    with pytest.raises(PlanError, match=r"the pruned shard .*train-0\.tar is changed; restore it"):
        list_stage_samples(run, 1)


def test_a_shard_that_was_forged_before_it_was_pruned_is_not_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of the whole shard is fast, and can be deceived with much work.

    Here it is replaced by one that is the same for every shard.
    """
    constant_hash = SimpleNamespace(
        xxh3_128=lambda data=b"": SimpleNamespace(update=lambda data: None, digest=lambda: b"same")
    )
    monkeypatch.setattr("secateur.storage.rewrite.xxhash", constant_hash)
    monkeypatch.setattr("secateur.storage.sample_hashes.xxhash", constant_hash)

    def forge_and_prune(run: Run, stage: int, policy: Policy | None = None) -> PruneResult:
        data = bytearray((folder / "train-0.tar").read_bytes())
        data[700] ^= 1
        data[700 + len(data) // 2 // 512 * 512] ^= 1
        (folder / "train-0.tar").write_bytes(data)
        return write_pruned_stage(run, stage, policy)

    task = replace(pipeline_tasks.write_shards, function=forge_and_prune)
    monkeypatch.setattr(pipeline_tasks, "write_shards", task)
    assert_refused(
        folder,
        StorageError,
        r"sample digit-00\d\d of the pruned shards of stage 0 is not what stage 0 trained on",
    )


def test_a_duplicate_key_is_named_with_both_shards(folder: Path) -> None:
    make_data(folder, [sample(3)])
    assert_refused(
        folder,
        StorageError,
        "key digit-0003 occurs twice, as sample 3 of .*train-0.tar and as sample",
    )


def test_a_sample_that_cannot_be_decoded_is_named(folder: Path) -> None:
    make_data(folder, [sample(500, raw=b"short")])
    assert_refused(
        folder,
        PlanError,
        r"sample digit-0500 of .*train-1\.tar cannot be decoded by the task .*repair or remove it",
    )


def test_an_image_bomb_is_a_sample_that_cannot_be_decoded(folder: Path) -> None:
    """A PNG of a few bytes declares 100,000 x 100,000 pixels. The task is the image example's."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    bomb = {"__key__": "bomb", "png": b"\x89PNG\r\n\x1a\n" + b"".join(chunks), "cls": b"1"}
    write_shards(f"{folder}/bomb-%d.tar", [bomb], 1)
    assert_refused(
        folder,
        PlanError,
        r"sample bomb of .*bomb-0\.tar cannot be decoded by the task .*DecompressionBomb",
        data={"shards": f"{folder}/bomb-0.tar"},
        task={"factory": "examples.images.task:Digits"},
        stages=[{"steps": 2, "batch_size": 1}],
    )


def test_a_sample_without_a_member_that_the_task_needs_is_named(folder: Path) -> None:
    make_data(folder, [{"__key__": "digit-9999", "cls": b"1"}])
    assert_refused(
        folder, PlanError, r"sample digit-9999 .*cannot be decoded by the task \(KeyError: 'raw'\)"
    )


def test_a_window_outside_its_stage_is_refused(folder: Path) -> None:
    stage = {"steps": 5, "batch_size": 20, "windows": [{"start": 2, "stop": 9, "unit": "steps"}]}
    assert_refused(
        folder,
        PlanError,
        "window 2 to 9 steps of stage 0 is not within its 5 steps",
        stages=[stage],
    )


@pytest.mark.parametrize(("uncaptured", "blocks"), [([], 3), (["4.*"], 2)])
def test_any_layer_is_captured_unless_the_plan_lists_it(
    folder: Path, uncaptured: list[str], blocks: int
) -> None:
    model = {"factory": "tests.tasks.digits:network", "args": {"uncaptured": True}}
    run = curate_small(small_plan(folder, model=model, uncaptured=uncaptured))
    assert run.folder.stage(1).scores.committed
    assert len(run.folder.basis.manifest.facts["blocks"]) == blocks


def test_a_loss_that_is_not_finite_is_named(folder: Path) -> None:
    make_data(folder, [sample(501, cls=b"nan")])
    assert_refused(
        folder,
        PlanError,
        r"the loss of sample digit-0501 is nan at step \d+ of stage 0 \(1 of \d+ samples",
    )


def test_a_task_that_returns_one_loss_per_batch_is_refused(folder: Path) -> None:
    assert_refused(
        folder,
        PlanError,
        r"losses returned shape \(\) for 20 samples",
        task={"factory": "tests.tasks.digits:Averaged"},
    )


def test_an_empty_target_is_named(folder: Path) -> None:
    write_shards(f"{folder}/empty-%d.tar", [], 1)
    assert_refused(
        folder,
        PlanError,
        "target none has no samples in .*empty-0.tar",
        targets={"none": {"shards": f"{folder}/empty-0.tar"}},
    )


def test_empty_training_data_is_refused(folder: Path) -> None:
    write_shards(f"{folder}/empty-%d.tar", [], 1)
    assert_refused(
        folder,
        PlanError,
        "there are no samples to train on in .*empty-0.tar",
        data={"shards": f"{folder}/empty-0.tar"},
    )


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        ("nowhere.at:all", "the model factory nowhere.at:all cannot be imported"),
        ("tests.tasks.digits:nothing", "cannot be imported"),
        ("tests.tasks.digits:Digits", "returned a Digits, not an nn.Module"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(
    folder: Path, factory: str, sentence: str
) -> None:
    assert_refused(folder, PlanError, sentence, model={"factory": factory})


def test_arguments_that_a_factory_does_not_accept_are_refused(folder: Path) -> None:
    assert_refused(
        folder,
        PlanError,
        "network does not accept its args",
        model={"factory": "tests.tasks.digits:network", "args": {"widht": 2}},
    )


def test_a_stage_that_keeps_no_sample_ends_the_run(folder: Path) -> None:
    policy = {"policy": "threshold", "at_least": 1e9}
    stage = {"epochs": 1, "batch_size": 20, "prune": policy}
    assert_refused(
        folder, PlanError, "stage 0 of .* kept no sample; relax its policy", stages=[stage, stage]
    )


def test_another_plan_for_the_same_folder_is_refused(folder: Path) -> None:
    curate_small(small_plan(folder))
    assert_refused(
        folder, PlanError, r"holds a run of another plan \(they differ in seed\)", seed=7
    )


def test_the_dry_run_refuses_what_the_run_would(folder: Path) -> None:
    with pytest.raises(SecateurError, match=r"pattern 9\.\* .* matches no parameter"):
        estimate_run(small_plan(folder, uncaptured=["9.*"]))
    (folder / "target-0.tar").unlink()
    with pytest.raises(StorageError, match=r"target-0\.tar does not exist"):
        estimate_run(small_plan(folder))


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ({}, "give one of --target and --sample"),
        ({"target": "clean", "sample": "digit-0001"}, "give one of --target and --sample"),
        ({"target": "other"}, "has no target other; it has clean"),
        ({"sample": "other"}, "holds a sample other; check the key"),
        ({"target": "clean", "top": 0}, "--top is 0"),
        ({"target": "clean", "estimate": "guess"}, "give one of embedding, pull_back, replay"),
        (
            {"target": "clean", "stage": 5},
            "stage 5 of .* is not indexed; the indexed stages are 0, 1",
        ),
    ],
)
def test_queries_that_cannot_be_answered_are_refused(
    folder: Path, question: dict[str, Any], sentence: str
) -> None:
    run = curate_small(small_plan(folder))
    with pytest.raises(PlanError, match=sentence):
        find_influential(run, **question)


def test_a_folder_without_a_run_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"holds no run; give the folder that `secateur run` made"):
        Run.open(str(folder))
