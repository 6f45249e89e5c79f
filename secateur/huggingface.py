"""A model factory for models of Hugging Face that a plan can name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from secateur.errors import PlanError

# What a model does, and the names that `transformers` has for the models that do it.
TASKS = {
    "causal_lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "sequence_classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    ),
    "image_classification": (
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    ),
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def build_model(
    task: str = "causal_lm",
    config: Mapping[str, Any] | None = None,
    path: str | None = None,
    attn_implementation: str | None = None,
    lora: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a model of Hugging Face, from a configuration or a local folder.

    A plan names it `model: {factory: "secateur.huggingface:build_model", args: {...}}`. Nothing is
    downloaded, no code of a folder is run, and weights are read from safetensors only.

    Args:
        task: what the model does: `causal_lm`, `sequence_classification` or `image_classification`.
        config: `model_type` and the settings of that model. Weights are drawn at random. With
            `path`, settings that differ from the folder's.
        path: a folder that `save_pretrained` wrote.
        attn_implementation: how attention is computed: `eager`, `sdpa` or another that
            `transformers` has; its choice if None.
        lora: settings of PEFT's `LoraConfig`. Only the adapters are then trained.

    Raises:
        PlanError: a package is missing, the model is not known, a setting is wrong, or the folder
            cannot be read.
    """
    transformers = _import("transformers")
    if task not in TASKS:
        raise PlanError(f"the model task {task} is not known; give one of {', '.join(TASKS)}")
    settings = dict(config or {})
    if path is None:
        parsed = _make_config(transformers, settings)
    else:
        parsed = _load_config(transformers, path, settings)
    class_name, mapping = TASKS[task]
    if type(parsed) not in getattr(transformers, mapping):
        raise PlanError(f"transformers has no {task} model of type {parsed.model_type}")
    auto_class = getattr(transformers, class_name)
    try:
        if path is None:
            model = auto_class.from_config(parsed, attn_implementation=attn_implementation)
        else:
            model = _load_weights(transformers, auto_class, path, parsed, attn_implementation)
    except PlanError:
        raise
    except Exception as error:  # of many types, by the model and the setting
        raise PlanError(f"the {parsed.model_type} model cannot be built: {_line(error)}") from error
    model.config.use_cache = False  # a cache serves generation, and costs memory in training
    if lora is not None:
        model = _add_lora(model, task, lora)
    # Loaded models are in eval mode, without the dropout of their configuration.
    trained: nn.Module = model.train()
    return trained


def _make_config(transformers: ModuleType, settings: dict[str, Any]) -> Any:
    """The configuration of a plan's settings."""
    kind = settings.pop("model_type", None)
    if kind is None:
        raise PlanError("a model needs `path`, or `config` with its `model_type`")
    if kind not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(transformers.CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PlanError(f"transformers {transformers.__version__} has no model_type {kind}{hint}")
    config_class = transformers.CONFIG_MAPPING[kind]
    _check_settings(config_class(), settings)
    try:
        return config_class(**settings)
    except Exception as error:  # of many types, by the setting
        raise PlanError(f"the config of {kind} is wrong: {_line(error)}") from error


def _load_config(transformers: ModuleType, path: str, settings: dict[str, Any]) -> Any:
    """The configuration of a folder, with some settings replaced."""
    folder = Path(path)
    if not folder.is_dir():
        raise PlanError(
            f"the model's path {path} is no folder; give one that save_pretrained wrote (nothing "
            f"is downloaded)"
        )
    if not any((folder / name).exists() for name in WEIGHTS):
        raise PlanError(
            f"{path} has no {WEIGHTS[0]}; save the model with safetensors, since pickled weights "
            f"can run code"
        )
    if (folder / "adapter_config.json").exists():
        raise PlanError(
            f"{path} holds an adapter; merge it into its model first (`merge_and_unload` of PEFT)"
        )
    if "model_type" in settings:
        raise PlanError("`path` has its own model_type; remove it from `config`")
    try:
        parsed = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        _check_settings(parsed, settings)
        for name, value in settings.items():
            setattr(parsed, name, value)
    except PlanError:
        raise
    except Exception as error:  # of many types, by what is wrong with the file
        raise PlanError(f"the config of {path} cannot be used: {_line(error)}") from error
    return parsed


def _check_settings(known: Any, settings: Mapping[str, Any]) -> None:
    """Check that a configuration has each setting. Its class would keep others without a word."""
    for name in settings:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, list(known.to_dict()), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PlanError(f"the config of {known.model_type} has no setting {name}{hint}")


def _load_weights(
    transformers: ModuleType,
    auto_class: Any,
    path: str,
    config: Any,
    attn_implementation: str | None,
) -> Any:
    """The model of a folder. Only the head of a classifier may be new."""
    with _no_progress_bar(transformers):
        model, report = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    body = f"{model.base_model_prefix}."
    is_classifier = auto_class.__name__ != TASKS["causal_lm"][0]
    missing = [
        name
        for name in sorted(report["missing_keys"])
        if not is_classifier or name.startswith(body)
    ]
    if missing:
        raise PlanError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            f"give the folder of such a model, or another `task`"
        )
    return model


@contextmanager
def _no_progress_bar(transformers: ModuleType) -> Iterator[None]:
    """Show no progress bar within the block: a run builds its model many times."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _add_lora(model: Any, task: str, settings: Mapping[str, Any]) -> Any:
    """The model with low-rank adapters, which alone are trained."""
    peft = _import("peft")
    kinds = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type=kinds.get(task), **settings))
    except (TypeError, ValueError) as error:
        raise PlanError(f"`lora` cannot be applied: {_line(error)}") from error


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PlanError(
            f"models of Hugging Face need the package {name}, which cannot be imported ({error}); "
            f"install it with `pip install 'secateur[huggingface]'`"
        ) from error


def _line(error: Exception) -> str:
    """The message of an error of another library, on one line."""
    return " ".join(str(error).split())[:250]
