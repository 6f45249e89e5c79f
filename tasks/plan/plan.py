"""The plan: one YAML file that says everything about a run, as a pydantic model."""

from __future__ import annotations

import importlib
from typing import Annotated, Literal

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, field_validator, model_validator

from secateur.storage.urls import check_url
from secateur.tasks.plan.base import Config
from secateur.tasks.plan.basis_config import CoordinateBasisConfig, KroneckerBasisConfig
from secateur.tasks.plan.checkpoints_config import CheckpointsConfig
from secateur.tasks.plan.curvature_config import CURVATURES, CurvatureConfig
from secateur.tasks.plan.inputs_config import DataConfig, FactoryConfig, TargetConfig, TaskConfig
from secateur.tasks.plan.launch_config import LaunchConfig
from secateur.tasks.plan.optimizer_config import OPTIMIZERS, OptimizerConfig, ScheduleConfig
from secateur.tasks.plan.score_config import AuditConfig, ReplayConfig, ScoreConfig, TrustConfig
from secateur.tasks.plan.stage_config import PREVIOUS, SelectionConfig, StageConfig
from secateur.tasks.plan.workers_config import WorkersConfig

DEFAULT_CURVATURE: dict[str, JsonValue] = {"kind": "empirical_fisher"}


class Plan(Config):
    """A whole run."""

    # First, because a plug-in must be imported before the settings that it registers are read.
    plugins: list[str] = Field(
        default_factory=list,
        description="modules to import first; they register policies, curvatures, optimizers or "
        "layers",
    )
    run: str = Field(pattern=r"^\w[\w.-]*$", description="the run's name, a folder under `root`")
    root: str = Field("runs", description="path or URL of the folder that holds runs")
    seed: NonNegativeInt = Field(
        0, description="of the initial weights, the order of samples and every random draw"
    )
    device: str = Field("cpu", description="torch's name of the device: `cpu`, `cuda:0`")
    dtype: Literal["float32", "float64", "bfloat16"] = Field(
        "float32",
        description="of parameters; contributions and embeddings too, but in float32 if bfloat16",
    )
    autocast: Literal["bfloat16"] | None = Field(
        None, description="precision in which the model computes, by torch's autocast"
    )
    threads: PositiveInt | None = Field(None, description="torch's CPU threads; all cores if null")
    pass_memory: PositiveInt = Field(
        1024,
        description="MiB that a pass over target samples may take; it decides how many samples "
        "pass through the model at a time",
    )
    model: FactoryConfig
    task: TaskConfig
    data: DataConfig
    targets: dict[Annotated[str, Field(pattern=r"^\w+$")], TargetConfig] = Field(
        min_length=1,
        description="validation sets by name, each with its `shards`: what the training data "
        "should be good for",
    )
    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = Field(
        description="`kind` (sgd, adam, adamw, nadam, radam, adagrad or rmsprop), `lr`, and "
        "torch's own settings of it"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    stages: list[StageConfig] = Field(
        min_length=1,
        description="one after the other; each trains on the samples that the one before kept",
    )
    segment_steps: PositiveInt = Field(
        50, description="steps between checkpoints; each segment has one ledger file"
    )
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    basis: (
        Annotated[KroneckerBasisConfig | CoordinateBasisConfig, Field(discriminator="kind")] | None
    ) = Field(None, description="null means kronecker for sgd, coordinates for other optimizers")
    uncaptured: list[str] = Field(
        default_factory=list, description="parameters that are left out, as name patterns"
    )
    curvature: Annotated[CurvatureConfig, CURVATURES] = Field(
        default_factory=lambda: CURVATURES.parse(DEFAULT_CURVATURE),
        json_schema_extra={"default": DEFAULT_CURVATURE},
    )
    score: ScoreConfig = ScoreConfig()
    replay: ReplayConfig = ReplayConfig()
    audit: AuditConfig | None = None
    trust: TrustConfig = TrustConfig()
    components: PositiveInt | None = Field(
        None,
        description="embeddings have at most so many numbers: if the basis has more, they are "
        "reduced to the directions in which samples' gradients vary most; null means one number "
        "per coefficient",
    )
    commits: Literal["conditional", "last_writer_wins"] = Field(
        "conditional",
        description="`last_writer_wins` allows a store that ignores conditional puts. If two "
        "processes then run the same stage, either may replace what the other committed",
    )
    index: Literal["flat", "fp16", "sq8"] = Field(
        "flat", description="how FAISS stores embeddings: unchanged, or smaller"
    )
    launch: LaunchConfig = Field(
        LaunchConfig(),
        description="the processes that train together; a run may be resumed with others",
    )
    workers: WorkersConfig = Field(
        WorkersConfig(),
        description="what does the work; a run may be resumed with other workers",
    )

    @field_validator("plugins")
    @classmethod
    def _import_plugins(cls, modules: list[str]) -> list[str]:
        for name in modules:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ValueError(
                    f"the plug-in {name} cannot be imported ({error}); run from the folder that "
                    f"holds it, or install it"
                ) from error
        return modules

    @field_validator("root")
    @classmethod
    def _refuse_credentials(cls, url: str) -> str:
        check_url(url)
        return url

    @model_validator(mode="after")
    def _check_targets(self) -> Plan:
        known = ", ".join(self.targets)
        if self.score.target is not None and self.score.target not in self.targets:
            raise ValueError(f"score.target {self.score.target} is none of the targets {known}")
        for selection in self.selections:
            if selection.target is not None and selection.target not in self.targets:
                raise ValueError(
                    f"a window's select.target {selection.target} is none of the targets {known}"
                )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Plan:
        if isinstance(self.basis, KroneckerBasisConfig) and not self.optimizer.linear:
            raise ValueError(
                f"a kronecker basis cannot follow {self.optimizer.kind}, which treats every "
                f"parameter by its own history; set `basis: {{kind: coordinates}}`"
            )
        if self.schedule.over == "run" and any(stage.steps is None for stage in self.stages):
            raise ValueError(
                "a schedule over the run needs `steps` in every stage, because epochs shrink as "
                "data is pruned"
            )
        return self

    @model_validator(mode="after")
    def _check_components(self) -> Plan:
        if self.components and self.optimizer.at_stage == "carry" and len(self.stages) > 1:
            raise ValueError(
                "`components` reduces embeddings to directions of the parameters, and with "
                "`optimizer.at_stage: carry` questions reach earlier stages through the "
                "optimizer's state too; set `at_stage: reset`, or leave out `components`"
            )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Plan:
        for number, stage in enumerate(self.stages):
            auto = stage.auto_windows
            if auto and auto.auto == PREVIOUS and self.profiled_before(number) < 0:
                raise ValueError(
                    f"stage {number} takes its windows from the stage before it, and no stage "
                    f"before it is recorded in full; give one of them windows over all its steps, "
                    f"or name an earlier run: `windows: {{auto: <run>}}`"
                )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> Plan:
        if self.autocast and self.dtype != "float32":
            raise ValueError(f"`autocast` is for `dtype: float32`, and it is {self.dtype}")
        if self.score.estimate == "replay" and self.is_half_precise:
            raise ValueError(
                "`score.estimate: replay` takes differences that half precision cannot hold; use "
                "`embedding`, or train in float32"
            )
        if self.trust.asked and self.is_half_precise:
            raise ValueError(
                "`trust.questions` and `trust.min_agreement` compare answers with replay, which "
                "takes differences that half precision cannot hold; leave them out, or train in "
                "float32"
            )
        return self

    @model_validator(mode="after")
    def _check_scores(self) -> Plan:
        if self.score.estimate == "replay" and not self.score.is_effect:
            raise ValueError(
                "`score.estimate: replay` gives effects on a target's mean loss at the stage's "
                "end; add `horizon: stage, aggregate: mean`"
            )
        if self.trust.min_fidelity is not None and not self.score.is_effect:
            raise ValueError(
                "`trust.min_fidelity` compares scores with retraining without a sample, which "
                "only `horizon: stage, aggregate: mean` estimate; use `trust.trial` for other "
                "scores"
            )
        if self.trust.trial and not self.held_out_share(self.pruning_target):
            raise ValueError(
                f"`trust.trial` needs held-out target samples; set `judging: 0.5` on target "
                f"{self.pruning_target}"
            )
        for stage in (self.audit and self.audit.stages) or []:
            if stage >= len(self.stages):
                raise ValueError(
                    f"audit.stages names stage {stage}; the last is {len(self.stages) - 1}"
                )
        return self

    @model_validator(mode="after")
    def _check_launch(self) -> Plan:
        if self.launch.processes == 1:
            return self
        if self.curvature.needs_own_loop:
            raise ValueError(
                f"`curvature.kind: {self.curvature.kind}` makes passes that only one process can "
                f"make; set `empirical_fisher` or `none`, or leave out `launch`"
            )
        if self.selections:
            raise ValueError(
                "online selection works in one process; leave out the windows' `select`, or leave "
                "out `launch`"
            )
        if ":" in self.device:
            raise ValueError(
                f"`device: {self.device}` is one device, and `launch` has {self.launch.processes} "
                f"processes; set `device: {self.device.partition(':')[0]}`, so that each has its "
                f"own"
            )
        return self

    @property
    def is_half_precise(self) -> bool:
        """Whether the model computes in half precision, which replay's differences cannot use."""
        return self.autocast is not None or self.dtype == "bfloat16"

    @property
    def number_type(self) -> str:
        """The type of contributions and embeddings."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    @property
    def coupling(self) -> Literal["block", "full"]:
        """Which coefficients the curvature couples: the plan's choice, or full if it is cheap."""
        return self.curvature.coupling or ("full" if self.components else "block")

    @property
    def basis_config(self) -> KroneckerBasisConfig | CoordinateBasisConfig:
        """The basis: the plan's own, or the one that suits the optimizer."""
        if self.basis is not None:
            return self.basis
        return KroneckerBasisConfig() if self.optimizer.linear else CoordinateBasisConfig()

    @property
    def estimate(self) -> Literal["embedding", "replay"]:
        """How scores are estimated: the plan's choice, or replay if it can answer."""
        return self.score.estimate or ("replay" if self.score.is_effect else "embedding")

    @property
    def gates_by_agreement(self) -> bool:
        """Whether a stage is pruned only if its embeddings agree with replay.

        The plan must demand an agreement, and its scores be read from embeddings.
        """
        reads_embeddings = self.estimate == "embedding" and self.score.horizon == "stage"
        return reads_embeddings and self.trust.min_agreement is not None

    @property
    def pruning_target(self) -> str:
        """The target pruned for."""
        return self.score.target or next(iter(self.targets))

    @property
    def selections(self) -> list[SelectionConfig]:
        """The online selections of all stages."""
        return [selection for stage in self.stages for selection in stage.selections]

    @property
    def scoring_targets(self) -> list[str]:
        """The targets that samples are chosen by: the one pruned for, and those of selections."""
        selecting = [selection.target or self.pruning_target for selection in self.selections]
        return list(dict.fromkeys([self.pruning_target, *selecting]))

    @property
    def first_pruned_stage(self) -> int | None:
        """The first stage that is pruned, or None."""
        return next((n for n, stage in enumerate(self.stages) if stage.prune), None)

    def held_out_share(self, target: str) -> float:
        """Return the share of a target's samples that never score training samples."""
        share = self.targets[target].judging
        if share is not None:
            return share
        return 0.5 if self.trust.trial and target == self.pruning_target else 0.0

    def audit_settings(self, removals: int | None = None) -> AuditConfig:
        """Return the plan's audit or the default one, with `removals` in place of its own."""
        settings = self.audit or AuditConfig()
        return settings if removals is None else settings.model_copy(update={"removals": removals})

    def audits(self, stage: int) -> bool:
        """Return whether a stage is audited: the plan lists it, or a gate needs the audit."""
        listed = self.audit is not None and (
            self.audit.stages is None or stage in self.audit.stages
        )
        gated = self.trust.min_fidelity is not None and self.stages[stage].prune is not None
        return listed or gated

    def checkpoint_readers(self, stage: int) -> list[str]:
        """Return what reads the checkpoints within a stage after its training, by name."""
        policy = self.stages[stage].prune
        readers = {
            "replay": self.estimate == "replay",
            "the audit": self.audits(stage),
            "the comparison of answers (trust.questions)": self.trust.asked > 0,
            f"the policy {policy.policy if policy else None}": policy is not None
            and policy.reads_checkpoints,
        }
        return [name for name, reads in readers.items() if reads]

    def pruned_before(self, stage: int) -> int | None:
        """Return the last earlier stage that is pruned, or None."""
        earlier = reversed(range(stage))
        return next((n for n in earlier if self.stages[n].prune is not None), None)

    def profiled_before(self, stage: int) -> int:
        """Return the nearest earlier stage that is recorded in full, or -1.

        Only the influence profile of such a stage can show phases.
        """
        return next((n for n in reversed(range(stage)) if self.stages[n].is_recorded_in_full), -1)

    def needs_scores(self, stage: int) -> bool:
        """Return whether pruning, or the windows of a later stage, need a stage scored.

        Automatic windows need the profile of every stage before them.
        """
        windows = [later.auto_windows for later in self.stages[stage + 1 :]]
        profiled = any(auto is not None and auto.auto == PREVIOUS for auto in windows)
        return profiled or any(later.prune is not None for later in self.stages[stage:])
