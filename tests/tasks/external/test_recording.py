"""Recording another training loop: the same ledger, resuming, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import PlanError, SecateurError
from secateur.flows.trainers import Recording
from secateur.storage.ledger import CHECKPOINT, read_checkpoint, read_ledger
from secateur.tasks.data.batches import BatchSchedule
from secateur.tasks.data.collate import collate
from secateur.tasks.data.samples import list_stage_samples, read_stage_samples
from secateur.tasks.plan import CheckpointsConfig, Plan
from secateur.tasks.pruning.prune import write_pruned_stage
from secateur.tasks.results.pruning_results import read_decisions
from secateur.tasks.run import Run
from secateur.tasks.training.train import train_stage
from tests.tasks.digits import network
from tests.tasks.small import curate_small, make_data, score_small, small_plan

SGD: dict[str, Any] = {"lr": 0.2, "momentum": 0.5, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def own_run(folder: Path) -> Run:
    """The run that `secateur run` makes of the plan."""
    return curate_small(small_plan(folder, score={"estimate": "embedding"}))


def make_trainer(plan: Plan, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A trainer's model, with the plan's initial weights, and its optimizer."""
    model = Run.of_plan(plan).model()
    return model, torch.optim.SGD(model.parameters(), **SGD | changes)


def batches(plan: Plan, stage: int) -> Iterator[tuple[int, list[str], Tensor, Tensor]]:
    """Steps, keys, pixels and labels, in the order that the plan's own loop takes them."""
    run = Run.of_plan(plan)
    samples = read_stage_samples(run, stage)
    task = run.task()
    schedule = BatchSchedule(plan, stage, len(samples))
    for step in range(schedule.steps):
        rows = schedule.batch(step)
        tensors = collate(task, samples, rows, "cpu")
        torch.manual_seed(schedule.seed(step))
        yield step, samples.keys(rows.tolist()), tensors["x"], tensors["y"].long()


def train(plan: Plan, stage: int, steps: int | None, stop: int | None = None) -> Recording:
    """Record a plain PyTorch loop with clipping.

    Args:
        stop: the step at which it is interrupted.
    """
    model, optimizer = make_trainer(plan)
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
    """Check that two runs have the same ledgers and checkpoints of a stage, tensor by tensor."""
    segments = one.folder.stage(stage).segments()
    other_segments = other.folder.stage(stage).segments()
    assert len(segments) == len(other_segments) > 1
    for a, b in zip(segments, other_segments, strict=True):
        ledger, first = read_ledger(a)
        other_ledger, other_first = read_ledger(b)
        assert (first, ledger.keys()) == (other_first, other_ledger.keys())
        # A recording reads weights from the graph, in float32.
        weights = ledger.pop("weights")
        torch.testing.assert_close(weights, other_ledger.pop("weights"), rtol=1e-6, atol=0)
        for name in ledger:
            # The settings of a step that a GradScaler skipped are not numbers.
            assert torch.allclose(ledger[name], other_ledger[name], 0, 0, equal_nan=True), name
        checkpoint = read_checkpoint(a)
        other_checkpoint = read_checkpoint(b)
        checkpoint.pop("random", None)
        other_checkpoint.pop("random", None)
        assert checkpoint.keys() == other_checkpoint.keys()
        assert all(torch.equal(checkpoint[name], other_checkpoint[name]) for name in checkpoint)


