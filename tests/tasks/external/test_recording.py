"""A loop that is not ours writes the ledger that ours writes, carries on where it was, and is refused what cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import PlanError, SecateurError
from secateur.storage.ledger import read_checkpoint, read_ledger
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.external.recording import Recording
from secateur.tasks.plan import Plan
from secateur.tasks.pruning.prune import read_decisions, write_pruned_stage
from secateur.tasks.run.run import Run
from secateur.tasks.training.loop import collate
from secateur.tasks.training.train import train_stage
from tests.tasks.small import curate_small, make_data, network, score_small, small_plan

SGD = {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("outside")
    make_data(made)
    return made


@pytest.fixture(scope="module")
def ours(folder: Path) -> Run:
    return curate_small(small_plan(folder, score={"estimate": "embedding"}))


def theirs(plan: Plan, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with the plan's first weights, and an optimizer of theirs."""
    model = Run.of(plan).model()
    return model, torch.optim.SGD(model.parameters(), **SGD | changes)


def batches(plan: Plan, stage: int) -> Iterator[tuple[int, list[str], Tensor, Tensor]]:
    """Steps, keys, pixels and labels, in the order that the plan's own loop takes them."""
    run = Run.of(plan)
    samples, task = read_stage_samples(run, stage), run.task()
    order = BatchSchedule(plan, stage, len(samples))
    for step in range(order.steps):
        rows = order.batch(step)
        tensors = collate(task, samples, rows, "cpu")
        torch.manual_seed(order.seed(step))
        yield step, samples.keys(rows.tolist()), tensors["x"], tensors["y"].long()


def loop(plan: Plan, stage: int, steps: int | None, stop: int | None = None) -> Recording:
    """A plain PyTorch loop, with clipping."""
    model, optimizer = theirs(plan)
    with Recording(plan, stage, model, optimizer, steps=steps) as recording:
        for step, keys, x, y in batches(plan, stage):
            if step < recording.step:
                continue
            if step == stop:
                raise KeyboardInterrupt
            optimizer.zero_grad()
            with recording.batch(keys) as batch:
                losses = functional.cross_entropy(model(x), y, reduction="none")
                batch.losses = losses
                losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return recording


def assert_equal_ledgers(one: Run, other: Run, stage: int) -> None:
    a, b = one.folder.stage(stage).segments(), other.folder.stage(stage).segments()
    assert len(a) == len(b) > 1
    for mine, yours in zip(a, b, strict=True):
        (ledger, first), (again, start) = read_ledger(mine), read_ledger(yours)
        assert (first, ledger.keys()) == (start, again.keys())
        torch.testing.assert_close(
            ledger.pop("weights"), again.pop("weights"), rtol=1e-6, atol=0
        )  # read off, in float32
        for name in ledger:
            assert torch.equal(ledger[name], again[name]), name
        checkpoint, state = read_checkpoint(mine), read_checkpoint(yours)
        for held in (checkpoint, state):
            held.pop("random", None)
        assert checkpoint.keys() == state.keys()
        assert all(torch.equal(checkpoint[name], state[name]) for name in checkpoint)


