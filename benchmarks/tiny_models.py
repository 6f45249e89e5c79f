"""Tiny models of every architecture of `transformers` that predicts the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 64  # and the longest sequence
WIDTH = 32
HEADS = 4
LAYERS = 2
EXPERTS = 4

# What a setting of a configuration becomes, by name, if it is a number above zero.
_NAMES = {
    WIDTH: """
        hidden_size d_model n_embd dim embed_dim embedding_size attention_hidden_size
        word_embed_proj_dim emb_dim backbone_hidden_size lru_width hidden_size_global embedding_dim
        input_embedding_size output_embedding_size ple_embed_dim out_hidden_size router_hidden_size
        adapter_in_dim adapter_out_dim adapter_input_size
    """,
    HEADS: """
        num_attention_heads num_heads n_head n_heads num_key_value_heads attention_heads
        encoder_attention_heads decoder_attention_heads num_decoder_attention_heads
        num_encoder_attention_heads kv_n_heads num_kv_heads n_head_kv linear_num_key_heads
        linear_num_value_heads linear_num_heads swa_num_attention_heads swa_num_key_value_heads
        index_n_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_routed_experts sliding_window sliding_window_size index_topk local_attention rotary_dim
    """,
    LAYERS: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_blocks num_experts_per_tok num_experts_per_token
        moe_topk moe_top_k moe_k num_selected_experts top_k zero_expert_num n_mamba_heads
    """,
    8: """
        head_dim d_kv dim_head kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim
        v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim
        swa_head_dim kv_channels mamba_d_head mamba_head_dim state_size mamba_d_state
        ssm_state_size hidden_size_per_layer_input laurel_rank o_lora_rank gated_norm_rank d_rel
        time_step_rank mamba_dt_rank chunk_size mamba_chunk_size hc_lowrank rel_extent
        attention_head_dim d_head mamba_n_heads
    """,
    16: """
        moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size
        shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size qk_head_dim
    """,
    48: """
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size d_ff
        dim_ff dff d_inner intermediate_size_mlp dense_intermediate_size feed_forward_size mlp_dim
    """,
    VOCABULARY: """
        vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size
        max_position_embeddings n_positions n_ctx max_seq_len max_source_positions
        max_target_positions model_max_length
    """,
    1: """
        n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace
        num_expert_group n_groups mamba_n_groups
    """,
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MIXTURE = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2}
HEAD = {"head_dim": WIDTH // HEADS}
FULL = {"layer_types": ["full_attention"] * LAYERS}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
SHARED_ATTENTION = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16}
MAMBA = {"mamba_headdim": 8, "n_mamba_heads": 8, "hybrid_layer_ids": [1]}
PATCHES = {"encoder_hash_byte_group_vocab": VOCABULARY}
# What the general rules do not get right, by model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": PATCHES,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY},
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": MIXTURE,
    "dots1": MIXTURE | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dots3_note_text": {
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"],
    },
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD | {"moe_topk": 2, "num_experts": EXPERTS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 8, "num_key_value_heads": 2},
    "ministral": HEAD,
    "nemotron": {"num_key_value_heads": HEADS},
    "nemotron_h": {"mamba_num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 1,
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [1, 7],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **SHARED_ATTENTION,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": MAMBA | SHARED_ATTENTION,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_causal_model(kind: str) -> nn.Module:
    """Return a tiny model of a model type, with weights that are no plain ones or zeros."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind]
    # A model that makes music from text predicts the next token by its decoder alone.
    decoder = getattr(config(), "decoder", None)
    settings = shrink((decoder or config()).to_dict()) | TOKENS
    if "is_decoder" in settings:
        settings["is_decoder"] = True
    torch.manual_seed(0)
    if decoder is not None:
        small = type(decoder).from_dict(settings)
        return scramble(MODEL_FOR_CAUSAL_LM_MAPPING[config]._from_config(small))
    return scramble(AutoModelForCausalLM.from_config(config.from_dict(settings)))


def shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration with small sizes and without dropout."""
    depth = settings.get("num_hidden_layers")
    small = {name: _shrunk(name, value, depth) for name, value in settings.items()}
    if "per_layer_config" in small:
        small["per_layer_config"] = {}
    return small | SPECIAL.get(settings.get("model_type", ""), {})


def _shrunk(name: str, value: Any, depth: int | None) -> Any:
    if isinstance(value, dict):
        return shrink(value)
    if isinstance(value, list) and len(value) == depth and len(value) > LAYERS:
        kinds = list(dict.fromkeys(value))
        return (kinds + [kinds[-1]] * LAYERS)[:LAYERS]
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if isinstance(value, int) and not isinstance(value, bool):
        if name.endswith("_token_id") and value:
            return TOKENS.get(name, 3)
        if value > 0:
            return SIZES.get(name, value)
    return value


def scramble(model: nn.Module) -> nn.Module:
    """Add random numbers to every weight, so that errors in norms show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def causal_model_types() -> list[str]:
    """Return the model types of `transformers` that predict the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
