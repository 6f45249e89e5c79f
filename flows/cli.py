"""Room `flows`: the command line. Results go to stdout, progress and errors to stderr; bad input exits with 2."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError

from secateur.errors import PlanError, SecateurError, StorageError
from secateur.tasks.plan import POLICY_NAMES, Policy
from secateur.tasks.plan.plan_file import plan_schema, read_plan

# What imports Prefect is imported within the commands: it reads its settings once, as it is imported.
QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # a flow that fails would print its traceback; the sentence says it
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # what could not be told to a server is no matter of the user's
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

INTERRUPTED, TERMINATED = (
    130,
    143,
)  # how typer ends after Ctrl-C, and what a scheduler that ends us politely expects

app = typer.Typer(
    name="secateur",
    help="Prunes training data between the stages of a training run, by what each sample did to the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PlanFile = Annotated[Path, typer.Argument(help="the plan, a YAML file")]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder or URL")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]


@app.command()
def run(plan: PlanFile, as_json: Json = False) -> None:
    """Trains a plan's stages and prunes the data between them; a rerun carries on where it was."""
    from secateur.tasks.engine.prefect_server import prefect_server

    spec = read_plan(str(plan))
    with prefect_server():
        from secateur.flows import tables
        from secateur.flows.curate import curate

        summary = curate(spec)
    _show(summary, as_json, lambda: tables.print_run(f"{spec.root}/{spec.run}", summary))


@app.command()
def plan(plan: PlanFile, as_json: Json = False) -> None:
    """Says what a plan would do and cost: stages, samples, layers, bytes; trains nothing."""
    from secateur.flows import tables
    from secateur.tasks.reporting.dry_run import estimate_run

    found = estimate_run(read_plan(str(plan)))
    _show(found, as_json, lambda: tables.print_estimate(found))


@app.command()
def query(
    run: RunUrl,
    target: Annotated[str | None, typer.Option(help="a target of the plan")] = None,
    sample: Annotated[
        str | None, typer.Option(help="the key of a target's or a training sample")
    ] = None,
    top: Annotated[int, typer.Option(help="how many samples")] = 10,
    harmful: Annotated[
        bool, typer.Option("--harmful", help="those that raised the loss most")
    ] = False,
    stage: Annotated[int | None, typer.Option(help="one stage only")] = None,
    window: Annotated[int | None, typer.Option(help="one window of each stage only")] = None,
    as_json: Json = False,
) -> None:
    """The training samples that most lowered (or raised) a loss at the run's end."""
    from secateur.flows import tables
    from secateur.tasks.valuation.query import find_influential

    hits = find_influential.fn(run, target, sample, top, harmful, stage, window)
    _show(hits, as_json, lambda: tables.print_hits(hits))


@app.command()
def prune(
    run: RunUrl,
    stage: Annotated[int, typer.Option(help="the stage to prune")],
    policy: Annotated[str | None, typer.Option(help=f"one of {', '.join(POLICY_NAMES)}")] = None,
    keep: Annotated[float | None, typer.Option(help="fraction to keep")] = None,
    at_least: Annotated[float | None, typer.Option(help="lowest score to keep (threshold)")] = None,
    by: Annotated[
        str | None, typer.Option(help="member or member:field to balance by (balanced)")
    ] = None,
    prefer: Annotated[
        str | None, typer.Option(help="lowest or highest (loss, grand, el2n)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prunes one stage of an existing run, by the plan's policy or by another beside it."""
    from secateur.tasks.engine.prefect_server import prefect_server

    settings = {"policy": policy, "keep": keep, "at_least": at_least, "by": by, "prefer": prefer}
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = _policy(given) if given else None
    with prefect_server():
        from secateur.flows import tables
        from secateur.flows.prune import prune as prune_flow

        found = prune_flow(run, stage, chosen)
    if found is None:
        raise PlanError(f"stage {stage} of the plan has no `prune`; name one with --policy")
    _show(found, as_json, lambda: tables.print_pruning(found))


@app.command()
def audit(
    run: RunUrl,
    stage: Annotated[int, typer.Option(help="the stage to audit")],
    removals: Annotated[
        int | None, typer.Option(min=4, help="samples left out, one at a time; the plan's number")
    ] = None,
    as_json: Json = False,
) -> None:
    """Retrains a stage without a few samples, one at a time, and says how far its scores can be trusted."""
    from secateur.tasks.engine.prefect_server import prefect_server

    with prefect_server():
        from secateur.flows import tables
        from secateur.flows.audit import audit as audit_flow
        from secateur.tasks.reporting.dry_run import estimate_audit_cost

        cost = estimate_audit_cost(run, stage, removals)
        print(f"the audit will cost about {cost:.1f} trainings of stage {stage}", file=sys.stderr)
        found = audit_flow(run, stage, removals)
    _show(found, as_json, lambda: tables.print_audits([found]))


@app.command()
def compare(
    plan: PlanFile,
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds, from the plan's on")] = 5,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="a further arm, again for each: a policy's name, or name=key:value,key:value"
        ),
    ] = None,
    arms: Annotated[
        Path | None, typer.Option(help="further arms: a YAML file of `name: {key: value}`")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="the target that judges")] = None,
    as_json: Json = False,
) -> None:
    """Says whether pruning pays: the plan beside random pruning and none, over several seeds."""
    from secateur.tasks.engine.prefect_server import prefect_server

    spec = read_plan(str(plan))
    with prefect_server():
        from secateur.flows import tables
        from secateur.flows.compare import compare as compare_flow
        from secateur.tasks.comparison.arms import read_arms

        further = read_arms(arm or [], str(arms) if arms else None)
        found = compare_flow(spec, seeds, further, judge)
    _show(found, as_json, lambda: tables.print_comparison(found))


