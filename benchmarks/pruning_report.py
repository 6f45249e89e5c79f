"""Tables and figures of the pruning studies, from the results of every seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from benchmarks.labels import BASELINES, DEFAULT
from benchmarks.mislabelled import WORKLOADS
from benchmarks.pruning_figures import draw_areas, draw_arms, draw_domains, draw_duplicates
from benchmarks.timing import format_spread

V = TypeVar("V")
Results = dict[str, dict[str, Any]]
TITLES = {workload: " ".join(workload) for workload in WORKLOADS}
MEASURES = (
    ("accuracy", "accuracy on clean test images after the second stage"),
    ("loss", "loss on clean test images after the second stage"),
    ("kept", "share kept"),
    ("wrong", "share of wrong labels among what was kept"),
)


def report_labels(results: Results) -> None:
    """Print what each score finds, the figures of each arm, and how far the goals are reached."""
    runs = {
        title: _select(results, f"labels-{name}-{kind}-") for (name, kind), title in TITLES.items()
    }
    titles = list(runs)
    shares = ", ".join(
        f"{title} {np.mean([run['share'] for run in own]):.1%}" for title, own in runs.items()
    )
    print(
        f"\nwrong labels, {_count_seeds(results)} seeds: median (min to max); share of the labels "
        f"that are wrong: {shares}"
    )
    areas = {
        title: {score: [run["area"][score] for run in own] for score in own[0]["area"]}
        for title, own in runs.items()
    }
    first = areas[titles[0]]
    _print_table("area under the ROC curve", titles, list(first), lambda t, s: areas[t].get(s))
    arms = list(runs[titles[0]][0]["arms"])
    figures = {
        (title, arm): [run["arms"][arm] for run in own]
        for title, own in runs.items()
        for arm in arms
    }
    for key, title in MEASURES:
        values: dict[tuple[str, str], list[float] | None] = {
            place: [one[key] for one in own] for place, own in figures.items()
        }
        _print_table(title, titles, arms, _lookup(values))
    closed = {
        key: {(t, arm): _closed_share(own, arm, key) for t, own in runs.items() for arm in arms}
        for key in ("accuracy", "loss")
    }
    _print_closed_shares(closed, titles, arms)
    _print_goals(areas, closed, titles, arms)
    draw_areas(areas)
    draw_arms(
        {t: {arm: [one["accuracy"] for one in figures[t, arm]] for arm in arms} for t in titles}
    )


def report_domains(results: Results) -> None:
    """Print what is kept of each domain, and the loss on the target's test text."""
    runs = list(results.values())
    arms = [name for name in runs[0] if name != "first stage"]
    columns = [column for column in runs[0]["oracle"] if column != "accuracy"]
    first = format_spread([run["first stage"]["loss"] for run in runs], 3)
    print(
        f"\nmixed text, {len(runs)} seeds: median (min to max); loss on the manual's test text "
        f"after the first stage {first}"
    )
    values = {arm: {c: [run[arm][c] for run in runs] for c in columns} for arm in arms}
    _print_rows(columns, arms, lambda column, arm: format_spread(values[arm][column], 3))
    gains = {
        arm: [run[arm]["loss"] - run["ours"]["loss"] for run in runs]
        for arm in ("random", "unpruned")
    }
    random, unpruned = (format_spread(gain, 3) for gain in gains.values())
    print(f"\nloss that ours is under random: {random}; under unpruned: {unpruned}")
    draw_domains(values)


def report_duplicates(results: Results) -> None:
    """Print the mean score of each copy, and how often it is lower than the first one's."""
    runs = [result["rows"] for result in results.values()]
    measures = [name for name in runs[0][0] if name not in ("copies", "place")]
    print(
        f"\nduplicates, {len(runs)} seeds, in units of the mean score of samples that are there "
        f"once: mean and 95% interval"
    )
    values = {
        (row["copies"], row["place"]): {m: [run[number][m] for run in runs] for m in measures}
        for number, row in enumerate(runs[0])
    }
    print("| copies | use | " + " | ".join(measures) + " |\n|" + "---|" * (len(measures) + 2))
    for (copies, place), own in values.items():
        cells = " | ".join(format_interval(own[measure]) for measure in measures)
        print(f"| {copies} | {place} | {cells} |")
    draw_duplicates(values)


