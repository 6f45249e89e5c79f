"""Contributions of every architecture of `transformers`, against autograd one sample at a time.

Prints a Markdown table with a row per model, and a summary. Run as
`python -m benchmarks.architectures [causal] [perception] [MODEL ...]`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import tiny_perception
from benchmarks.tiny_models import VOCABULARY, causal_model_types, tiny_causal_model
from secateur.errors import SecateurError
from secateur.influence.bindings import Bindings, bind_layers
from secateur.influence.capture.sites import FamilySite, OwnForwardSite
from secateur.influence.coordinate_basis import CoordinateBasis
from secateur.influence.hooks import sample_gradients

SAMPLES = 3
TOKENS = 7
TIMEOUT = 60  # seconds of the processor's time per model
LIMIT = 1e-5  # relative distance from autograd in float32
HALF_LIMIT = 2e-2  # in bfloat16

COLUMNS = (
    "model",
    "entries",
    "captured",
    "float32",
    "float64",
    "train mode",
    "bfloat16",
    "autocast",
    "modules by way of capture",
    "remarks",
)

LossesOf = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """What was found for one model.

    Attributes:
        name: of the model.
        parameters: number of trainable parameters' entries.
        captured: whether all of them were bound and found by a trace.
        distances: relative distance of the contributions from autograd, by precision; infinite if
            they were refused.
        ways: number of modules that were captured in each way.
        remarks: what went wrong.
    """

    name: str
    parameters: int = 0
    captured: bool = False
    distances: dict[str, float] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether contributions are autograd's in float32 or float64, and in bfloat16."""
        exact = min(self.distances.get(p, torch.inf) for p in ("float32", "float64"))
        half = min(self.distances.get(p, torch.inf) for p in ("bfloat16", "autocast"))
        return self.captured and exact <= LIMIT and half <= HALF_LIMIT


