"""When in training samples have influence: profiles of runs with warm-up and decay, and their phases (docs/windows.md).

`python -m benchmarks.windows [--seeds 5] [--only NAME] [--figures FOLDER]`. Each workload is trained as one stage,
whose profile is exact (replay), and cut in four, to see how the influence of each quarter's samples changes as seen from the
end of every later one: images as four stages of one schedule, by embeddings; text, on which embeddings fail (see
fidelity.md), by replay from each quarter's end. Figures are those of the first seed.
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

from benchmarks.arms import stage_through_scores
from examples.images.make_shards import make as make_images
from examples.text.make_shards import make as make_text
from secateur.storage.frames import read_frame
from secateur.tasks.analysis.influence_profile import (
    EVOLUTION,
    PROFILE,
    learning_rates,
    profile_series,
    read_phases,
    write_profile,
)
from secateur.tasks.analysis.phases import Phases
from secateur.tasks.analysis.plots import draw_evolution, draw_profile
from secateur.tasks.data.samples import list_stage_samples
from secateur.tasks.plan import Plan
from secateur.tasks.run.run import Run
from secateur.tasks.training.fit_basis import fit_basis
from secateur.tasks.training.train import train_stage
from secateur.tasks.valuation.embed import segment_of
from secateur.tasks.valuation.replay import read_replay_scores, replay_stage

BINS = 20  # of the steps, for figures that do not rest on the phases that were found
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


def plan_of(name: str, seed: int, root: str, stages: list[int]) -> Plan:
    """A workload as a plan of stages of so many steps under one schedule: a tenth of the steps warming up, a cosine to a tenth."""
    settings, optimizer, _ = WORKLOADS[name]
    kind = name.split(",")[0]
    batch = BATCH[kind]
    basis = (
        {"kind": "kronecker", "rank": 16}
        if optimizer["kind"] == "sgd"
        else {"kind": "coordinates", "numbers": 512}
    )
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


def profiled(plan: Plan) -> Run:
    """The plan's run, with the profile of every stage."""
    run = Run.start(plan)
    for stage in range(len(plan.stages)):
        stage_through_scores(run, stage)
        write_profile.fn(run.url, stage)
    return run


def shape(influence: np.ndarray) -> dict[str, float]:
    """First and last twentieth of the steps over the lowest one; where that lies; doublings from it to the last, a tenth."""
    bins = np.array([part.mean() for part in np.array_split(influence, BINS)])
    low = int(bins.argmin())
    rise = np.log2(bins[-1] / bins[low]) / max(1, BINS - 1 - low) * BINS / 10
    return {
        "first": bins[0] / bins[low],
        "last": bins[-1] / bins[low],
        "lowest": (low + 0.5) / BINS,
        "rise": rise,
    }


def single(name: str, seed: int, root: str, figures: Path | None) -> dict[str, float | str]:
    """The exact profile of a workload as one stage."""
    run = profiled(plan_of(name, seed, root, [WORKLOADS[name][2]]))
    frame, phases = read_frame(run.folder.stage(0).profile, PROFILE), read_phases(run, 0, "target")
    if figures:
        _save(
            figures,
            f"profile-{_slug(name)}",
            draw_profile(frame, {"target": phases}, 0, f"{name}, one seed, by replay"),
        )
    influence = profile_series(frame, 0, "target")[1]
    signed = frame.filter(quantity="per_rate", estimate="replay").sort("step")["mean"].to_numpy()
    embedded = (
        frame.filter(quantity="per_rate", estimate="embedding").sort("step")["mean_abs"].to_numpy()
    )
    found: dict[str, float | str] = {
        **shape(np.asarray(influence)),
        **_phases(phases),
        **_signed(signed),
    }
    found["agreement"] = float(spearmanr(influence, embedded).statistic)
    return found


def several(name: str, seed: int, root: str, figures: Path | None) -> dict[str, float | str]:
    """How the influence of each quarter changes as seen from the end of every later one."""
    exact = name.startswith("text")
    frame = _by_replay(name, seed, root) if exact else _by_embeddings(name, seed, root)
    if figures:
        title = f"{name}, one seed, by {'replay' if exact else 'embeddings'}"
        _save(figures, f"evolution-{_slug(name)}", draw_evolution(frame, title))
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