def format_interval(values: list[float]) -> str:
    """Return the mean, and half the width of its 95% interval (Student's t), as text."""
    half = np.nan
    if len(values) > 1:
        deviation = np.std(values, ddof=1)
        half = stats.t.ppf(0.975, len(values) - 1) * deviation / len(values) ** 0.5
    return f"{np.mean(values):.2f} ± {half:.2f}"


def _print_closed_shares(
    closed: dict[str, dict[tuple[str, str], float]], titles: list[str], arms: list[str]
) -> None:
    for key, shares in closed.items():
        print(
            f"\nshare of the gap in {key} between unpruned and oracle that each arm closes, by the "
            f"means of all seeds"
        )
        cells = {place: f"{share:.2f}" for place, share in shares.items()}
        _print_rows(titles, arms, _lookup(cells))


def _print_goals(
    areas: dict[str, Any],
    closed: dict[str, dict[tuple[str, str], float]],
    titles: list[str],
    arms: list[str],
) -> None:
    """Print the goals of the study, by medians over seeds."""
    print(f"\ngoals, for the default ({DEFAULT})")
    rivals = [
        arm for arm in arms if arm not in ("unpruned", "oracle", "ideal") and "ours" not in arm
    ]
    for title in titles:
        ours = float(np.median(areas[title][DEFAULT]))
        others = {name: float(np.median(areas[title][name])) for name in BASELINES}
        if "random" in title:
            top = max(others, key=lambda name: others[name])
            gap = f"{others[top] - ours:.3f} under the best baseline, {top} (goal: at most .03)"
        else:
            margin = ours - max(others["loss"], others["el2n"])
            gap = f"{margin:.3f} above loss and EL2N (goal: .2)"
        print(f"  {title}: area {ours:.3f} (goal: .95), {gap}")
        for key, shares in closed.items():
            best = max(rivals, key=lambda arm: shares[title, arm])
            print(
                f"    closes {shares[title, 'ours']:.0%} of the gap in {key} (goal: 90%, ahead of "
                f"every other arm); the next, {best}, {shares[title, best]:.0%}; an ideal ranking "
                f"{shares[title, 'ideal']:.0%}"
            )


def _closed_share(runs: list[dict[str, Any]], arm: str, key: str) -> float:
    """The share of the gap between unpruned and oracle that an arm closes."""
    own, unpruned, oracle = (
        np.mean([run["arms"][name][key] for run in runs]) for name in (arm, "unpruned", "oracle")
    )
    return float((own - unpruned) / (oracle - unpruned))


def _print_table(
    title: str,
    columns: list[str],
    rows: list[str],
    find_values: Callable[[str, str], list[float] | None],
) -> None:
    """Print a table of medians. A cell without values is empty."""

    def format_cell(column: str, row: str) -> str:
        values = find_values(column, row)
        return format_spread(values, 3) if values else ""

    print(f"\n{title}")
    _print_rows(columns, rows, format_cell)


def _print_rows(
    columns: list[str], rows: list[str], format_cell: Callable[[str, str], str]
) -> None:
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row in rows:
        print(f"| {row} | " + " | ".join(format_cell(column, row) for column in columns) + " |")


def _lookup(values: dict[tuple[str, str], V]) -> Callable[[str, str], V]:
    """A function that returns the value of a column and a row."""
    return lambda column, row: values[column, row]


def _select(results: Results, prefix: str) -> list[dict[str, Any]]:
    return [result for name, result in results.items() if name.startswith(prefix)]


def _count_seeds(results: Results) -> int:
    return len({name.rsplit("-", 1)[1] for name in results})