def check(row: Row, model: nn.Module, losses_of: LossesOf) -> None:
    """Fill a row by capturing a model's contributions in several precisions.

    Args:
        row: of the model.
        model: in float32.
        losses_of: runs some samples, and returns one loss for each.
    """
    row.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _compare(row, "float32", model, losses_of)
    if row.distances["float32"] > LIMIT:
        _compare(row, "float64", model.double(), losses_of)
        model.float()
    try:
        if _is_random(model.train(), losses_of):
            row.remarks.append("random in train mode")
        else:
            _compare(row, "train", model, losses_of)
    except TimeoutError:
        raise
    except Exception as error:
        row.remarks.append(f"train mode: {error}")
    model.eval()

    _compare(row, "bfloat16", model.bfloat16(), losses_of)
    if row.distances["bfloat16"] > HALF_LIMIT:

        def autocast(places: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return losses_of(places)

        _compare(row, "autocast", model.float(), autocast)


def _compare(row: Row, precision: str, model: nn.Module, losses_of: LossesOf) -> None:
    """Add the distance in one precision to a row."""
    row.distances[precision] = torch.inf
    try:
        bindings = bind_layers(model)
        basis = CoordinateBasis(bindings.blocks, [torch.arange(b.size) for b in bindings.blocks])
        captured, _ = sample_gradients(losses_of, SAMPLES, bindings, basis)
        if precision == "float32":
            row.captured = bindings.located
            row.ways = _ways(bindings)
        own = _one_by_one(model, losses_of, basis)
    except SecateurError as error:
        row.remarks.append(f"{precision}: refused: {error}")
    except TimeoutError:
        raise
    except Exception as error:
        row.remarks.append(f"{precision}: {type(error).__name__}: {error}")
    else:
        distance, block = _distance(captured, own.to(captured), basis)
        row.distances[precision] = distance
        if distance > (HALF_LIMIT if precision in ("bfloat16", "autocast") else LIMIT):
            row.remarks.append(f"{precision}: {distance:.1e}, most in {block}")


def _one_by_one(model: nn.Module, losses_of: LossesOf, basis: CoordinateBasis) -> Tensor:
    """Return each sample's gradient by autograd, from the sample run alone."""
    rows = []
    for place in range(SAMPLES):
        model.zero_grad()
        losses_of(torch.tensor([place])).sum().backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
        rows.append(basis.project_tensors(gradients))
    return torch.stack(rows)


def _distance(captured: Tensor, own: Tensor, basis: CoordinateBasis) -> tuple[float, str]:
    """Return the largest distance of a sample, relative to the norm, and the worst block."""
    lengths = own.norm(dim=1)
    distances = torch.stack([(captured - own)[:, s].norm(dim=1) / lengths for s in basis.spans])
    worst = int(distances.nan_to_num(torch.inf).amax(1).argmax())
    whole = float(((captured - own).norm(dim=1) / lengths).nan_to_num(torch.inf).max())
    return whole, basis.blocks[worst].name


def _ways(bindings: Bindings) -> dict[str, int]:
    """Return the number of modules that were captured in each way."""
    ways = dict.fromkeys(("family", "at once", "one by one", "by masks"), 0)
    for site in bindings.sites:
        if isinstance(site, FamilySite):
            ways["family"] += 1
        elif isinstance(site, OwnForwardSite):
            ways[site.forward.way] += 1
    return ways


def _is_random(model: nn.Module, losses_of: LossesOf) -> bool:
    with torch.no_grad():
        places = torch.arange(SAMPLES)
        return not torch.equal(losses_of(places), losses_of(places))


def next_token_losses(model: nn.Module) -> LossesOf:
    """Return a function of the cross entropies of some samples' next tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    books = getattr(model.config, "num_codebooks", 1)  # music has a row of tokens for each codebook

    def losses(places: Tensor) -> Tensor:
        tokens = ids[places].repeat_interleave(books, 0)
        logits = model(input_ids=tokens, use_cache=False).logits
        each = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).double(), tokens[:, 1:], reduction="none"
        )
        return each.view(len(places), -1).mean(1)

    return losses


def causal_model(name: str) -> tuple[nn.Module, LossesOf]:
    """Return a tiny model that predicts the next token, and its losses."""
    model = tiny_causal_model(name)
    return model, next_token_losses(model)


def run(name: str, make: Callable[[str], tuple[nn.Module, LossesOf]]) -> Row:
    """Return the row of a model."""
    row = Row(name)
    try:
        with _time_limit(TIMEOUT):
            try:
                model, losses_of = make(name)
                model.eval()
                with torch.no_grad():
                    losses_of(torch.arange(SAMPLES))
            except TimeoutError:
                raise
            except Exception as error:
                row.remarks.append(f"not built: {type(error).__name__}: {error}")
                return row
            check(row, model, losses_of)
    except TimeoutError:
        row.remarks.append(f"longer than {TIMEOUT} s")
    return row


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def print_row(row: Row) -> None:
    """Print a row of the table."""

    def shown(precision: str) -> str:
        value = row.distances.get(precision)
        return "" if value is None or value == torch.inf else f"{value:.0e}"

    ways = ", ".join(f"{count} {way}" for way, count in row.ways.items() if count)
    cells = [
        row.name,
        f"{row.parameters:,}",
        "yes" if row.captured else "no",
        *map(shown, ("float32", "float64", "train", "bfloat16", "autocast")),
        ways,
        "; ".join(r.replace("\n", " ").replace("|", "/")[:300] for r in row.remarks),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def print_table(title: str, rows: Iterable[Row]) -> None:
    """Print the rows of a table as they come, and a summary."""
    print(f"\n## {title}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    done = []
    for row in rows:
        print_row(row)
        done.append(row)
    built = [row for row in done if row.parameters]
    captured = [row for row in built if row.captured]
    exact = [row for row in captured if row.exact]
    print(
        f"\n{len(done)} models, of which {len(built)} could be built. {len(captured)} are captured "
        f"whole, and {len(exact)} of these within {LIMIT:g} of autograd in float32 or float64 and "
        f"within {HALF_LIMIT:g} in bfloat16."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="`causal`, `perception`, or names; all if none")
    names = parser.parse_args().models or ["causal", "perception"]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the tensors are tiny
    causal = causal_model_types()
    chosen = causal if "causal" in names else [n for n in names if n in causal]
    if chosen:
        print_table("Causal language models", (run(n, causal_model) for n in chosen))
    perception = list(tiny_perception.MODELS)
    chosen = perception if "perception" in names else [n for n in names if n in perception]
    if chosen:
        make = tiny_perception.perception_model
        print_table("Vision and audio models", (run(n, make) for n in chosen))


if __name__ == "__main__":
    main()