@app.command()
def windows(
    run: RunUrl,
    stage: Annotated[int | None, typer.Option(help="one stage only")] = None,
    budget: Annotated[
        float, typer.Option(help="share of a stage's steps that windows may hold at most")
    ] = 0.4,
    as_json: Json = False,
) -> None:
    """When in training the samples' influence is high, and the windows that suggests for a stage like it."""
    from secateur.flows import tables
    from secateur.tasks.analysis.windows import suggest_windows

    found = suggest_windows.fn(run, stage, budget)
    _show(found, as_json, lambda: tables.print_windows(found))


@app.command()
def verify(run: RunUrl, as_json: Json = False) -> None:
    """Rereads all that a run has committed, and names what is missing, changed, damaged or extra (exit code 2)."""
    from secateur.storage.integrity import verify_folder as verify_root
    from secateur.tasks.run.run import Run

    found = [asdict(finding) for finding in verify_root(Run.open(run).folder.root)]
    _show(
        found,
        as_json,
        lambda: _lines([f"{f['what']:8}{f['file']}" for f in found], "all is as it was committed"),
    )
    if found:
        raise SystemExit(2)


@app.command()
def gc(
    run: RunUrl,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list them only")] = False,
    as_json: Json = False,
) -> None:
    """Removes what attempts that never committed have left in a run's folder; do so while nothing runs there."""
    from secateur.storage.integrity import find_stray_files, remove_stray_files
    from secateur.tasks.run.run import Run

    root = Run.open(run).folder.root
    found = find_stray_files(root) if dry_run else remove_stray_files(root)
    verb = "would be removed" if dry_run else "removed"
    _show(
        found, as_json, lambda: _lines([f"{verb}: {name}" for name in found], "nothing to remove")
    )


@app.command()
def schema() -> None:
    """Prints the JSON schema of a plan, for editors."""
    sys.stdout.write(plan_schema())


def main() -> None:
    """The console command `secateur`."""
    sys.path.insert(0, os.getcwd())  # factories named in a plan live where the user works
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("EventsWorker").setLevel(
        logging.CRITICAL
    )  # Prefect's, which its own settings do not reach
    signal.signal(signal.SIGTERM, _terminated)
    with _explained():
        app(standalone_mode=True)


def _terminated(*_: object) -> None:
    """By default nothing would be tidied up. Within a flow Prefect ends the flow run first, and then sends the signal again."""
    raise SystemExit(TERMINATED)


@contextmanager
def _explained() -> Iterator[None]:
    """One sentence and exit code 2 for what a user can get wrong; how to go on after an interruption."""
    try:
        yield
    except (PlanError, StorageError, SecateurError) as error:
        print(f"secateur: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            print(
                "secateur: interrupted; the same command carries on from the last whole segment",
                file=sys.stderr,
            )
        raise


def _policy(settings: dict[str, Any]) -> Policy:
    try:
        policy: Policy = TypeAdapter(Policy).validate_python(settings)
    except ValidationError as error:
        raise PlanError(_option_sentence(error, settings)) from error
    return policy


def _lines(lines: list[str], otherwise: str) -> None:
    print("\n".join(lines) or otherwise)


def _option_sentence(error: ValidationError, settings: dict[str, Any]) -> str:
    """What is wrong with the options of `secateur prune`."""
    first, policy = error.errors()[0], settings.get("policy")
    option = "--" + str(first["loc"][-1] if first["loc"] else "policy").replace("_", "-")
    if first["type"] == "missing":
        return f"--policy {policy} needs {option}"
    if first["type"] == "extra_forbidden":
        return f"--policy {policy} takes no {option}; leave it out"
    if option == "--policy":
        return f"--policy is {policy or 'missing'}; give one of {', '.join(POLICY_NAMES)}"
    return f"{option}: {first['msg'].lower()}"


def _show(value: BaseModel | list[Any], as_json: bool, table: Any) -> None:
    """One JSON document, or the table."""
    if as_json:
        print(json.dumps(TypeAdapter(Any).dump_python(value, mode="json"), indent=1))
    else:
        table()


if __name__ == "__main__":
    main()
