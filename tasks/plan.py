"""Room `tasks`: the plan, one YAML file that says everything about a run, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """A part of the plan: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Factory(Strict):
    """A Python object made from an import path and arguments."""

    factory: str = Field(pattern=r"^[\w.]+:\w+$", description="import path, `package.module:name`")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments it is called with")


class TaskSpec(Factory):
    """How a sample becomes tensors and a loss: an object with `collate(samples)` and `losses(model, batch)`."""

    reduction: Literal["mean", "sum", "token_mean"] = Field(
        "mean", description="how a batch's losses become one; `token_mean` weighs samples by the task's `sizes(batch)`"
    )


class Data(Strict):
    """WebDataset shards, local or on S3."""

    shards: str | list[str] = Field(description="paths or URLs, with brace notation: `train-{000000..000003}.tar`")


class ParameterGroup(Strict):
    """Parameters with settings of their own."""

    parameters: list[str] = Field(min_length=1, description="name patterns: `*.bias`")
    lr: PositiveFloat | None = Field(None, description="the optimizer's if null")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="the optimizer's if null")


class OptimizerBase(Strict):
    """What all optimizers have; one serves every stage."""

    lr: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    groups: list[ParameterGroup] = Field(default_factory=list, description="the first that matches a name holds")
    clip_norm: PositiveFloat | None = Field(None, description="largest norm of a step's gradient")
    at_stage: Literal["reset", "carry"] = Field("reset", description="the optimizer's state at a stage boundary")


class SGD(OptimizerBase):
    """Stochastic gradient descent."""

    kind: Literal["sgd"] = "sgd"
    momentum: Share = 0.0
    nesterov: bool = False


class AdamW(OptimizerBase):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class Adam(OptimizerBase):
    """Adam; weight decay is part of the gradient."""

    kind: Literal["adam"] = "adam"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class RMSprop(OptimizerBase):
    """RMSProp."""

    kind: Literal["rmsprop"] = "rmsprop"
    alpha: Share = 0.99
    eps: PositiveFloat = 1e-8
    momentum: Share = 0.0


Optimizer = Annotated[SGD | AdamW | Adam | RMSprop, Field(discriminator="kind")]


class Schedule(Strict):
    """Learning rate over the steps: a linear warm-up, then constant or a cosine to `final`."""

    kind: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the steps spent warming up")
    final: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="last rate of a cosine, as a share of `lr`")
    over: Literal["stage", "run"] = Field("stage", description="what it spans; `run` needs `steps` in every stage")


class Window(Strict):
    """A stretch of a stage in which samples are recorded and judged."""

    start: Annotated[float, Field(ge=0)] = Field(0.0, description="fraction of the stage's steps, or a step")
    stop: Annotated[float, Field(gt=0)] = Field(1.0, description="fraction of the stage's steps, or a step")
    unit: Literal["fraction", "steps"] = "fraction"

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.stop <= self.start:
            raise ValueError(f"the window {self.start} to {self.stop} is empty")
        if self.unit == "fraction" and self.stop > 1:
            raise ValueError(f"the window {self.start} to {self.stop} lies outside its stage (0 to 1)")
        return self


class Top(Strict):
    """Keeps the best-scored fraction."""

    policy: Literal["top"] = "top"
    keep: Fraction


class Threshold(Strict):
    """Keeps samples that score at least so much."""

    policy: Literal["threshold"] = "threshold"
    at_least: float


class DropHarmful(Strict):
    """Drops samples with a negative score."""

    policy: Literal["drop_harmful"] = "drop_harmful"


class Balanced(Strict):
    """Keeps the best-scored fraction of every label or domain."""

    policy: Literal["balanced"] = "balanced"
    keep: Fraction
    by: str = Field(description="a member of the sample (`cls`), or a field of a JSON member (`json:domain`)")


class RandomControl(Strict):
    """Control: keeps a random fraction."""

    policy: Literal["random"] = "random"
    keep: Fraction


