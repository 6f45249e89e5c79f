"""Contributions of PEFT's adapters against autograd one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tests.influence.oracle import captured, one_by_one, relative

CAUSAL = {"task_type": "CAUSAL_LM"}
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"], **CAUSAL}
PROMPT = {"num_virtual_tokens": 4, **CAUSAL}
Make = Callable[[], peft.PeftConfig]

ADAPTERS: dict[str, Make] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **LINEAR),
    "LoRA of a table": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], **CAUSAL),
    "LoRA and a head": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **LINEAR),
    "LoRA and tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices=[3, 4], **LINEAR),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **LINEAR),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **LINEAR),
    "prompt tuning": lambda: peft.PromptTuningConfig(**PROMPT),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**PROMPT),
    "P-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **PROMPT),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **CAUSAL),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, **LINEAR),
    "LoHa": lambda: peft.LoHaConfig(r=4, **LINEAR),
    "LoKr": lambda: peft.LoKrConfig(r=4, **LINEAR),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, r=0, **LINEAR),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **LINEAR),
}
OF_CONVOLUTIONS: dict[str, Make] = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["0"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["0"], use_dora=True),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["0"]),
    "IA3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
}


def scrambled(model: nn.Module) -> nn.Module:
    """Give an adapter's factors, some of which start at zero, random values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def token_losses(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]
    return functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    ).sum(1)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")  # BOFT's, and the next
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor")
@pytest.mark.parametrize("name", ADAPTERS)
def test_contributions_to_adapters_are_autograds(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=2, **sizes))
    model = scrambled(peft.get_peft_model(llama, ADAPTERS[name]()))
    ids = torch.randint(31, (3, 7))
    expected = one_by_one(model, token_losses, ids)
    assert relative(captured(model, token_losses, ids), expected) < 1e-5


@pytest.mark.parametrize("name", OF_CONVOLUTIONS)
def test_contributions_to_adapters_of_convolutions(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 49, 5))
    model = scrambled(peft.get_peft_model(net, OF_CONVOLUTIONS[name]()))
    images = torch.randn(3, 3, 9, 9)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sin().sum(1)

    assert relative(captured(model, losses, images), one_by_one(model, losses, images)) < 1e-5