def _by_embeddings(name: str, seed: int, root: str) -> pl.DataFrame:
    run = profiled(plan_of(name, seed, root, [WORKLOADS[name][2] // STAGES] * STAGES))
    return read_frame(run.folder.stage(STAGES - 1).profile, EVOLUTION)


def _by_replay(name: str, seed: int, root: str) -> pl.DataFrame:
    """The same training ended after each quarter, replayed from there."""
    steps, found = WORKLOADS[name][2], []
    for view in range(STAGES):
        end = steps * (view + 1) // STAGES
        run = Run.start(plan_of(name, seed, root, [end, *([steps - end] if end < steps else [])]))
        list_stage_samples.fn(run.url, 0)
        fit_basis.fn(run.url)
        train_stage.fn(run.url, 0)
        replay_stage.fn(run.url, 0)
        for number, ledger in enumerate(run.folder.stage(0).segments()):
            values = {
                "step": segment_of(ledger).steps.numpy(),
                "score": read_replay_scores(run, 0, number)["target"].numpy(),
            }
            found.append(pl.DataFrame(values).with_columns(view=pl.lit(view)))
    known = (
        pl.concat(found)
        .with_columns(pl.col("step").cast(pl.UInt32))
        .join(learning_rates(run, 0), "step")
    )
    influence = pl.col("score") / pl.col("rate")
    quarter = (pl.col("step") * STAGES // steps).alias("stage")
    figures = known.group_by(quarter, "view").agg(
        mean=influence.mean(), mean_abs=influence.abs().mean()
    )
    return figures.with_columns(target=pl.lit("target")).sort("stage", "view")


def _phases(phases: Phases) -> dict[str, float | str]:
    """The phases that the method finds, their ratios, and where the basin begins and ends."""
    names = list(dict.fromkeys(phase.name for phase in phases.phases))
    found: dict[str, float | str] = {
        "phases": ", ".join(names) or "none",
        "support": phases.support,
    }
    basin = [phase for phase in phases.phases if phase.name == "basin"]
    if basin:
        found |= {
            "basin from": basin[0].start / phases.steps,
            "basin to": basin[-1].stop / phases.steps,
        }
    for name in names:
        if name != "basin" and (ratio := phases.ratio(name)) is not None:
            found[f"{name} ratio"] = ratio
    return found


def _signed(signed: np.ndarray) -> dict[str, float]:
    """First and last twentieth of the signed means over the mean size of those between a fifth and a half of the steps."""
    bins = np.array([part.mean() for part in np.array_split(signed, BINS)])
    basin = float(np.abs(bins[BINS // 5 : BINS // 2]).mean())
    return {"signed first": bins[0] / basin, "signed last": bins[-1] / basin}


def _slug(name: str) -> str:
    return name.lower().replace(", ", "-")


def _save(folder: Path, name: str, png: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png)


def _show(title: str, found: list[dict[str, float | str]]) -> None:
    print(title, flush=True)
    for key in dict.fromkeys(key for one in found for key in one):
        values = [one[key] for one in found if key in one]
        numbers = [float(v) for v in values if not isinstance(v, str)]
        text = (
            f"{statistics.median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"
            if numbers
            else "; ".join(map(str, values))
        )
        print(
            f"  {key:18} {text}"
            + (f"  [{len(values)} of {len(found)} seeds]" if len(values) < len(found) else ""),
            flush=True,
        )


def main() -> None:
    """Prints every workload's figures: median (least to greatest) over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=list(WORKLOADS))
    parser.add_argument("--figures", type=Path, help="folder to draw the first seed's figures in")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else WORKLOADS:
        for kind, measure in (("one stage, by replay", single), ("its quarters", several)):
            found = []
            for seed in range(arguments.seeds):
                with tempfile.TemporaryDirectory() as root:
                    (make_images if name.startswith("images") else make_text)(f"{root}/data", seed)
                    found.append(measure(name, seed, root, None if seed else arguments.figures))
            _show(f"{name}; {kind}; {arguments.seeds} seeds: median (least to greatest)", found)


if __name__ == "__main__":
    main()