def test_another_loop_writes_the_same_ledger(own_run: Run, folder: Path) -> None:
    """Over both stages, and with the same samples kept between them."""
    plan = own_run.plan.model_copy(update={"root": f"{folder}/another"})
    trainer = make_trainer(plan)
    rng_state = torch.get_rng_state()
    threads = torch.get_num_threads()
    Recording(plan, 0, *trainer, steps=21).prepare()
    assert torch.equal(rng_state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    for stage, steps in ((0, 21), (1, 10)):
        recording = train(plan, stage, steps)
        assert recording.run.folder.stage(stage).trained.manifest.facts == {
            "stage": stage,
            "samples": len(read_stage_samples(own_run, stage)),
            "steps": steps,
            "segments": -(-steps // 6),
            "by": "outside",
            "candidates": 0,
            "chosen": 0,
        }
        assert_equal_ledgers(own_run, recording.run, stage)
        score_small(recording.run, stage)
        if stage == 0:
            write_pruned_stage(recording.run, 0)
            assert read_decisions(recording.run, 0)["keep"].equals(
                read_decisions(own_run, 0)["keep"]
            )
    assert train_stage(recording.run, 1).by == "outside"


@pytest.mark.parametrize("stop", [0, 8, 20])
def test_an_interrupted_loop_continues_to_the_same_bytes(
    own_run: Run, folder: Path, stop: int
) -> None:
    plan = own_run.plan.model_copy(update={"root": f"{folder}/stopped{stop}"})
    with pytest.raises(KeyboardInterrupt):
        train(plan, 0, 21, stop)
    assert len(Run.of_plan(plan).folder.stage(0).segments()) == stop // 6
    recording = train(plan, 0, 21)
    assert_equal_ledgers(own_run, recording.run, 0)
    assert train(plan, 0, 21, 0).finished  # the stage is trained, so no step is left


def test_a_loop_continues_without_the_checkpoints_that_the_plan_does_not_keep(
    own_run: Run, folder: Path
) -> None:
    changes = {"root": f"{folder}/ends", "checkpoints": CheckpointsConfig(keep="stage_ends")}
    plan = own_run.plan.model_copy(update=changes)
    stage = Run.of_plan(plan).folder.stage(0)
    with pytest.raises(KeyboardInterrupt):
        train(plan, 0, 21, 14)
    assert [segment.is_removed(CHECKPOINT) for segment in stage.segments()] == [True, False]
    train(plan, 0, 21)
    assert [segment.is_removed(CHECKPOINT) for segment in stage.segments()] == [True] * 3 + [False]
    last, own_last = (read_checkpoint(run.segment(3)) for run in (stage, own_run.folder.stage(0)))
    assert all(torch.equal(last[name], tensor) for name, tensor in own_last.items())


def test_automatic_windows_are_frozen(folder: Path) -> None:
    stages = [
        {"steps": 12, "batch_size": 20},
        {"steps": 10, "batch_size": 20, "windows": {"auto": "previous"}},
    ]
    plan = small_plan(folder, run="auto", stages=stages)
    run = train(plan, 0, None).run
    score_small(run, 0)
    windows = train(plan, 1, None).run.folder.stage(1).windows.manifest.facts["windows"]
    inside = {step for window in windows for step in range(window["start"], window["stop"])}
    ledgers = [read_ledger(segment)[0] for segment in run.folder.stage(1).segments()]
    found = {int(step) for ledger in ledgers for step in ledger["steps"][ledger["windows"] >= 0]}
    assert found == inside
    assert len(inside) < 10


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", ["mean", "sum", "weighted"])
def test_weights_are_read_from_the_graph(folder: Path, parts: int, kind: str) -> None:
    """A contribution is the sample's weight times its loss's gradient, for any reduction."""
    basis = {"kind": "coordinates", "numbers": None, "fit_steps": 1}
    plan = small_plan(
        folder,
        run=f"{kind}{parts}",
        dtype="float64",
        basis=basis,
        stages=[{"steps": 1, "batch_size": 20}],
    )
    model, optimizer = make_trainer(plan)
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


def test_a_step_that_a_scaler_skips_is_not_recorded(folder: Path) -> None:
    plan = small_plan(folder, run="scaled", stages=[{"steps": 3, "batch_size": 20}])
    model, optimizer = make_trainer(plan)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with Recording(plan, 0, model, optimizer) as recording:
        for step, keys, x, y in batches(plan, 0):
            optimizer.zero_grad()
            with recording.batch(keys) as batch:
                losses = functional.cross_entropy(model(x), y, reduction="none")
                batch.losses = losses
                scaler.scale(losses.mean()).backward()
            if step == 1:  # as after an overflow
                weight = next(model.parameters())
                weight.grad = torch.full_like(weight, torch.inf)
            scaler.step(optimizer)
            scaler.update()
    ledger, _ = read_ledger(recording.run.folder.stage(0).segment(0))
    assert recording.run.folder.stage(0).trained.manifest.facts["steps"] == 2
    schedule = BatchSchedule(plan, 0, 140)
    assert ledger["samples"].tolist() == [*schedule.batch(0).tolist(), *schedule.batch(2).tolist()]
    torch.testing.assert_close(
        ledger["weights"], torch.full((40,), 1 / 20, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_the_optimizers_parameter_order_does_not_change_the_checkpoint(folder: Path) -> None:
    """Checkpoints number the slots as the plan does, so `secateur run` can continue from them."""
    plan = small_plan(
        folder,
        run="groups",
        stages=[{"steps": 2, "batch_size": 20}] * 2,
        basis={"kind": "coordinates"},
        optimizer={"kind": "adamw", "lr": 0.01, "at_stage": "carry"},
        model={"factory": "tests.tasks.digits:network"},
    )
    model = Run.of_plan(plan).model()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups: list[dict[str, Any]] = [{"params": biases, "weight_decay": 0.0}, {"params": weights}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
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
    list_stage_samples(recording.run, 1)
    train_stage(recording.run, 1)
    other_model = Run.of_plan(plan).model()
    other_optimizer = torch.optim.AdamW(list(other_model.parameters())[::-1], lr=0.01)
    other_recording = Recording(plan, 0, other_model, other_optimizer)
    other_recording.prepare()
    other_recording.begin()
    for a, b in zip(other_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(other_optimizer.state[a]["exp_avg"], optimizer.state[b]["exp_avg"])


PRUNED = [{"steps": 3, "batch_size": 20, "prune": {"policy": "loss", "keep": 0.5}}]
SELECTING = {"epochs": 1, "batch_size": 20, "windows": [{"select": {"candidates": 2}}]}
WIDE = {"factory": "tests.tasks.digits:network", "args": {"width": 8}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"score": {"horizon": "stage", "aggregate": "mean"}},
        "scores by replay, and another trainer's steps cannot be repeated",
    ),
    (
        {"audit": {"removals": 4}},
        "has stage 0 audited, and another trainer's steps cannot be repeated",
    ),
    (
        {"trust": {"questions": 2}},
        "compares answers with replay, and another trainer's steps cannot be repeated",
    ),
    ({"stages": [SELECTING]}, "selects online"),
    ({"curvature": {"kind": "hessian"}}, "`curvature.kind: hessian` needs more passes"),
    ({"model": WIDE}, r"0\.weight of the trainer's model is \(12, 64\)"),
    ({"dtype": "float64"}, "float32, and in the plan's .* it is .* float64"),
    (
        {"optimizer": {"kind": "adamw", "lr": 0.1}, "basis": None},
        "optimizer is SGD with slots momentum_buffer and the plan's AdamW with slots exp_avg",
    ),
    (
        {"optimizer": {"kind": "sgd", "lr": 0.1}},
        "SGD with slots momentum_buffer and the plan's SGD with slots none",
    ),
    (
        {"stages": [{"epochs": 1, "batch_size": 20, "windows": [{"stop": 0.5}]}]},
        "windows of stage 0 are fractions",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_a_plan_that_cannot_be_recorded_is_refused_at_the_start(
    folder: Path, changes: dict[str, Any], sentence: str
) -> None:
    plan = small_plan(folder, run="refused", root=f"{folder}/{abs(hash(sentence))}", **changes)
    model = network()
    with (
        pytest.raises((PlanError, SecateurError), match=sentence),
        Recording(plan, 0, model, make_optimizer(model)),
    ):
        pass
    assert not Run.of_plan(plan).folder.stage(0).start.committed


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **SGD)


def test_an_optimizer_over_other_parameters_is_refused(folder: Path) -> None:
    plan = small_plan(folder, run="lacking")
    model = network()
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


def record_batch(plan: Plan, keys: list[Any], loss: float | None = None, **settings: Any) -> None:
    """Record one batch of random pixels, and then take a step outside the recording."""
    model, optimizer = make_trainer(plan)
    try:
        with (
            Recording(plan, 0, model, optimizer, **settings) as recording,
            recording.batch(keys) as batch,
        ):
            if loss is not None:
                batch.losses = torch.full((len(keys),), loss)
            model(torch.rand(len(keys), 64)).sum().backward()
    finally:
        optimizer.step()  # works, because the recording has removed its hooks


@pytest.mark.parametrize(
    ("keys", "loss", "settings", "sentence"),
    [
        (["digit-9999"], 1.0, {}, "sample digit-9999 of step 0 is none of the 140"),
        ([140], 1.0, {}, "sample 140 of step 0 is none of the 140"),
        (["digit-0001"], None, {}, "prunes stage 0 by loss, and step 0 gave no losses"),
        (
            ["digit-0000", "digit-0001"],
            torch.nan,
            {},
            "the loss of sample digit-0000 is nan at step 0",
        ),
        (["digit-0001"], 1.0, {"steps": 0}, "stage 0 continues after the 0 steps"),
        (
            ["digit-0001"],
            1.0,
            {},
            r"no step of stage 0 of .* was recorded in a window",
        ),  # the optimizer takes no step within the recording
    ],
)
def test_a_mistake_in_the_loop_is_one_sentence(
    folder: Path, keys: list[Any], loss: float | None, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence):
        record_batch(small_plan(folder, run="wrong", stages=PRUNED), keys, loss, **settings)


def test_a_later_stage_needs_the_shards_of_the_one_before(folder: Path) -> None:
    plan = small_plan(folder, run="later")
    with pytest.raises(PlanError, match="needs the shards of stage 0"):
        Recording(plan, 1, *make_trainer(plan)).prepare()
    through = small_plan(folder, run="through", stages=[{"steps": 2, "batch_size": 20}] * 2)
    recording = Recording(through, 1, *make_trainer(through))
    recording.prepare()
    with pytest.raises(PlanError, match=r"stage 0 of .* is not trained to its end"):
        recording.begin()


def test_two_loops_do_not_share_a_stage(own_run: Run, folder: Path) -> None:
    model, optimizer = make_trainer(own_run.plan)
    with (
        pytest.raises(PlanError, match=r"was begun by another trainer \(secateur\)"),
        Recording(own_run.plan, 0, model, optimizer, steps=21),
    ):
        pass


def test_of_two_recordings_of_one_stage_one_wins(folder: Path) -> None:
    plan = small_plan(folder, run="race", stages=[{"steps": 3, "batch_size": 20}], segment_steps=1)
    trainers = [make_trainer(plan), make_trainer(plan)]
    recordings = [Recording(plan, 0, *trainer) for trainer in trainers]
    for recording in recordings:
        recording.prepare()
        recording.begin()
    for recording, (model, _) in zip(recordings, trainers, strict=True):
        with recording.batch(["digit-0001"]):
            model(torch.rand(1, 64)).logsumexp(1).sum().backward()
    trainers[0][1].step()
    with pytest.raises(PlanError, match="another process has recorded segment 0"):
        trainers[1][1].step()


def test_a_trainer_may_resume_from_its_own_checkpoint(folder: Path) -> None:
    """It may repeat steps that are committed, and must not be ahead of the ledger.

    At the first step that is not committed, it gets the ledger's state.
    """
    plan = small_plan(folder, run="resumes", stages=[{"steps": 21, "batch_size": 20}])
    with pytest.raises(KeyboardInterrupt):
        train(plan, 0, 21, 8)
    model, optimizer = make_trainer(plan)
    recording = Recording(plan, 0, model, optimizer, steps=21)
    recording.prepare()
    assert [recording.reach(step) for step in (0, 3, 5)] == [False] * 3
    with pytest.raises(
        PlanError, match=r"continues at step 8 of stage 0, and the ledger of .* ends at step 6"
    ):
        recording.reach(8)
    weight = model.get_parameter("0.weight")
    weight.data.zero_()
    assert recording.reach(6)
    state = read_checkpoint(recording.run.folder.stage(0).segment(0))
    assert torch.equal(weight, state["model.0.weight"])
    recording.close()
