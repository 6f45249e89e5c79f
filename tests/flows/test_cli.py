"""The command line as a user runs it, in processes: output, errors and exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.tasks.engine import prefect_server
from secateur.tasks.plan import POLICIES
from secateur.tasks.plan.plan_file import read_plan
from tests.tasks.small import make_data, values


def secateur(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command. Of the tests' Prefect settings it gets only the folder for its state."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("PREFECT_") or k == "PREFECT_HOME"
    }
    return subprocess.run(
        [sys.executable, "-m", "secateur.flows.cli", *words],
        capture_output=True, text=True, check=False, timeout=300, env=clean | environment,
    )  # fmt: skip


def write_plan(folder: Path, **changes: Any) -> str:
    """Write the small plan with some changes, and return its path."""
    path = folder / f"{changes.get('run', 'small')}.yaml"
    path.write_text(yaml.safe_dump(values(folder, **changes)))
    return str(path)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line on stderr. The exit code must be 2, and stdout empty."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def finished(folder: Path) -> subprocess.CompletedProcess[str]:
    """The run that the other tests use."""
    return secateur("run", write_plan(folder), "--json")


@pytest.fixture(scope="module")
def server(
    finished: subprocess.CompletedProcess[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A server as `finished` has started one, for several commands: the environment of its users.

    A command takes as long again if it starts a server. This one has its own copy of the database.
    """
    home = tmp_path_factory.mktemp("prefect")
    shutil.copytree(os.environ["PREFECT_HOME"], home, dirs_exist_ok=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        prefect_server._listening_socket() as listener,
        tempfile.TemporaryFile() as errors,
    ):
        patch.setenv("PREFECT_HOME", str(home))
        started = prefect_server._start_server(listener, errors)
        port = listener.getsockname()[1]
        listener.close()
        url = f"http://127.0.0.1:{port}/api"
        try:
            assert prefect_server._answers(url)
            yield {"PREFECT_API_URL": url, "PREFECT_LOGGING_TO_API_ENABLED": "false"}
        finally:
            prefect_server._stop_server(started)


