"""Tiny vision, audio and CLIP models of `transformers`, and a loss per sample for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tiny_models import HEADS, LAYERS, VOCABULARY, WIDTH, scramble

CLASSES = 5
IMAGES = 32  # pixels per side
SPEECH = 800  # points in time
BINS = 16  # of a spectrogram
FRAMES = 40

ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
}
IMAGE = ENCODER | {"image_size": IMAGES, "patch_size": 8}
LABELS = {"num_labels": CLASSES}
PYRAMID = {"depths": [1, 1], "num_labels": CLASSES}
WAVES = ENCODER | {
    "conv_dim": [8, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
}
SWIN = {"image_size": IMAGES, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 4]}
RESIDUAL = {"embedding_size": 8, "hidden_sizes": [8, 16], "layer_type": "bottleneck"}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}

# Name of the model's class without its ending, the settings, and the kind of its inputs.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ViT": ("ViTForImageClassification", IMAGE | LABELS, "image"),
    "DeiT": ("DeiTForImageClassification", IMAGE | LABELS, "image"),
    "BEiT": (
        "BeitForImageClassification",
        IMAGE | LABELS | {"use_relative_position_bias": True, "layer_scale_init_value": 0.5},
        "image",
    ),
    "DINOv2": ("Dinov2ForImageClassification", IMAGE | LABELS, "image"),
    "DINOv2 with registers": ("Dinov2WithRegistersForImageClassification", IMAGE | LABELS, "image"),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        PYRAMID | {"hidden_sizes": [8, 16], "num_stages": 2},
        "image",
    ),
    "ConvNeXtV2": (
        "ConvNextV2ForImageClassification",
        PYRAMID | {"hidden_sizes": [8, 16], "num_stages": 2},
        "image",
    ),
    "ResNet (eval)": ("ResNetForImageClassification", PYRAMID | RESIDUAL, "image"),
    "RegNet (eval)": (
        "RegNetForImageClassification",
        PYRAMID | {"embedding_size": 8, "hidden_sizes": [8, 16], "groups_width": 4},
        "image",
    ),
    "MobileNetV2 (eval)": (
        "MobileNetV2ForImageClassification",
        LABELS | {"depth_multiplier": 0.1, "min_depth": 4},
        "image",
    ),
    "Swin": ("SwinForImageClassification", PYRAMID | SWIN | {"window_size": 4}, "image"),
    "Swin v2": ("Swinv2ForImageClassification", PYRAMID | SWIN | {"window_size": 4}, "image"),
    "SegFormer (eval)": (
        "SegformerForImageClassification",
        LABELS
        | {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        "image",
    ),
    "CLIP's vision tower": ("CLIPVisionModelWithProjection", IMAGE, "image"),
    "CLIP's text tower": ("CLIPTextModelWithProjection", ENCODER | WORDS, "text"),
    "SigLIP's vision tower": ("SiglipVisionModel", IMAGE, "image"),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": BINS,
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "spectrogram and text",
    ),
    "wav2vec 2.0": ("Wav2Vec2ForSequenceClassification", WAVES | LABELS, "speech"),
    "wav2vec 2.0 with layer norms": (
        "Wav2Vec2ForSequenceClassification",
        WAVES | LABELS | {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        "speech",
    ),
    "HuBERT": ("HubertForSequenceClassification", WAVES | LABELS, "speech"),
    "WavLM": ("WavLMForSequenceClassification", WAVES | LABELS | {"num_buckets": 8}, "speech"),
    "AST": (
        "ASTForAudioClassification",
        ENCODER | LABELS | {"patch_size": 8, "max_length": FRAMES, "num_mel_bins": BINS},
        "spectrogram",
    ),
}


def perception_model(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a tiny model in eval mode, and a function of some samples' losses."""
    import transformers

    kind, settings, modality = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**settings)
    for setting, value in vars(config).items():
        if isinstance(value, float) and "drop" in setting:
            setattr(config, setting, 0.0)
    model = scramble(model_class(config)).eval()
    inputs = _inputs(modality)
    generator = torch.Generator().manual_seed(2)
    classes = torch.randint(CLASSES, (3,), generator=generator)

    def losses(places: Tensor) -> Tensor:
        dtype = next(model.parameters()).dtype
        given = {
            name: x[places].to(dtype) if x.is_floating_point() else x[places]
            for name, x in inputs.items()
        }
        output = model(**given)
        if "decoder_input_ids" in given:
            logits, labels = output.logits.transpose(1, 2), given["decoder_input_ids"]
            return functional.cross_entropy(
                logits[..., :-1].double(), labels[:, 1:], reduction="none"
            ).mean(1)
        for name in ("logits", "image_embeds", "text_embeds", "pooler_output"):
            if getattr(output, name, None) is not None:
                scores = getattr(output, name).double()
                return functional.cross_entropy(scores, classes[places], reduction="none")
        raise ValueError(f"the model returns {list(output)}")

    return model, losses


def _inputs(modality: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    words[:, -1] = 2  # CLIP reads its text's embedding at the end

    def noise(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator)

    if modality == "image":
        return {"pixel_values": noise(3, IMAGES, IMAGES)}
    if modality == "text":
        return {"input_ids": words}
    if modality == "speech":
        return {"input_values": noise(SPEECH)}
    if modality == "spectrogram":
        return {"input_values": noise(FRAMES, BINS)}
    return {"input_features": noise(BINS, FRAMES), "decoder_input_ids": words}
