"""The command line. Results go to stdout, progress and errors to stderr; bad input exits with 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.errors import PlanError
from secateur.flows.cli_support import (
    TERMINATED,
    errors_as_sentences,
    print_lines,
    read_policy,
    show_result,
)

# Everything heavy is imported within the commands, so that --help answers at once. Prefect must be
# imported late for another reason too: it reads its settings once, when it is imported.
QUIET = {
    # Prefect would print the traceback of a failed flow; we print one sentence.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # Messages that could not be delivered to a server do not concern the user.
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
PRELOADED = ("secateur.flows.audit", "secateur.flows.curate")

app = typer.Typer(
    name="secateur",
    help="Prune training data between the stages of a training run, by what each sample did to "
    "the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="the plan, a YAML file")]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or URL")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text")]


@app.command()
def run(plan: PlanFile, as_json: Json = False) -> None:
    """Train a plan's stages and prune the data between them. Run it again after an interruption."""
    from secateur.tasks.plan.plan_file import read_plan

    spec = read_plan(plan)
    with _server():
        from secateur.flows import tables
        from secateur.flows.curate import curate

        summary = curate(spec)
    show_result(summary, as_json, lambda: tables.print_run(f"{spec.root}/{spec.run}", summary))


@app.command()
def plan(plan: PlanFile, as_json: Json = False) -> None:
    """Show what a plan would do and cost: stages, samples, layers, bytes. Nothing is trained."""
    from secateur.flows import tables
    from secateur.tasks.plan.plan_file import read_plan
    from secateur.tasks.reporting.dry_run import estimate_run

    estimate = estimate_run(read_plan(plan))
    show_result(estimate, as_json, lambda: tables.print_estimate(estimate))


@app.command()
def query(
    run: RunUrl,
    target: Annotated[
        str | None, typer.Option(help="ask about a target of the plan; or give --sample")
    ] = None,
    sample: Annotated[
        str | None, typer.Option(help="ask about one target sample or training sample, by its key")
    ] = None,
    top: Annotated[int, typer.Option(help="how many samples")] = 10,
    harmful: Annotated[
        bool, typer.Option("--harmful", help="list the samples that most raised the loss")
    ] = False,
    stage: Annotated[
        int | None, typer.Option(help="search this stage only; the first is 0")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="search this window of each stage only; the first is 0")
    ] = None,
    estimate: Annotated[
        str,
        typer.Option(
            help="embedding: search the index, in milliseconds; pull_back: scan the ledgers, in "
            "seconds; replay: repeat the training, which is exact"
        ),
    ] = "embedding",
    as_json: Json = False,
) -> None:
    """Find the training samples that most lowered (or raised) a loss at the run's end."""
    from secateur.flows import tables
    from secateur.tasks.run import Run
    from secateur.tasks.valuation.query import find_influential

    opened = Run.open(run)
    answer = find_influential(opened, target, sample, top, harmful, stage, window, estimate)
    show_result(answer, as_json, lambda: tables.print_answer(answer))