def test_run_prints_one_document(finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == 0, finished.stderr
    first, second = json.loads(finished.stdout)
    assert (first["samples"], first["pruned"]["kept"], second["samples"]) == (
        140,
        second["samples"],
        second["samples"],
    )
    assert set(first["targets"]["clean"]) == {"loss", "samples", "accuracy"}
    assert all(Path(shard).exists() for shard in first["pruned"]["shards"])
    assert "Traceback" not in finished.stderr


def test_run_again_prints_the_same_as_a_table(folder: Path, server: dict[str, str]) -> None:
    done = secateur("run", write_plan(folder), **server)
    assert done.returncode == 0, done.stderr
    assert "top: score not among the best 0.5" in done.stdout


def test_plan_trains_nothing(folder: Path) -> None:
    done = secateur("plan", write_plan(folder, run="dry"), "--json")
    found = json.loads(done.stdout)
    assert [s["samples"] for s in found["stages"]] == [140, 70]
    assert found["blocks"] == {"0.weight": 16, "3.weight": 16}
    assert found["targets"] == {"clean": 24}
    assert not (folder / "runs" / "dry").exists()


def test_the_dry_run_estimates_what_the_run_writes(
    finished: subprocess.CompletedProcess[str], folder: Path
) -> None:
    estimate = json.loads(secateur("plan", write_plan(folder), "--json").stdout)["stages"][0]
    ledger = sum(
        p.stat().st_size
        for p in (folder / "runs/small/stages/00/ledger").rglob("ledger.safetensors")
    )
    index = next((folder / "runs/small/stages/00/index").rglob("index.faiss")).stat().st_size
    assert ledger == pytest.approx(estimate["ledger_bytes"], rel=0.5)
    assert index == pytest.approx(estimate["index_bytes"], rel=0.05)


def test_query(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    words = ("query", f"{folder}/runs/small", "--target", "clean", "--top", "4")
    helpful = json.loads(secateur(*words, "--json").stdout)["hits"]
    harmful = json.loads(secateur(*words, "--harmful", "--stage", "0", "--json").stdout)["hits"]
    assert [hit["rank"] for hit in helpful] == [1, 2, 3, 4]
    assert all(hit["score"] > 0 for hit in helpful)
    assert all(hit["score"] < 0 and hit["stage"] == 0 for hit in harmful)
    table = secateur(*words).stdout
    assert all(hit["key"] in table for hit in helpful)
    assert "stage 1: how far answers agree with replay was not measured" in table
    assert re.search(r"the basis holds \d+% of this question's squared gradient", table)


def test_groups(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    words = ("groups", f"{folder}/runs/small", "--by", "json:parity", "--stage", "0")
    helpful = json.loads(secateur(*words, "--removals", "1", "--json").stdout)
    assert {group["group"] for group in helpful} == {"even", "odd"}
    assert helpful[0]["score"] > helpful[1]["score"]
    assert helpful[0]["removal"] is not None
    assert helpful[1]["removal"] is None
    assert sum(group["samples"] for group in helpful) == 140
    harmful = secateur(*words, "--harmful").stdout
    assert harmful.index(helpful[1]["group"]) < harmful.index(helpful[0]["group"])
    assert f"{helpful[0]['score']:+.3e}" in harmful
    none = secateur("groups", f"{folder}/runs/small", "--by", "duplicates", "--similarity", "0.999")
    assert none.stdout == "no recorded use is in such a group\n"


FLOW = """
import sys
from secateur.tasks.engine.prefect_server import prefect_server
with prefect_server(()):
    from secateur.flows.groups import groups
    found = groups(sys.argv[1], "cls", stage=0, top=3, removals=1)
print([(group.rank, group.group, group.score, group.removal) for group in found])
"""


def test_groups_as_a_flow(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    run = f"{folder}/runs/small"
    done = subprocess.run(
        [sys.executable, "-c", FLOW, run], capture_output=True, text=True, check=False, timeout=300
    )
    words = ("groups", run, "--by", "cls", "--stage", "0", "--top", "3", "--removals", "1")
    expected = json.loads(secateur(*words, "--json").stdout)
    keys = ("rank", "group", "score", "removal")
    assert done.stdout.splitlines()[-1:] == [str([tuple(g[k] for k in keys) for g in expected])]


def test_pruning_by_another_policy_leaves_the_plans_own(
    finished: subprocess.CompletedProcess[str], folder: Path, server: dict[str, str]
) -> None:
    run = f"{folder}/runs/small"
    options = ("--policy", "balanced", "--keep", "0.6", "--by", "cls", "--json")
    done = secateur("prune", run, "--stage", "0", *options, **server)
    found = json.loads(done.stdout)
    assert found["name"] == "balanced-0.6-cls"
    assert all(Path(shard).exists() for shard in found["shards"])
    again = json.loads(secateur("prune", run, "--stage", "0", "--json", **server).stdout)
    assert again["name"] == "plan"
    assert again["kept"] == json.loads(finished.stdout)[0]["pruned"]["kept"]


def test_windows(finished: subprocess.CompletedProcess[str], folder: Path) -> None:
    """The first stage was recorded in windows, the second in full."""
    done = secateur("windows", f"{folder}/runs/small")
    assert done.returncode == 0, done.stderr
    first, second = (
        part for part in done.stdout.split("stage ") if part[:1] in "01" and "target clean" in part
    )
    assert "recorded in 10 of 21 steps: a profile of windows cannot show" in first
    assert "windows: [{start: " in second
    pictures = [
        line.strip() for line in done.stdout.splitlines() if line.strip().endswith("profile.png")
    ]
    assert len(pictures) == 2
    assert all(Path(picture).exists() for picture in pictures)
    again = secateur("windows", f"{folder}/runs/small", "--stage", "1", "--budget", "0.2", "--json")
    (found,) = json.loads(again.stdout)
    assert 0 < found["share"] <= 0.2
    (lines,) = re.findall(r"^ +(windows: .*)$", second, re.MULTILINE)
    stage = {"steps": 10, "batch_size": 20, **yaml.safe_load(lines)}
    assert (
        read_plan(write_plan(folder, run="suggested", stages=[stage]))
        .stages[0]
        .listed_windows[-1]
        .stop
        <= 1
    )


def test_a_budget_that_is_not_a_share_is_refused(
    finished: subprocess.CompletedProcess[str], folder: Path
) -> None:
    done = secateur("windows", f"{folder}/runs/small", "--budget", "2")
    assert "the budget is 2; give a share of the steps" in sentence(done)


def test_audit(folder: Path, server: dict[str, str]) -> None:
    words = ("audit", f"{folder}/runs/small", "--stage", "1", "--removals", "8")
    done = secateur(*words, "--json", **server)
    found = json.loads(done.stdout)
    assert "the audit costs about" in done.stderr
    assert found["fidelity"]["replay"]["spearman"] > 0.8
    assert Path(found["plot"]).exists()
    assert "replay" in secateur(*words, **server).stdout


def test_an_audit_may_ask_questions(
    finished: subprocess.CompletedProcess[str], folder: Path
) -> None:
    run = f"{folder}/runs/small"
    done = secateur("audit", run, "--stage", "1", "--questions", "2", "--json")
    found = json.loads(done.stdout)
    assert "the audit costs about 5.7 trainings of stage 1" in done.stderr
    assert found["questions"] == 2
    spearman = found["estimates"]["embedding"]["spearman"]
    answer = secateur("query", run, "--target", "clean", "--stage", "1").stdout
    assert f"agree with replay to {spearman:.2f} (Spearman, median of 2 single questions" in answer
    both = secateur("audit", run, "--stage", "1", "--questions", "2", "--removals", "4")
    assert "give one of --removals and --questions" in sentence(both)


def test_verify_and_gc(folder: Path, server: dict[str, str]) -> None:
    done = secateur("run", write_plan(folder, run="checked"), "--json", **server)
    shard = Path(json.loads(done.stdout)[0]["pruned"]["shards"][0])
    run = folder / "runs/checked"
    stray = run / "stages/00/index/half/index.faiss"
    assert secateur("verify", str(run)).stdout == "every file is as it was committed\n"
    stray.parent.mkdir()
    stray.write_bytes(b"half")
    name = "stages/00/index/half/index.faiss"
    assert f"would be removed: {name}" in secateur("gc", str(run), "--dry-run").stdout
    assert stray.exists()
    assert json.loads(secateur("gc", str(run), "--json").stdout) == [name]
    assert not stray.exists()
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = secateur("verify", str(run), "--json")
    (finding,) = json.loads(done.stdout)
    assert (done.returncode, finding["what"]) == (2, "changed")
    assert str(shard).endswith(finding["file"])


def test_mistakes_of_a_user_are_one_sentence(folder: Path, server: dict[str, str]) -> None:
    run = f"{folder}/runs/small"
    assert "unknown key `batchsize`" in sentence(
        secateur("run", write_plan(folder, run="typo", batchsize=4), **server)
    )
    assert "does not exist" in sentence(
        secateur("run", write_plan(folder, run="gone", data={"shards": "gone.tar"}), **server)
    )
    assert "has no target x" in sentence(secateur("query", run, "--target", "x"))
    assert "holds no run" in sentence(secateur("query", str(folder), "--target", "clean"))
    assert "no colour to group by" in sentence(secateur("groups", run, "--by", "colour"))
    assert "holds no run" in sentence(secateur("prune", str(folder), "--stage", "0", **server))
    assert "has no stage 7; its last is 1" in sentence(
        secateur("prune", run, "--stage", "7", **server)
    )


def test_ctrl_c_says_how_to_continue(folder: Path) -> None:
    plan = write_plan(folder, run="stopped", stages=[{"steps": 100_000, "batch_size": 20}])
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur.flows.cli", "run", plan], stderr=subprocess.PIPE, text=True
    )
    while not (folder / "runs/stopped/stages/00/ledger/seg-00000/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command continues after the last whole segment" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--policy", "top"], "--policy top needs --keep"),
        (["--policy", "threshold"], "--policy threshold needs --at-least"),
        (["--policy", "top", "--keep", "0.5", "--by", "cls"], "--policy top takes no --by"),
        (["--policy", "top", "--keep", "1.5"], "--keep: input should be less than or equal to 1"),
    ],
)
def test_impossible_policies_are_refused(
    finished: subprocess.CompletedProcess[str], folder: Path, words: list[str], expected: str
) -> None:
    done = secateur("prune", f"{folder}/runs/small", "--stage", "0", *words)
    assert expected in sentence(done)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--policy", "best"], "--policy is best"), (["--keep", "0.5"], "--policy is missing")],
)
def test_the_known_policies_are_listed(
    finished: subprocess.CompletedProcess[str], folder: Path, words: list[str], expected: str
) -> None:
    line = sentence(secateur("prune", f"{folder}/runs/small", "--stage", "0", *words))
    problem, _, names = line.partition("; give one of ")
    assert problem == f"secateur: {expected}"
    assert names.split(", ") == POLICIES.names()
    assert {"top", "threshold", "random", "loss", "tracin"} < set(POLICIES.names())


def test_help_names_every_command() -> None:
    done = secateur("--help")
    assert all(
        command in done.stdout
        for command in (
            "run",
            "plan",
            "query",
            "groups",
            "prune",
            "audit",
            "windows",
            "verify",
            "gc",
            "schema",
        )
    )
