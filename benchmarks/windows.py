"""When in training samples have influence: profiles of runs, and their phases.

docs/windows.md shows the results.

`python -m benchmarks.windows [--seeds 5] [--only NAME] [--figures FOLDER]`. Each workload is
trained as one stage, whose profile is exact (by replay). It is also trained in quarters, to see how
the influence of each quarter's samples changes as seen from the end of every later quarter. Images
are four stages of one schedule, by embeddings. Text is replayed from each quarter's end, because
embeddings fail on it (see fidelity.md). Figures are those of the first seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from benchmarks.arms import train_and_score
from examples.images.make_shards import make as make_images
from examples.text.make_shards import make as make_text
from secateur.flows.stage import train_stage
from secateur.flows.workers import InlineWorkers
from secateur.storage.frames import read_frame
from secateur.tasks.analysis.influence_profile import write_profile
from secateur.tasks.analysis.plots import draw_evolution, draw_profile
from secateur.tasks.analysis.profile_frames import learning_rates, profile_series
from secateur.tasks.plan import Plan
from secateur.tasks.results.profile_results import EVOLUTION, PROFILE, Phases, read_phases
from secateur.tasks.results.valuation_results import read_replay_scores
from secateur.tasks.run import Run
from secateur.tasks.valuation.dynamics import read_segment
from secateur.tasks.valuation.replay import replay_stage

BINS = 20  # parts of the steps, for figures that do not depend on the phases found
STAGES = 4
IMAGES: dict[str, Any] = {
    "model": {"factory": "examples.images.model:mlp", "args": {"hidden": 128}},
    "task": {"factory": "examples.images.task:Digits"},
}
TEXT: dict[str, Any] = {
    "model": {
        "factory": "examples.text.model:Transformer",
        "args": {"width": 64, "heads": 4, "layers": 2},
    },
    "task": {"factory": "examples.text.task:NextByte"},
}
ADAMW = {"kind": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.01, "clip_norm": 1.0}
WORKLOADS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "images, SGD": (IMAGES, {"kind": "sgd", "lr": 0.1}, 240),
    "images, AdamW": (IMAGES, ADAMW | {"lr": 0.001}, 240),
    "text, AdamW": (TEXT, ADAMW | {"lr": 0.002}, 240),
}
BATCH = {"images": 32, "text": 16}
Measures = dict[str, float | str]


def make_plan(name: str, seed: int, root: str, stages: list[int]) -> Plan:
    """Return a workload as a plan of stages of given lengths under one schedule.

    The schedule warms up for a tenth of the steps, and ends with a cosine.
    """
    settings, optimizer, _ = WORKLOADS[name]
    batch = BATCH[name.split(",")[0]]
    basis: dict[str, Any] = {"kind": "coordinates", "numbers": 512}
    if optimizer["kind"] == "sgd":
        basis = {"kind": "kronecker", "rank": 16}
    exact = {"score": {"horizon": "stage", "aggregate": "mean"}} if len(stages) == 1 else {}
    return Plan.model_validate(
        {
            "run": "-".join(map(str, stages)),
            "root": root,
            "seed": seed,
            "threads": 1,
            **settings,
            "data": {"shards": f"{root}/data/train-{{000000..000003}}.tar"},
            "targets": {"target": {"shards": f"{root}/data/target-000000.tar"}},
            "optimizer": optimizer | {"at_stage": "carry"},
            "schedule": {"kind": "cosine", "warmup": 0.1, "over": "run"},
            "stages": [{"steps": steps, "batch_size": batch} for steps in stages],
            "basis": basis,
            **exact,
        }
    )


def run_with_profiles(plan: Plan) -> Run:
    """Run a plan, and write the profile of every stage."""
    run = Run.start(plan)
    for stage in range(len(plan.stages)):
        train_and_score(run, stage)
        write_profile(run, stage)
    return run


def describe_shape(influence: np.ndarray) -> dict[str, float]:
    """Return figures of a profile whose steps are divided into twentieths.

    They are the first and the last twentieth over the lowest one, where the lowest one lies, and
    the doublings per tenth of the steps from there to the last.
    """
    bins = np.array([part.mean() for part in np.array_split(influence, BINS)])
    low = int(bins.argmin())
    rise = np.log2(bins[-1] / bins[low]) / max(1, BINS - 1 - low) * BINS / 10
    return {
        "first": bins[0] / bins[low],
        "last": bins[-1] / bins[low],
        "lowest": (low + 0.5) / BINS,
        "rise": rise,
    }


def measure_whole(name: str, seed: int, root: str, figures: Path | None) -> Measures:
    """Return figures of the exact profile of a workload as one stage."""
    run = run_with_profiles(make_plan(name, seed, root, [WORKLOADS[name][2]]))
    frame = read_frame(run.folder.stage(0).profile, PROFILE)
    phases = read_phases(run, 0, "target")
    if figures:
        png = draw_profile(frame, {"target": phases}, 0, f"{name}, one seed, by replay")
        _save_figure(figures, f"profile-{_slug(name)}", png)
    influence = profile_series(frame, 0, "target")[1]
    rows = frame.filter(quantity="per_rate").sort("step")
    signed = rows.filter(estimate="replay")["mean"].to_numpy()
    embedded = rows.filter(estimate="embedding")["mean_abs"].to_numpy()
    return {
        **describe_shape(np.asarray(influence)),
        **_describe_phases(phases),
        **_describe_signed(signed),
        "agreement": float(spearmanr(influence, embedded).statistic),
    }


def measure_quarters(name: str, seed: int, root: str, figures: Path | None) -> Measures:
    """Return how the influence of each quarter changes as seen from the end of every later one."""
    exact = name.startswith("text")
    frame = _replay_quarters(name, seed, root) if exact else _embed_quarters(name, seed, root)
    if figures:
        title = f"{name}, one seed, by {'replay' if exact else 'embeddings'}"
        _save_figure(figures, f"evolution-{_slug(name)}", draw_evolution(frame, title))
    final = frame.filter(view=STAGES - 1).sort("stage")["mean_abs"].to_numpy()
    own = frame.filter(pl.col("view") == pl.col("stage")).sort("stage")["mean_abs"].to_numpy()
    kept = final / own
    middle = float(np.median(final[1:-1]))
    return {
        "first kept": kept[0],
        "middle kept": float(np.median(kept[1:-1])),
        "first over middle": final[0] / middle,
        "last over middle": final[-1] / middle,
    }


def _embed_quarters(name: str, seed: int, root: str) -> pl.DataFrame:
    lengths = [WORKLOADS[name][2] // STAGES] * STAGES
    run = run_with_profiles(make_plan(name, seed, root, lengths))
    return read_frame(run.folder.stage(STAGES - 1).profile, EVOLUTION)


def _replay_quarters(name: str, seed: int, root: str) -> pl.DataFrame:
    """The same training, ended after each quarter and replayed from there."""
    steps = WORKLOADS[name][2]
    parts = []
    for view in range(STAGES):
        end = steps * (view + 1) // STAGES
        lengths = [end, steps - end] if end < steps else [end]
        run = Run.start(make_plan(name, seed, root, lengths))
        train_stage(InlineWorkers(), run.url, 0)
        replay_stage(run, 0)
        for number, ledger in enumerate(run.folder.stage(0).segments()):
            values = {
                "step": read_segment(ledger).steps.numpy(),
                "score": read_replay_scores(run, 0, number)["target"].numpy(),
            }
            parts.append(pl.DataFrame(values).with_columns(view=pl.lit(view)))
    scores = pl.concat(parts).with_columns(pl.col("step").cast(pl.UInt32))
    # All runs have the same rates; the last one has those of every step.
    scores = scores.join(learning_rates(run, 0), "step")
    influence = pl.col("score") / pl.col("rate")
    quarter = (pl.col("step") * STAGES // steps).alias("stage")
    means = {"mean": influence.mean(), "mean_abs": influence.abs().mean()}
    frame = scores.group_by(quarter, "view").agg(**means)
    return frame.with_columns(target=pl.lit("target")).sort("stage", "view")


def _describe_phases(phases: Phases) -> Measures:
    """The phases that the method finds, their ratios, and where the basin begins and ends."""
    names = list(dict.fromkeys(phase.name for phase in phases.phases))
    measures: Measures = {
        "phases": ", ".join(names) or "none",
        "support": phases.support,
    }
    basin = [phase for phase in phases.phases if phase.name == "basin"]
    if basin:
        measures["basin from"] = basin[0].start / phases.steps
        measures["basin to"] = basin[-1].stop / phases.steps
    for name in names:
        ratio = phases.ratio_to_basin(name)
        if name != "basin" and ratio is not None:
            measures[f"{name} ratio"] = ratio
    return measures


def _describe_signed(signed: np.ndarray) -> Measures:
    """The first and the last twentieth of the signed means.

    Both are over the mean size of those between a fifth and a half of the steps.
    """
    bins = np.array([part.mean() for part in np.array_split(signed, BINS)])
    basin = float(np.abs(bins[BINS // 5 : BINS // 2]).mean())
    return {"signed first": bins[0] / basin, "signed last": bins[-1] / basin}


def _slug(name: str) -> str:
    return name.lower().replace(", ", "-")


def _save_figure(folder: Path, name: str, png: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png)


def _print_measures(title: str, seeds: list[Measures]) -> None:
    """Print each measure's median, least and greatest value over the seeds that have it."""
    print(title, flush=True)
    for key in dict.fromkeys(key for measures in seeds for key in measures):
        values = [measures[key] for measures in seeds if key in measures]
        numbers = [float(value) for value in values if not isinstance(value, str)]
        text = "; ".join(map(str, values))
        if numbers:
            text = f"{statistics.median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"
        if len(values) < len(seeds):
            text += f"  [{len(values)} of {len(seeds)} seeds]"
        print(f"  {key:18} {text}", flush=True)


def main() -> None:
    """Print every workload's figures: the median (least to greatest) over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=list(WORKLOADS))
    parser.add_argument("--figures", type=Path, help="folder for the first seed's figures")
    options = parser.parse_args()
    kinds = (("one stage, by replay", measure_whole), ("its quarters", measure_quarters))
    for name in [options.only] if options.only else WORKLOADS:
        make = make_images if name.startswith("images") else make_text
        for kind, measure in kinds:
            results = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as root:
                    make(f"{root}/data", seed)
                    results.append(measure(name, seed, root, None if seed else options.figures))
            title = f"{name}; {kind}; {options.seeds} seeds: median (least to greatest)"
            _print_measures(title, results)


if __name__ == "__main__":
    main()