class LossControl(Strict):
    """Control: keeps the fraction of lowest loss."""

    policy: Literal["loss"] = "loss"
    keep: Fraction


Policy = Annotated[
    Top | Threshold | DropHarmful | Balanced | RandomControl | LossControl, Field(discriminator="policy")
]


class Stage(Strict):
    """A stretch of training on one set of shards, and how they are pruned for the next one."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    batch_size: PositiveInt
    accumulate: PositiveInt = Field(1, description="micro-batches a step; `batch_size` is their sum")
    windows: list[Window] = Field(default_factory=lambda: [Window()], min_length=1)
    stride: PositiveInt = Field(1, description="outside windows, record every n-th step for the curvature")
    prune: Policy | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a stage has either `epochs` or `steps`")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}")
        return self


class Kronecker(Strict):
    """`P_out^T C P_in` a block: `rank` numbers squared."""

    kind: Literal["kronecker"] = "kronecker"
    method: Literal["pca", "random"] = "pca"
    rank: PositiveInt = 16
    fit_steps: PositiveInt = Field(10, description="steps the basis is fitted on, then rewound")


class Coordinates(Strict):
    """The entries of most energy, as many of each block."""

    kind: Literal["coordinates"] = "coordinates"
    numbers: PositiveInt | None = Field(2048, description="over all blocks; null for every parameter")
    fit_steps: PositiveInt = Field(10, description="steps the basis is fitted on, then rewound")


class CurvatureBase(Strict):
    """How the gradient answers a change of the parameters."""

    coupling: Literal["block", "full"] = Field("block", description="whether blocks answer one another")


class EmpiricalFisher(CurvatureBase):
    """From the recorded contributions; nothing more is computed."""

    kind: Literal["empirical_fisher"] = "empirical_fisher"


class Fisher(CurvatureBase):
    """From labels drawn from the model, one more pass a recorded step; the task needs `sampled(model, batch)`."""

    kind: Literal["fisher"] = "fisher"


class Hessian(CurvatureBase):
    """Exact in the basis, by Hessian-vector products."""

    kind: Literal["hessian"] = "hessian"
    every: PositiveInt = Field(20, description="steps that one evaluation stands for")
    samples: PositiveInt = Field(512, description="at most so many of those steps' samples, evenly taken")


class NoCurvature(CurvatureBase):
    """The gradient does not answer."""

    kind: Literal["none"] = "none"


Curvature = Annotated[EmpiricalFisher | Fisher | Hessian | NoCurvature, Field(discriminator="kind")]


class Score(Strict):
    """What a pruning policy reads (DESIGN, section 4)."""

    target: str | None = Field(None, description="the target pruned for; the first one if null")
    horizon: NonNegativeInt | Literal["stage"] = Field(
        0, description="steps after its use at which a sample's effect is read: 0 for the contribution itself"
    )
    aggregate: Literal["mean", "nearest"] = "nearest"
    estimate: Literal["embedding", "replay"] | None = Field(
        None,
        description="`replay` runs training backwards for each target: no basis, no approximate curvature; null for replay "
        "where it can answer (`horizon: stage, aggregate: mean`), and embedding elsewhere",
    )
    nearest: PositiveInt = Field(10, description="target samples each sample is compared with, for `nearest`")


class Replay(Strict):
    """How training is run backwards (`score.estimate: replay`, and audits)."""

    method: Literal["central", "jvp"] = Field(
        "central", description="central differences, for any kernel; or forward mode, exact, where kernels have one"
    )


class Audit(Strict):
    """True leave-one-out retraining of a few samples, to say how far scores can be trusted."""

    removals: Annotated[int, Field(ge=4)] = Field(32, description="samples left out, one at a time")
    stages: list[NonNegativeInt] | None = Field(None, description="the stages audited; all if null")
    budget: PositiveFloat = Field(50.0, description="what an audit may cost, in trainings of its stage")


class Trial(Strict):
    """A short training on what a policy keeps, against as many samples at random."""

    steps: PositiveInt = Field(50, description="steps of each, from the stage's checkpoint")
    draws: PositiveInt = Field(3, description="random choices it is held against")


class Trust(Strict):
    """What must hold before a stage is pruned."""

    min_fidelity: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="least Spearman correlation of the scores with an audit"
    )
    trial: Trial | None = None
    otherwise: Literal["keep_all", "fail"] = Field("keep_all", description="what happens where it does not hold")


class Plan(Strict):
    """A whole run."""

    run: str = Field(pattern=r"^[\w.-]+$", description="the run's name, a folder under `root`")
    root: str = Field("runs", description="path or URL of the folder that holds runs")
    seed: NonNegativeInt = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    threads: PositiveInt | None = Field(None, description="torch's CPU threads; all cores if null")
    model: Factory
    task: TaskSpec
    data: Data
    targets: dict[Annotated[str, Field(pattern=r"^\w+$")], Data] = Field(min_length=1)
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    stages: list[Stage] = Field(min_length=1)
    segment_steps: PositiveInt = Field(50, description="steps between checkpoints, and a ledger file each")
    basis: Annotated[Kronecker | Coordinates, Field(discriminator="kind")] | None = Field(
        None, description="null for the optimizer's own: kronecker for sgd, coordinates for the others"
    )
    uncaptured: list[str] = Field(default_factory=list, description="parameters left out, as name patterns")
    curvature: Curvature = EmpiricalFisher()
    score: Score = Score()
    replay: Replay = Replay()
    audit: Audit | None = None
    trust: Trust = Trust()
    components: PositiveInt | None = Field(
        None,
        description="principal components that a stage's embeddings are reduced to before they are kept; all if null",
    )
    index: Literal["flat", "fp16", "sq8"] = "flat"

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if self.score.target is not None and self.score.target not in self.targets:
            raise ValueError(f"score.target {self.score.target} is none of the targets {', '.join(self.targets)}")
        if isinstance(self.basis, Kronecker) and not isinstance(self.optimizer, SGD):
            raise ValueError(
                f"a kronecker basis cannot follow {self.optimizer.kind}, which treats every parameter by its own history; "
                f"set `basis: {{kind: coordinates}}`"
            )
        if self.schedule.over == "run" and any(stage.steps is None for stage in self.stages):
            raise ValueError(
                "a schedule over the run needs `steps` in every stage, for epochs shrink as data is pruned"
            )
        return self

    @model_validator(mode="after")
    def _answerable(self) -> Plan:
        tsloo = _is_effect(self.score)
        if self.score.estimate == "replay" and not tsloo:
            raise ValueError(
                "`score.estimate: replay` gives effects on a target's mean loss at the stage's end; set `horizon: stage, "
                "aggregate: mean` beside it"
            )
        if self.trust.min_fidelity is not None and not tsloo:
            raise ValueError(
                "`trust.min_fidelity` holds scores against retraining without a sample, which only `horizon: stage, "
                "aggregate: mean` estimate; use `trust.trial` for other scores"
            )
        for stage in (self.audit and self.audit.stages) or []:
            if stage >= len(self.stages):
                raise ValueError(f"audit.stages names stage {stage}; the last is {len(self.stages) - 1}")
        return self

    @property
    def numbers(self) -> Kronecker | Coordinates:
        """The basis: the plan's, or the optimizer's own."""
        return self.basis or (Kronecker() if isinstance(self.optimizer, SGD) else Coordinates())

    @property
    def estimate(self) -> Literal["embedding", "replay"]:
        """What scores are estimated by: the plan's choice, or replay where it can answer."""
        return self.score.estimate or ("replay" if _is_effect(self.score) else "embedding")

    @property
    def target(self) -> str:
        """The target pruned for."""
        return self.score.target or next(iter(self.targets))


def _is_effect(score: Score) -> bool:
    """Whether scores are effects on a target's mean loss at the stage's end, which replay and audits measure."""
    return score.horizon == "stage" and score.aggregate == "mean"
