"""The model factory against the classes of `transformers` and `peft` themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTForImageClassification,
)

from secateur.errors import PlanError
from secateur.huggingface import build_model
from secateur.influence.bindings import bind_layers
from secateur.tasks.plan import FactoryConfig
from secateur.tasks.run import call_factory
from tests.text.llama import CONFIG

SETTINGS = {name: value for name, value in CONFIG.items() if name != "model_type"}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama in half precision, as `save_pretrained` writes it."""
    path = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**SETTINGS)).bfloat16().save_pretrained(path)
    return path


def assert_equal_weights(model: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert list(model.state_dict()) == list(expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_config_gives_the_model_that_its_class_gives() -> None:
    torch.manual_seed(5)
    model: Any = build_model(config=CONFIG | {"attention_dropout": 0.25})
    torch.manual_seed(5)
    expected = LlamaForCausalLM(LlamaConfig(**SETTINGS))
    assert type(model) is LlamaForCausalLM
    assert_equal_weights(model, expected)
    assert model.config.attention_dropout == 0.25
    assert model.training
    assert model.config.use_cache is False


def test_a_folder_gives_its_weights_in_float32(
    folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model: Any = build_model(path=folder, config={"attention_dropout": 0.25})
    assert model.training  # or dropout would be off
    assert model.config.attention_dropout == 0.25
    stored = load_file(f"{folder}/model.safetensors")
    assert set(model.state_dict()) == set(stored)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())
    assert capfd.readouterr() == ("", "")


def test_attention_is_the_one_that_is_named() -> None:
    for name in ("eager", "sdpa"):
        model: Any = build_model(config=CONFIG, attn_implementation=name)
        assert model.config._attn_implementation == name


def test_classifiers(folder: str) -> None:
    """The head of a classifier may be new; all else must be in the folder."""
    labelled = {"num_labels": 3, "pad_token_id": 0}
    model: Any = build_model(task="sequence_classification", path=folder, config=labelled)
    assert type(model) is LlamaForSequenceClassification
    assert model.score.out_features == 3
    stored = load_file(f"{folder}/model.safetensors")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, stored[f"model.{name}"].float())
    images = {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 5,
    }
    model = build_model(task="image_classification", config=images)
    assert type(model) is ViTForImageClassification
    assert model(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 5)


def test_lora_trains_the_adapters_that_peft_trains() -> None:
    torch.manual_seed(5)
    model: Any = build_model(config=CONFIG, lora=LORA)
    torch.manual_seed(5)
    base = LlamaForCausalLM(LlamaConfig(**SETTINGS))
    expected = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    assert_equal_weights(model, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in expected.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # two layers, two projections, two factors
    captured = [name for block in bind_layers(model).blocks for name in block.parameters]
    assert sorted(captured) == sorted(trained)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "needs `path`, or `config` with its `model_type`"),
        ({"config": {"model_type": "lama"}}, "has no model_type lama; did you mean"),
        ({"config": CONFIG | {"hiden_size": 8}}, "no setting hiden_size; did you mean hidden_size"),
        (
            {"config": CONFIG | {"hidden_size": "8"}},
            "the config of llama is wrong: .* expected int",
        ),
        ({"config": CONFIG | {"hidden_size": 9}}, "the config of llama is wrong"),
        ({"config": CONFIG | {"hidden_act": "x"}}, "the llama model cannot be built"),
        ({"config": CONFIG, "task": "chat"}, "task chat is not known; give one of causal_lm"),
        ({"config": CONFIG, "task": "image_classification"}, "no image_classification model of"),
        ({"config": CONFIG, "attn_implementation": "fast"}, "the llama model cannot be built"),
        ({"config": CONFIG, "lora": {"rank": 2}}, "`lora` cannot be applied: .*rank"),
        ({"config": CONFIG, "lora": {"r": 2, "target_modules": ["x"]}}, "`lora` cannot be applied"),
        ({"path": "gpt2"}, r"path gpt2 is no folder; .* \(nothing is downloaded\)"),
    ],
)
def test_bad_input_is_said_in_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    config = FactoryConfig(factory="secateur.huggingface:build_model", args=arguments)
    with pytest.raises(PlanError, match=sentence) as raised:
        call_factory(config, "model")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_folders_that_are_incomplete_or_unsafe_are_refused(folder: str, tmp_path: Path) -> None:
    def copy(name: str, weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> str:
        path = tmp_path / name
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SETTINGS)).save_pretrained(path, state_dict=weights)
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
        return str(path)

    pickled = copy("pickled")
    Path(pickled, "model.safetensors").unlink()
    torch.save({}, f"{pickled}/pytorch_model.bin")
    adapter = copy("adapter")
    Path(adapter, "adapter_config.json").write_text("{}")
    cut = copy("cut")
    Path(cut, "model.safetensors").write_bytes(b"half of it")
    headless = load_file(f"{folder}/model.safetensors")
    del headless["lm_head.weight"]
    cases = {
        pickled: r"has no model\.safetensors; save the model with safetensors",
        adapter: "holds an adapter; merge it into its model first",
        cut: "the llama model cannot be built: Error while deserializing",
        copy("headless", headless): "lacks 1 weights of LlamaForCausalLM, such as lm_head.weight",
        copy("type", model_type="lama"): "the config of .* cannot be used",
        copy("wider", hidden_size=32): "the llama model cannot be built",
    }
    for path, sentence in cases.items():
        with pytest.raises(PlanError, match=sentence) as raised:
            build_model(path=path)
        assert "\n" not in str(raised.value)
    with pytest.raises(PlanError, match="no setting hiden_size"):
        build_model(path=folder, config={"hiden_size": 8})
    with pytest.raises(PlanError, match="`path` has its own model_type"):
        build_model(path=folder, config={"model_type": "llama"})


def test_code_of_a_folder_is_not_run(folder: str, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(Path(folder, name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(PlanError, match="cannot be used"):
        build_model(path=str(tmp_path))


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PlanError, match=rf"the package {package}.*secateur\[huggingface\]"):
        build_model(config=CONFIG, lora=LORA)
