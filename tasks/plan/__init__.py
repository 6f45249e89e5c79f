"""The plan of a run: its settings classes, the registries of plug-ins, and its YAML file."""

from __future__ import annotations

from secateur.tasks.plan.base import Config, Fraction, Share
from secateur.tasks.plan.basis_config import CoordinateBasisConfig, KroneckerBasisConfig
from secateur.tasks.plan.checkpoints_config import CheckpointsConfig
from secateur.tasks.plan.curvature_config import CURVATURES, CurvatureConfig, register_curvature
from secateur.tasks.plan.inputs_config import DataConfig, FactoryConfig, TargetConfig, TaskConfig
from secateur.tasks.plan.launch_config import LaunchConfig
from secateur.tasks.plan.optimizer_config import (
    OPTIMIZERS,
    OptimizerConfig,
    ParameterGroupConfig,
    ScheduleConfig,
    register_optimizer,
)
from secateur.tasks.plan.plan import Plan
from secateur.tasks.plan.policy_config import POLICIES, Policy, register_policy
from secateur.tasks.plan.score_config import (
    AuditConfig,
    ReplayConfig,
    ScoreConfig,
    TrialConfig,
    TrustConfig,
)
from secateur.tasks.plan.stage_config import (
    PREVIOUS,
    AutoWindowsConfig,
    SelectionConfig,
    StageConfig,
    WindowConfig,
)
from secateur.tasks.plan.workers_config import WorkersConfig

__all__ = [
    "CURVATURES",
    "OPTIMIZERS",
    "POLICIES",
    "PREVIOUS",
    "AuditConfig",
    "AutoWindowsConfig",
    "CheckpointsConfig",
    "Config",
    "CoordinateBasisConfig",
    "CurvatureConfig",
    "DataConfig",
    "FactoryConfig",
    "Fraction",
    "KroneckerBasisConfig",
    "LaunchConfig",
    "OptimizerConfig",
    "ParameterGroupConfig",
    "Plan",
    "Policy",
    "ReplayConfig",
    "ScheduleConfig",
    "ScoreConfig",
    "SelectionConfig",
    "Share",
    "StageConfig",
    "TargetConfig",
    "TaskConfig",
    "TrialConfig",
    "TrustConfig",
    "WindowConfig",
    "WorkersConfig",
    "register_curvature",
    "register_optimizer",
    "register_policy",
]