def test_another_loop_writes_the_same_ledger(ours: Run, folder: Path) -> None:
    """Tensor by tensor, over both stages, with what was kept between them."""
    plan = ours.plan.model_copy(update={"root": f"{folder}/another"})
    pair = theirs(plan)
    before = torch.get_rng_state(), torch.get_num_threads()
    Recording(plan, 0, *pair, steps=21).prepare()
    assert (torch.equal(before[0], torch.get_rng_state()), torch.get_num_threads()) == (
        True,
        before[1],
    )
    for stage, steps in ((0, 21), (1, 10)):
        recording = loop(plan, stage, steps)
        assert recording.run.folder.stage(stage).trained.manifest.facts == {
            "stage": stage, "samples": len(read_stage_samples(ours, stage)), "steps": steps, "segments": -(-steps // 6),
            "by": "outside", "candidates": 0, "chosen": 0,
        }  # fmt: skip
        assert_equal_ledgers(ours, recording.run, stage)
        score_small(recording.run, stage)
        if stage == 0:
            write_pruned_stage.fn(recording.run.url, 0)
            assert read_decisions(recording.run, 0)["keep"].equals(read_decisions(ours, 0)["keep"])
    assert train_stage.fn(recording.run.url, 1).by == "outside"


@pytest.mark.parametrize("stop", [0, 8, 20])
def test_an_interrupted_loop_carries_on_to_the_same_bytes(
    ours: Run, folder: Path, stop: int
) -> None:
    plan = ours.plan.model_copy(update={"root": f"{folder}/stopped{stop}"})
    with pytest.raises(KeyboardInterrupt):
        loop(plan, 0, 21, stop)
    assert len(Run.of(plan).folder.stage(0).segments()) == stop // 6
    recording = loop(plan, 0, 21)
    assert_equal_ledgers(ours, recording.run, 0)
    assert loop(plan, 0, 21, 0).finished  # again: nothing is left to do


def test_automatic_windows_are_settled(folder: Path) -> None:
    stages = [
        {"steps": 12, "batch_size": 20},
        {"steps": 10, "batch_size": 20, "windows": {"auto": "previous"}},
    ]
    plan = small_plan(folder, run="auto", stages=stages)
    run = loop(plan, 0, None).run
    score_small(run, 0)
    settled = loop(plan, 1, None).run.folder.stage(1).windows.manifest.facts["windows"]
    inside = {step for window in settled for step in range(window["start"], window["stop"])}
    ledgers = [read_ledger(segment)[0] for segment in run.folder.stage(1).segments()]
    found = {int(step) for ledger in ledgers for step in ledger["steps"][ledger["windows"] >= 0]}
    assert found == inside
    assert len(inside) < 10


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", ["mean", "sum", "weighted"])
def test_weights_are_read_off_the_graph(folder: Path, parts: int, kind: str) -> None:
    """However the loss is reduced, and over however many blocks, a contribution is its weight times its loss's gradient."""
    basis = {"kind": "coordinates", "numbers": None, "fit_steps": 1}
    plan = small_plan(
        folder,
        run=f"{kind}{parts}",
        dtype="float64",
        basis=basis,
        stages=[{"steps": 1, "batch_size": 20}],
    )
    model, optimizer = theirs(plan)
    model.eval()
    factor = {
        "mean": lambda n: 1 / n,
        "sum": lambda n: 1.0,
        "weighted": lambda n: torch.linspace(0.1, 1, n).double(),
    }[kind]
    with Recording(plan, 0, model, optimizer) as recording:
        _, keys, x, y = next(batches(plan, 0))
        for rows in torch.arange(20).chunk(parts):
            with recording.batch([keys[row] for row in rows]) as batch:
                losses = functional.cross_entropy(
                    model(x[rows].double()), y[rows], reduction="none"
                )
                batch.losses = losses
                ((losses * factor(len(rows))).sum() / parts).backward()
        expected = []
        for row in range(20):
            own = functional.cross_entropy(model(x[row : row + 1].double()), y[row : row + 1])
            expected.append(torch.autograd.grad(own, list(model.parameters())))
        optimizer.step()
    ledger, _ = read_ledger(recording.run.folder.stage(0).segment(0))
    run = recording.run
    project = run.basis(run.bindings(model)).project_tensors
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.stack([project(dict(zip(names, own, strict=True))) for own in expected])
    torch.testing.assert_close(
        ledger["contributions"], ledger["weights"][:, None] * gradients, rtol=1e-9, atol=1e-12
    )
    assert ledger["samples"].tolist() == BatchSchedule(plan, 0, 140).batch(0).tolist()
    each = factor(20 // parts) if kind != "weighted" else factor(20 // parts).repeat(parts)
    torch.testing.assert_close(
        ledger["weights"], torch.ones(20, dtype=torch.float64) * each / parts
    )


def test_a_step_that_a_scaler_skips_is_forgotten(folder: Path) -> None:
    plan = small_plan(folder, run="scaled", stages=[{"steps": 3, "batch_size": 20}])
    model, optimizer = theirs(plan)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with Recording(plan, 0, model, optimizer) as recording:
        for step, keys, x, y in batches(plan, 0):
            optimizer.zero_grad()
            with recording.batch(keys) as batch:
                losses = functional.cross_entropy(model(x), y, reduction="none")
                batch.losses = losses
                scaler.scale(losses.mean()).backward()
            if step == 1:  # an overflow
                next(model.parameters()).grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
    ledger, _ = read_ledger(recording.run.folder.stage(0).segment(0))
    assert recording.run.folder.stage(0).trained.manifest.facts["steps"] == 2
    order = BatchSchedule(plan, 0, 140)
    assert ledger["samples"].tolist() == [*order.batch(0).tolist(), *order.batch(2).tolist()]
    torch.testing.assert_close(
        ledger["weights"], torch.full((40,), 1 / 20, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_another_order_of_the_optimizers_parameters_is_the_same_checkpoint(folder: Path) -> None:
    """Groups that their trainer makes; slots are kept by the plan's numbers, so that our own loop can take them up."""
    plan = small_plan(
        folder, run="groups", stages=[{"steps": 2, "batch_size": 20}] * 2, basis={"kind": "coordinates"},
        optimizer={"kind": "adamw", "lr": 0.01, "at_stage": "carry"}, model={"factory": "tests.tasks.small:network"},
    )  # fmt: skip
    model = Run.of(plan).model()
    weights, biases = (
        [p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("weight", "bias")
    )
    optimizer = torch.optim.AdamW(
        [{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=0.01
    )
    with Recording(plan, 0, model, optimizer) as recording:
        for _, keys, x, y in batches(plan, 0):
            optimizer.zero_grad()
            with recording.batch(keys):
                functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    state = read_checkpoint(recording.run.folder.stage(0).segment(0))
    for number, parameter in enumerate(model.parameters()):
        assert torch.equal(
            state[f"optimizer.{number}.exp_avg"], optimizer.state[parameter]["exp_avg"]
        )
    list_stage_samples.fn(recording.run.url, 1)
    train_stage.fn(recording.run.url, 1)
    again = Run.of(plan).model()
    other = torch.optim.AdamW(list(again.parameters())[::-1], lr=0.01)
    back = Recording(plan, 0, again, other)
    back.prepare()
    back.begin()
    for mine, yours in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(other.state[mine]["exp_avg"], optimizer.state[yours]["exp_avg"])


PRUNED = [{"steps": 3, "batch_size": 20, "prune": {"policy": "loss", "keep": 0.5}}]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"score": {"horizon": "stage", "aggregate": "mean"}}, "scores by replay, and another trainer's steps cannot be run"),
    ({"audit": {"removals": 4}}, "has stage 0 audited, and another trainer's steps cannot be run again"),
    ({"stages": [{"epochs": 1, "batch_size": 20, "windows": [{"select": {"candidates": 2}}]}]}, "selects online"),
    ({"curvature": {"kind": "hessian"}}, "`curvature.kind: hessian` needs more passes"),
    ({"model": {"factory": "tests.tasks.small:network", "args": {"width": 8}}}, r"0\.weight of the trainer's model is \(12, 64\)"),
    ({"dtype": "float64"}, "float32, and in the plan's .* it is .* float64"),
    ({"optimizer": {"kind": "adamw", "lr": 0.1}, "basis": None}, "optimizer is SGD with slots momentum_buffer and the plan's AdamW"),
    ({"optimizer": {"kind": "sgd", "lr": 0.1}}, "SGD with slots momentum_buffer and the plan's SGD with slots none"),
    ({"stages": [{"epochs": 1, "batch_size": 20, "windows": [{"stop": 0.5}]}]}, "windows of stage 0 are fractions"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_at_the_start(
    folder: Path, changes: dict[str, Any], sentence: str
) -> None:
    plan = small_plan(folder, run="refused", root=f"{folder}/{abs(hash(sentence))}", **changes)
    model = network()
    with (
        pytest.raises((PlanError, SecateurError), match=sentence),
        Recording(plan, 0, model, theirs_of(model)),
    ):
        pass
    assert not Run.of(plan).folder.stage(0).start.committed


def theirs_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **SGD)


def test_an_optimizer_that_leaves_a_parameter_out_is_refused(folder: Path) -> None:
    plan, model = small_plan(folder, run="lacking"), network()
    optimizer = torch.optim.SGD(list(model.parameters())[1:], **SGD)
    with (
        pytest.raises(PlanError, match=r"does not train 0\.weight"),
        Recording(plan, 0, model, optimizer, steps=3),
    ):
        pass
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], **SGD)
    with (
        pytest.raises(PlanError, match="parameters that are not the model's"),
        Recording(plan, 0, model, optimizer, steps=3),
    ):
        pass


def one_batch(plan: Plan, keys: list[Any], loss: float | None = None, **settings: Any) -> None:
    """A step of theirs on random pixels."""
    model, optimizer = theirs(plan)
    try:
        with (
            Recording(plan, 0, model, optimizer, **settings) as recording,
            recording.batch(keys) as batch,
        ):
            if loss is not None:
                batch.losses = torch.full((len(keys),), loss)
            model(torch.rand(len(keys), 64)).sum().backward()
    finally:
        optimizer.step()  # no hook is left


@pytest.mark.parametrize(
    ("keys", "loss", "settings", "sentence"),
    [
        (["digit-9999"], 1.0, {}, "sample digit-9999 of step 0 is none of the 140"),
        ([140], 1.0, {}, "sample 140 of step 0 is none of the 140"),
        (["digit-0001"], None, {}, "prunes stage 0 by loss, and step 0 gave none"),
        (
            ["digit-0000", "digit-0001"],
            torch.nan,
            {},
            "the loss of sample digit-0000 is nan at step 0",
        ),
        (["digit-0001"], 1.0, {"steps": 0}, "stage 0 goes on after the 0 steps"),
        (
            ["digit-0001"],
            1.0,
            {},
            r"no step of stage 0 of .* was recorded in a window",
        ),  # no optimizer step
    ],
)
def test_what_goes_wrong_in_the_loop_is_one_sentence(
    folder: Path, keys: list[Any], loss: float | None, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        one_batch(small_plan(folder, run="wrong", stages=PRUNED), keys, loss, **settings)


def test_a_later_stage_needs_the_shards_of_the_one_before(folder: Path) -> None:
    plan = small_plan(folder, run="later")
    with pytest.raises(PlanError, match="needs the shards of stage 0"):
        Recording(plan, 1, *theirs(plan)).prepare()
    through = small_plan(folder, run="through", stages=[{"steps": 2, "batch_size": 20}] * 2)
    recording = Recording(through, 1, *theirs(through))
    recording.prepare()
    with pytest.raises(PlanError, match=r"stage 0 of .* is not wholly trained"):
        recording.begin()


def test_two_loops_do_not_share_a_stage(ours: Run, folder: Path) -> None:
    model, optimizer = theirs(ours.plan)
    with (
        pytest.raises(PlanError, match=r"was begun by another trainer \(secateur\)"),
        Recording(ours.plan, 0, model, optimizer, steps=21),
    ):
        pass


def test_a_race_has_one_winner(folder: Path) -> None:
    plan = small_plan(folder, run="race", stages=[{"steps": 3, "batch_size": 20}], segment_steps=1)
    both = [theirs(plan), theirs(plan)]
    recordings = [Recording(plan, 0, *pair) for pair in both]
    for recording in recordings:
        recording.prepare()
        recording.begin()
    for recording, (model, _) in zip(recordings, both, strict=True):
        with recording.batch(["digit-0001"]):
            model(torch.rand(1, 64)).logsumexp(1).sum().backward()
    both[0][1].step()
    with pytest.raises(PlanError, match="another process has recorded segment 0"):
        both[1][1].step()


def test_a_trainer_that_resumes_by_itself(folder: Path) -> None:
    """It may repeat what is committed, and gets the ledger's state at the first step that is not; it may not be ahead."""
    plan = small_plan(folder, run="resumes", stages=[{"steps": 21, "batch_size": 20}])
    with pytest.raises(KeyboardInterrupt):
        loop(plan, 0, 21, 8)
    model, optimizer = theirs(plan)
    recording = Recording(plan, 0, model, optimizer, steps=21)
    recording.prepare()
    assert [recording.reach(step) for step in (0, 3, 5)] == [False] * 3
    with pytest.raises(
        PlanError, match=r"goes on at step 8 of stage 0, and the ledger of .* ends at step 6"
    ):
        recording.reach(8)
    model[0].weight.data.zero_()
    assert recording.reach(6)
    state = read_checkpoint(recording.run.folder.stage(0).segment(0))
    assert torch.equal(model[0].weight, state["model.0.weight"])
    recording.close()
