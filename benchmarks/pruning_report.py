"""Tables and figures of the pruning studies, from the results that every seed left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.labels import BASELINES, DEFAULT
from benchmarks.mislabelled import WORKLOADS
from benchmarks.pruning_figures import draw_areas, draw_arms, draw_domains, draw_duplicates
from benchmarks.timing import spread

Results = dict[str, dict[str, Any]]
NAMES = {workload: " ".join(workload) for workload in WORKLOADS}


def report_labels(results: Results) -> None:
    """What each score finds, what each arm comes to, and how far the goals are met."""
    found = {title: _of(results, f"labels-{name}-{kind}-") for (name, kind), title in NAMES.items()}
    shares = ", ".join(
        f"{title} {np.mean([r['share'] for r in rs]):.1%}" for title, rs in found.items()
    )
    print(
        f"\nwrong labels, {_seeds(results)} seeds: median (min to max); share of the labels that are wrong: {shares}"
    )
    areas = {
        title: {which: [r["area"][which] for r in rs] for which in rs[0]["area"]}
        for title, rs in found.items()
    }
    _table(
        "area under the ROC curve",
        list(found),
        list(areas[_title(0)]),
        lambda t, s: areas[t].get(s),
    )
    names = list(found[_title(0)][0]["arms"])
    figures = {(t, a): [r["arms"][a] for r in rs] for t, rs in found.items() for a in names}
    for key, what in (
        ("accuracy", "accuracy on clean test images after the second stage"),
        ("loss", "loss on clean test images after the second stage"),
        ("kept", "share kept"),
        ("wrong", "share of wrong labels among what was kept"),
    ):
        _table(what, list(found), names, lambda t, a, key=key: [f[key] for f in figures[t, a]])
    closed = {
        key: {(t, a): _closed(rs, a, key) for t, rs in found.items() for a in names}
        for key in ("accuracy", "loss")
    }
    for key, shares in closed.items():
        print(
            f"\nshare of the gap in {key} between unpruned and oracle that each arm closes, by the means of all seeds"
        )
        _rows(list(found), names, lambda t, a, shares=shares: f"{shares[t, a]:.2f}")
    _goals(areas, closed, list(found), names)
    draw_areas(areas)
    draw_arms({t: {a: [f["accuracy"] for f in figures[t, a]] for a in names} for t in found})


def report_domains(results: Results) -> None:
    """What of each domain is kept, and the loss on the target's test text."""
    runs = list(results.values())
    arms = [name for name in runs[0] if name != "first stage"]
    columns = [column for column in runs[0]["oracle"] if column != "accuracy"]
    first = spread([r["first stage"]["loss"] for r in runs], 3)
    print(
        f"\nmixed text, {len(runs)} seeds: median (min to max); loss on the manual's test text after the first stage {first}"
    )
    _rows(columns, arms, lambda column, arm: spread([r[arm][column] for r in runs], 3))
    less = (
        [r["random"]["loss"] - r["ours"]["loss"] for r in runs],
        [r["unpruned"]["loss"] - r["ours"]["loss"] for r in runs],
    )
    print(
        f"\ndifference in loss, random minus ours: {spread(less[0], 3)}; "
        f"unpruned minus ours: {spread(less[1], 3)}"
    )
    draw_domains({arm: {c: [r[arm][c] for r in runs] for c in columns} for arm in arms})


def report_duplicates(results: Results) -> None:
    """The mean score of each copy, and how often it is lower than the first's."""
    runs = [r["rows"] for r in results.values()]
    measures = [name for name in runs[0][0] if name not in ("copies", "place")]
    print(
        f"\nduplicates, {len(runs)} seeds, in units of the mean score of samples that are there once: mean and 95% interval"
    )
    cells = {(row["copies"], row["place"]): n for n, row in enumerate(runs[0])}
    print("| copies | use | " + " | ".join(measures) + " |\n|" + "---|" * (len(measures) + 2))
    for (copies, place), n in cells.items():
        print(
            f"| {copies} | {place} | "
            + " | ".join(interval([r[n][m] for r in runs]) for m in measures)
            + " |"
        )
    draw_duplicates(
        {place: {m: [r[n][m] for r in runs] for m in measures} for place, n in cells.items()}
    )


def interval(values: list[float]) -> str:
    """Mean, and half the width of its 95% interval (Student's t)."""
    from scipy.stats import t

    half = (
        t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
        if len(values) > 1
        else np.nan
    )
    return f"{np.mean(values):.2f} ± {half:.2f}"


def _goals(
    areas: dict[str, Any],
    closed: dict[str, dict[tuple[str, str], float]],
    titles: list[str],
    arms: list[str],
) -> None:
    """The goals of the study, by medians over seeds."""
    print(f"\ngoals, for the default ({DEFAULT})")
    rivals = [
        arm for arm in arms if arm not in ("unpruned", "oracle", "ideal") and "ours" not in arm
    ]
    for title in titles:
        ours = float(np.median(areas[title][DEFAULT]))
        others = {name: float(np.median(areas[title][name])) for name in BASELINES}
        if "random" in title:
            top = max(others, key=lambda name: others[name])
            told = f"{others[top] - ours:.3f} under the best baseline, {top} (goal: at most .03)"
        else:
            told = (
                f"{ours - max(others['loss'], others['el2n']):.3f} above loss and EL2N (goal: .2)"
            )
        print(f"  {title}: area {ours:.3f} (goal: .95), {told}")
        for key, shares in closed.items():
            best = max(rivals, key=lambda arm: shares[title, arm])
            print(
                f"    closes {shares[title, 'ours']:.0%} of the gap in {key} (goal: 90%, ahead of every other arm); the next, "
                f"{best}, {shares[title, best]:.0%}; an ideal ranking {shares[title, 'ideal']:.0%}"
            )


def _closed(runs: list[dict[str, Any]], arm: str, key: str) -> float:
    mean = {a: np.mean([r["arms"][a][key] for r in runs]) for a in (arm, "unpruned", "oracle")}
    return float((mean[arm] - mean["unpruned"]) / (mean["oracle"] - mean["unpruned"]))


def _table(
    what: str, columns: list[str], rows: list[str], values: Callable[[str, str], list[float] | None]
) -> None:
    print(f"\n{what}")
    _rows(columns, rows, lambda c, r: spread(v, 3) if (v := values(c, r)) else "")


def _rows(columns: list[str], rows: list[str], cell: Callable[[str, str], str]) -> None:
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row in rows:
        print(f"| {row} | " + " | ".join(cell(column, row) for column in columns) + " |")


def _of(results: Results, prefix: str) -> list[dict[str, Any]]:
    return [result for name, result in results.items() if name.startswith(prefix)]


def _seeds(results: Results) -> int:
    return len({name.rsplit("-", 1)[1] for name in results})


def _title(number: int) -> str:
    return NAMES[WORKLOADS[number]]
