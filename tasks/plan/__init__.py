"""Room `tasks.plan`: the plan, one YAML file that says everything about a run, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from secateur.tasks.plan.base import (
    Config,
    DataConfig,
    FactoryConfig,
    TargetConfig,
    TaskConfig,
    without_credentials,
)
from secateur.tasks.plan.bases import (
    CoordinateBasisConfig,
    CurvatureConfig,
    EmpiricalFisherConfig,
    FisherConfig,
    HessianConfig,
    KroneckerBasisConfig,
    NoCurvatureConfig,
)
from secateur.tasks.plan.optimizers import (
    AdamConfig,
    AdamWConfig,
    OptimizerConfig,
    ParameterGroupConfig,
    RMSpropConfig,
    ScheduleConfig,
    SGDConfig,
)
from secateur.tasks.plan.scores import (
    AuditConfig,
    ReplayConfig,
    ScoreConfig,
    TrialConfig,
    TrustConfig,
    is_effect,
)
from secateur.tasks.plan.stages import (
    POLICY_NAMES,
    PREVIOUS,
    AutoWindowsConfig,
    BalancedPolicy,
    BaselinePolicy,
    DropHarmfulPolicy,
    EL2NPolicy,
    GraNdPolicy,
    LossPolicy,
    Policy,
    RandomPolicy,
    SelectionConfig,
    StageConfig,
    ThresholdPolicy,
    TopPolicy,
    TracInPolicy,
    WindowConfig,
)
from secateur.tasks.plan.workers import WorkersConfig

__all__ = [
    "POLICY_NAMES",
    "PREVIOUS",
    "AdamConfig",
    "AdamWConfig",
    "AuditConfig",
    "AutoWindowsConfig",
    "BalancedPolicy",
    "BaselinePolicy",
    "Config",
    "CoordinateBasisConfig",
    "CurvatureConfig",
    "DataConfig",
    "DropHarmfulPolicy",
    "EL2NPolicy",
    "EmpiricalFisherConfig",
    "FactoryConfig",
    "FisherConfig",
    "GraNdPolicy",
    "HessianConfig",
    "KroneckerBasisConfig",
    "LossPolicy",
    "NoCurvatureConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "Policy",
    "RMSpropConfig",
    "RandomPolicy",
    "ReplayConfig",
    "SGDConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "SelectionConfig",
    "StageConfig",
    "TargetConfig",
    "TaskConfig",
    "ThresholdPolicy",
    "TopPolicy",
    "TracInPolicy",
    "TrialConfig",
    "TrustConfig",
    "WindowConfig",
    "WorkersConfig",
    "is_effect",
]


class Plan(Config):
    """A whole run."""

    run: str = Field(pattern=r"^\w[\w.-]*$", description="the run's name, a folder under `root`")
    root: str = Field("runs", description="path or URL of the folder that holds runs")
    seed: NonNegativeInt = Field(
        0, description="of the initial weights, the order of samples and every draw"
    )
    device: str = Field("cpu", description="torch's name of it: `cpu`, `cuda:0`")
    dtype: Literal["float32", "float64"] = Field(
        "float32", description="of parameters, contributions and embeddings"
    )
    threads: PositiveInt | None = Field(None, description="torch's CPU threads; all cores if null")
    model: FactoryConfig
    task: TaskConfig
    data: DataConfig
    targets: dict[Annotated[str, Field(pattern=r"^\w+$")], TargetConfig] = Field(
        min_length=1,
        description="what the data should be good for: validation sets by name, each with its `shards`",
    )
    optimizer: OptimizerConfig = Field(
        description="`kind` (sgd, adam, adamw or rmsprop), `lr`, and torch's own settings of it"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    stages: list[StageConfig] = Field(
        min_length=1, description="one after the other; each but the first trains on what is kept"
    )
    segment_steps: PositiveInt = Field(
        50, description="steps between checkpoints, and a ledger file each"
    )
    basis: (
        Annotated[KroneckerBasisConfig | CoordinateBasisConfig, Field(discriminator="kind")] | None
    ) = Field(
        None,
        description="null for the optimizer's own: kronecker for sgd, coordinates for the others",
    )
    uncaptured: list[str] = Field(
        default_factory=list, description="parameters left out, as name patterns"
    )
    curvature: CurvatureConfig = EmpiricalFisherConfig()
    score: ScoreConfig = ScoreConfig()
    replay: ReplayConfig = ReplayConfig()
    audit: AuditConfig | None = None
    trust: TrustConfig = TrustConfig()
    components: PositiveInt | None = Field(
        None,
        description="principal components that a stage's embeddings are reduced to before they are kept; all if null",
    )
    commits: Literal["conditional", "last_writer_wins"] = Field(
        "conditional",
        description="`last_writer_wins` allows a store that ignores conditional puts, at the risk that of two processes "
        "which run the same stage at once either replaces what the other committed",
    )
    index: Literal["flat", "fp16", "sq8"] = Field(
        "flat", description="how FAISS keeps embeddings: as they are, or smaller"
    )
    workers: WorkersConfig = Field(
        WorkersConfig(),
        description="who does it; a run may be started with some workers and resumed with others",
    )

    @field_validator("root")
    @classmethod
    def _without_credentials(cls, url: str) -> str:
        return without_credentials(url)

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if self.score.target is not None and self.score.target not in self.targets:
            raise ValueError(
                f"score.target {self.score.target} is none of the targets {', '.join(self.targets)}"
            )
        for asked in (select.target for stage in self.stages for select in stage.selections):
            if asked is not None and asked not in self.targets:
                raise ValueError(
                    f"a window's select.target {asked} is none of the targets {', '.join(self.targets)}"
                )
        if isinstance(self.basis, KroneckerBasisConfig) and not isinstance(
            self.optimizer, SGDConfig
        ):
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
    def _windows_known(self) -> Plan:
        for number, stage in enumerate(self.stages):
            if (
                isinstance(stage.windows, AutoWindowsConfig)
                and stage.windows.auto == PREVIOUS
                and self.profiled_before(number) < 0
            ):
                raise ValueError(
                    f"stage {number} takes its windows from the stage before it, and no stage before it is recorded whole; give "
                    f"one of them windows over all its steps, or name an earlier run: `windows: {{auto: <run>}}`"
                )
        return self

    @model_validator(mode="after")
    def _answerable(self) -> Plan:
        tsloo = is_effect(self.score)
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
        if self.trust.trial and not self.judging(self.target):
            raise ValueError(
                f"`trust.trial` needs samples that judge and do not score; set `judging: 0.5` on target {self.target}"
            )
        for stage in (self.audit and self.audit.stages) or []:
            if stage >= len(self.stages):
                raise ValueError(
                    f"audit.stages names stage {stage}; the last is {len(self.stages) - 1}"
                )
        return self

    def profiled_before(self, number: int) -> int:
        """The nearest stage before one that is recorded whole, so that its profile can show phases; -1 if there is none."""
        return next((n for n in reversed(range(number)) if self.stages[n].is_recorded_whole), -1)

    @property
    def numbers(self) -> KroneckerBasisConfig | CoordinateBasisConfig:
        """The basis: the plan's, or the optimizer's own."""
        return self.basis or (
            KroneckerBasisConfig()
            if isinstance(self.optimizer, SGDConfig)
            else CoordinateBasisConfig()
        )

    @property
    def estimate(self) -> Literal["embedding", "replay"]:
        """What scores are estimated by: the plan's choice, or replay where it can answer."""
        return self.score.estimate or ("replay" if is_effect(self.score) else "embedding")

    @property
    def target(self) -> str:
        """The target pruned for."""
        return self.score.target or next(iter(self.targets))

    def judging(self, target: str) -> float:
        """Share of a target's samples that judge and never score."""
        share = self.targets[target].judging
        return (
            (0.5 if self.trust.trial and target == self.target else 0.0) if share is None else share
        )