@app.command()
def groups(
    run: RunUrl,
    by: Annotated[
        str,
        typer.Option(
            help="shard, duplicates, a member of the samples such as cls, or member:field of a "
            "JSON member"
        ),
    ],
    stage: Annotated[
        int | None, typer.Option(help="the stage; by default the last indexed one")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="a target of the plan; by default the one pruned for")
    ] = None,
    top: Annotated[int, typer.Option(help="how many groups")] = 10,
    harmful: Annotated[
        bool, typer.Option("--harmful", help="list the groups that most raised the loss")
    ] = False,
    estimate: Annotated[
        str, typer.Option(help="of the scores: embedding, pull_back or replay, as in a query")
    ] = "embedding",
    removals: Annotated[
        int,
        typer.Option(
            help="how many of the groups to leave out in real training, one at a time; each costs "
            "up to one training of the stage"
        ),
    ] = 0,
    similarity: Annotated[
        float | None, typer.Option(help="least similarity of duplicates, from 0 to 1")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add up scores by label, domain, shard or copies, and test what whole groups did."""
    from secateur.flows import tables
    from secateur.tasks.analysis.groups import value_groups
    from secateur.tasks.run import Run

    opened = Run.open(run)
    found = value_groups(opened, by, stage, target, top, harmful, estimate, removals, similarity)
    show_result(found, as_json, lambda: tables.print_groups(found))


@app.command()
def prune(
    run: RunUrl,
    stage: Annotated[int, typer.Option(help="the stage to prune; the first is 0")],
    policy: Annotated[
        str | None,
        typer.Option(help="a policy, such as top, threshold or balanced; by default the plan's"),
    ] = None,
    keep: Annotated[float | None, typer.Option(help="fraction to keep (most policies)")] = None,
    at_least: Annotated[float | None, typer.Option(help="lowest score to keep (threshold)")] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="the label or domain to balance: a member of the sample, such as cls, or "
            "member:field of a JSON member (balanced)"
        ),
    ] = None,
    prefer: Annotated[
        str | None, typer.Option(help="values to keep: lowest or highest (loss, grand, el2n)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write pruned shards of a stage of an existing run, by the plan's policy or by another one."""
    options = {"policy": policy, "keep": keep, "at_least": at_least, "by": by, "prefer": prefer}
    settings = {name: value for name, value in options.items() if value is not None}
    # The run is opened first, because its plan may name the plug-in that has the policy.
    from secateur.tasks.run import Run

    Run.open(run)
    chosen = read_policy(settings) if settings else None
    with _server():
        from secateur.flows import tables
        from secateur.flows.prune import prune as prune_flow

        result = prune_flow(run, stage, chosen)
    if result is None:
        raise PlanError(f"stage {stage} of the plan has no `prune`; name one with --policy")
    show_result(result, as_json, lambda: tables.print_pruning(result))


@app.command()
def audit(
    run: RunUrl,
    stage: Annotated[int, typer.Option(help="the stage to audit; the first is 0")],
    removals: Annotated[
        int | None,
        typer.Option(min=4, help="samples left out, one at a time; by default the plan's number"),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="compare answers about so many single target samples with replay instead, which "
            "needs no retraining",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check how far scores can be trusted: retrain without a few samples, one at a time."""
    with _server():
        from secateur.flows import tables
        from secateur.flows.audit import audit as audit_flow

        result = audit_flow(run, stage, removals, questions)
    show_result(result, as_json, lambda: tables.print_audit(result))


@app.command()
def compare(
    plan: PlanFile,
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds; the plan's is the first")] = 5,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="a further way to prune, may be repeated: a policy's name, or "
            "name=key:value,key:value with keys of a policy or of `score`"
        ),
    ] = None,
    arms: Annotated[
        Path | None, typer.Option(help="further arms: a YAML file of `name: {key: value}`")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="the target to evaluate on; by default one that chooses no samples"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether pruning pays: compare with random pruning and none, over several seeds."""
    from secateur.tasks.plan.plan_file import read_plan

    spec = read_plan(plan)
    with _server():
        from secateur.flows import tables
        from secateur.flows.compare import compare as compare_flow
        from secateur.tasks.comparison.arms import read_arms

        further = read_arms(arm or [], str(arms) if arms else None)
        result = compare_flow(spec, seeds, further, judge)
    show_result(result, as_json, lambda: tables.print_comparison(result))


@app.command()
def windows(
    run: RunUrl,
    stage: Annotated[int | None, typer.Option(help="show this stage only; the first is 0")] = None,
    budget: Annotated[
        float, typer.Option(help="largest share of a stage's steps in its windows")
    ] = 0.4,
    as_json: Json = False,
) -> None:
    """Show when in training influence is high, and suggest windows for a similar stage."""
    from secateur.flows import tables
    from secateur.tasks.analysis.windows import suggest_windows
    from secateur.tasks.run import Run

    suggestions = suggest_windows(Run.open(run), stage, budget)
    show_result(suggestions, as_json, lambda: tables.print_windows(suggestions))


@app.command()
def verify(run: RunUrl, as_json: Json = False) -> None:
    """Reread every file of a run, and name what is missing, changed or extra.

    Exits with 2 if it names any file.
    """
    from dataclasses import asdict

    from secateur.storage.integrity import verify_folder
    from secateur.tasks.run import Run

    findings = [asdict(finding) for finding in verify_folder(Run.open(run).folder.root)]
    lines = [f"{finding['what']:8}{finding['file']}" for finding in findings]
    show_result(findings, as_json, lambda: print_lines(lines, "every file is as it was committed"))
    if findings:
        raise SystemExit(2)


@app.command()
def gc(
    run: RunUrl,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list the files")] = False,
    as_json: Json = False,
) -> None:
    """Remove the files that interrupted commands left in a run. Use it while nothing runs there."""
    from secateur.storage.integrity import find_stray_files, remove_stray_files
    from secateur.tasks.run import Run

    root = Run.open(run).folder.root
    names = find_stray_files(root) if dry_run else remove_stray_files(root)
    verb = "would be removed" if dry_run else "removed"
    lines = [f"{verb}: {name}" for name in names]
    show_result(names, as_json, lambda: print_lines(lines, "nothing to remove"))


@app.command()
def schema() -> None:
    """Print the JSON schema of a plan, for editors."""
    from secateur.tasks.plan.plan_file import plan_schema

    sys.stdout.write(plan_schema())


def main() -> None:
    """The console command `secateur`."""
    # The factories that a plan names are in the folder where the user works.
    sys.path.insert(0, os.getcwd())
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # Prefect's settings do not reach this one of its loggers.
    logging.getLogger("EventsWorker").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, _terminate)
    with errors_as_sentences():
        app(standalone_mode=True)


def _server() -> Any:
    """The Prefect server that a command uses."""
    from secateur.tasks.engine.prefect_server import prefect_server

    return prefect_server(PRELOADED)


def _terminate(*_: object) -> None:
    """End like an interruption. Python's default would not clean anything up.

    Within a flow, Prefect ends the flow run first and then sends the signal again.
    """
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    main()
