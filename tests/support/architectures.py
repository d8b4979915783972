"""One small model of each architecture family in transformers, timm and torchvision, with random weights.

Nothing is downloaded: each is built from a configuration. Families stand in the order of how many people ship them.
Every entry is a function that returns a module and the inputs of its forward, as in `zoo`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BATCH = 4
TOKENS = 16

Entry = Callable[[], tuple[nn.Module, Any]]

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What most of transformers' configurations call their sizes."""


# --- inputs -----------------------------------------------------------------------------------------------------------


def pixels(size: int = 64) -> torch.Tensor:
    """Images: (batch, 3, size, size)."""
    return torch.rand(BATCH, 3, size, size)


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels()}


def text(length: int = TOKENS, vocabulary: int = 90, mask: bool = True) -> dict[str, torch.Tensor]:
    """Token ids above the special ones, and a mask that hides the end of one row: both (batch, length)."""
    ids = {"input_ids": torch.randint(3, vocabulary, (BATCH, length))}
    if not mask:
        return ids
    hidden = torch.ones(BATCH, length, dtype=torch.long)
    hidden[1, length - 4 :] = 0
    return ids | {"attention_mask": hidden}


def both() -> dict[str, torch.Tensor]:
    """What an encoder reads and what its decoder has written so far."""
    return text() | {"decoder_input_ids": torch.randint(3, 90, (BATCH, 8))}


def sound() -> dict[str, torch.Tensor]:
    """Waveforms: (batch, samples)."""
    return {"input_values": torch.randn(BATCH, 1600)}


# --- builders ---------------------------------------------------------------------------------------------------------


def of_transformers(
    kind: str, head: str, inputs: Callable[[], dict[str, torch.Tensor]], **sizes: Any
) -> tuple[str, Entry]:
    """A model of `transformers`: its `model_type`, the class that wraps it, and what differs from `SIZES`.

    A size of None is left to the configuration.
    """

    def build() -> tuple[nn.Module, Any]:
        import transformers

        chosen = {name: size for name, size in (SIZES | sizes).items() if size is not None}
        config = transformers.AutoConfig.for_model(kind, **chosen)
        config.use_cache = False
        return getattr(transformers, head)._from_config(config), inputs()

    return f"transformers/{kind}", build


def of_timm(family: str, variant: str, size: int = 64, **changes: Any) -> tuple[str, Entry]:
    """A model of `timm`: the module that defines the family, its smallest variant, and what differs from it."""

    def build() -> tuple[nn.Module, Any]:
        import timm

        return timm.create_model(variant, pretrained=False, num_classes=10, **changes), pixels(size)

    return f"timm/{family}", build


def of_torchvision(variant: str, size: int = 64, **changes: Any) -> tuple[str, Entry]:
    """A model of `torchvision`, by the name that its registry has for it."""

    def build() -> tuple[nn.Module, Any]:
        from torchvision import models

        return models.get_model(variant, weights=None, **changes), pixels(size)

    return f"torchvision/{variant}", build


def of_torchvision_video(variant: str) -> tuple[str, Entry]:
    """A model of `torchvision` for clips: (batch, channels, frames, height, width)."""

    def build() -> tuple[nn.Module, Any]:
        from torchvision import models

        return models.get_model(variant, weights=None, num_classes=10), torch.rand(BATCH, 3, 8, 64, 64)

    return f"torchvision/{variant}", build


# --- the families -----------------------------------------------------------------------------------------------------

ENCODER, DECODER, SEQ2SEQ = "ForSequenceClassification", "ForCausalLM", "ForConditionalGeneration"
FOUR: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
"""Four stages of a convolutional network."""
PATCHES: dict[str, Any] = {"image_size": 64, "patch_size": 16}
DETECTOR: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
PAIR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
"""Fewer heads for keys than for queries."""
WAVES: dict[str, Any] = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}


def backbone(*stages: str) -> dict[str, Any]:
    """A small ResNet, for models that read its feature maps."""
    return {"model_type": "resnet", **FOUR, "embedding_size": 8, "layer_type": "basic", "out_features": list(stages)}


def two_towers(kind: str, **more: Any) -> tuple[str, Entry]:
    """A model that compares images with texts."""

    def build() -> tuple[nn.Module, Any]:
        import transformers

        config = transformers.AutoConfig.for_model(
            kind, text_config=SIZES | {"projection_dim": 16}, vision_config=SIZES | PATCHES, projection_dim=16, **more
        )
        return transformers.AutoModel.from_config(config), text() | image()

    return f"transformers/{kind}", build


def windows_of_time(kind: str, head: str, **more: Any) -> tuple[str, Entry]:
    """A forecaster that reads patches of a series: (batch, steps, channels)."""
    sizes = {"context_length": 32, "patch_length": 8, "stride": 8, "patch_stride": 8, "prediction_length": 8}
    return of_transformers(
        kind,
        head,
        lambda: {"past_values": torch.randn(BATCH, 32, 3)},
        **sizes,
        num_input_channels=3,
        d_model=32,
        ffn_dim=64,
        **more,
    )


def decision_transformer() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.DecisionTransformerConfig(
        state_dim=5, act_dim=2, hidden_size=32, n_layer=1, n_head=4, max_ep_len=64, n_positions=64
    )
    inputs = {
        "states": torch.randn(BATCH, 8, 5),
        "actions": torch.randn(BATCH, 8, 2),
        "rewards": torch.randn(BATCH, 8, 1),
        "returns_to_go": torch.randn(BATCH, 8, 1),
        "timesteps": torch.arange(8).expand(BATCH, 8).clone(),
        "attention_mask": torch.ones(BATCH, 8, dtype=torch.long),
    }
    return transformers.DecisionTransformerModel(config), inputs


FAMILIES: dict[str, Entry] = dict(
    [
        of_timm("resnet", "resnet10t"),
        of_torchvision("resnet18", num_classes=10),
        of_transformers("roberta", "Roberta" + ENCODER, text),
        of_transformers("distilbert", "DistilBert" + ENCODER, text, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
        of_transformers("llama", "Llama" + DECODER, text, **GROUPED),
        of_timm("efficientnet", "test_efficientnet"),
        of_timm("vision_transformer", "test_vit", img_size=64),
        of_transformers(
            "t5", "T5" + SEQ2SEQ, both, d_model=32, d_kv=8, d_ff=64, num_layers=2, decoder_start_token_id=0
        ),
        of_transformers(
            "whisper",
            "Whisper" + SEQ2SEQ,
            lambda: {"input_features": torch.randn(BATCH, 16, 64), "decoder_input_ids": both()["decoder_input_ids"]},
            **PAIR,
            num_mel_bins=16,
            max_source_positions=32,
            max_target_positions=32,
        ),
        two_towers("clip"),
        of_torchvision("mobilenet_v3_small", num_classes=10),
        of_timm("mobilenetv3", "mobilenetv4_conv_small_035"),
        of_timm("convnext", "test_convnext"),
        of_timm(
            "swin_transformer",
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
        of_transformers(
            "swin",
            "SwinForImageClassification",
            image,
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            num_attention_heads=None,
            window_size=4,
        ),
        of_transformers("mistral", "Mistral" + DECODER, text, **GROUPED, sliding_window=8),
        of_transformers("qwen2", "Qwen2" + DECODER, text, **GROUPED),
        of_transformers("wav2vec2", "Wav2Vec2ForCTC", sound, **WAVES),
        of_transformers("dinov2", "Dinov2ForImageClassification", image, **PATCHES),
        of_transformers("bart", "Bart" + SEQ2SEQ, both, **PAIR),
        of_transformers("detr", "DetrForObjectDetection", image, **DETECTOR, backbone_config=backbone("stage4")),
        of_timm("regnet", "regnetx_002"),
        of_timm("densenet", "densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
        of_torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=5),
        of_torchvision("efficientnet_v2_s", num_classes=10),
        of_transformers(
            "deberta-v2",
            "DebertaV2" + ENCODER,
            text,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
        ),
        of_transformers("electra", "Electra" + ENCODER, text, embedding_size=16),
        of_transformers("albert", "Albert" + ENCODER, text, embedding_size=16),
        of_transformers("mpnet", "MPNet" + ENCODER, text),
        of_transformers("modernbert", "ModernBert" + ENCODER, text),
        of_transformers("gemma3_text", "Gemma3" + DECODER, text, **GROUPED, sliding_window=8),
        of_transformers("phi3", "Phi3" + DECODER, text, **GROUPED),
        of_transformers("qwen3", "Qwen3" + DECODER, text, **GROUPED),
        of_transformers("mixtral", "Mixtral" + DECODER, text, **EXPERTS),
        of_transformers("opt", "OPT" + DECODER, text, ffn_dim=64, word_embed_proj_dim=32),
        of_transformers("gpt_neox", "GPTNeoX" + DECODER, text),
        of_transformers("bloom", "Bloom" + DECODER, text, n_layer=2, n_head=4),
        of_transformers("falcon", "Falcon" + DECODER, text),
        of_transformers(
            "yolos", "YolosForObjectDetection", image, image_size=[64, 64], patch_size=16, num_detection_tokens=6
        ),
        of_transformers(
            "depth_anything",
            "DepthAnythingForDepthEstimation",
            image,
            backbone_config={
                "model_type": "dinov2",
                **SIZES,
                **PATCHES,
                "out_features": ["stage1", "stage2"],
                "reshape_hidden_states": False,
                "apply_layernorm": True,
            },
            reassemble_hidden_size=32,
            reassemble_factors=[2, 1],
            neck_hidden_sizes=[8, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
            patch_size=16,
        ),
        of_transformers("hubert", "HubertForCTC", sound, **WAVES),
        of_transformers(
            "audio-spectrogram-transformer",
            "ASTForAudioClassification",
            lambda: {"input_values": torch.randn(BATCH, 64, 16)},
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=64,
            num_mel_bins=16,
        ),
        windows_of_time("patchtst", "PatchTSTForPrediction"),
        windows_of_time("patchtsmixer", "PatchTSMixerForPrediction"),
        of_timm("vgg", "vgg11_bn"),
        of_timm("deit", "deit_tiny_distilled_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4),
        of_timm("mlp_mixer", "mixer_s32_224", img_size=64),
        of_timm("eva", "eva02_tiny_patch14_224", img_size=56, size=56, embed_dim=32, depth=2, num_heads=4),
        of_timm("maxxvit", "maxvit_pico_rw_256", img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1)),
        of_timm("hrnet", "hrnet_w18_small"),
        of_timm("repvit", "repvit_m0_9"),
        of_timm("fastvit", "fastvit_t8"),
        of_timm("efficientvit_mit", "efficientvit_b0"),
        of_timm("mobilevit", "mobilevitv2_050"),
        of_timm("ghostnet", "ghostnet_050"),
        of_timm("byobnet", "test_byobnet"),
        of_timm("edgenext", "edgenext_xx_small"),
        of_timm("nfnet", "test_nfnet"),
        of_timm("resnest", "resnest14d"),
        of_timm("inception_v3", "inception_v3", size=96),
        of_timm("cspnet", "cs3darknet_s"),
        of_timm("hgnet", "hgnetv2_b0"),
        of_timm("levit", "levit_128s", img_size=64),
        of_timm("pvt_v2", "pvt_v2_b0"),
        of_timm("coat", "coat_lite_tiny", img_size=64),
        of_timm("xcit", "xcit_nano_12_p16_224", img_size=64, depth=2),
        of_timm("cait", "cait_xxs24_224", img_size=64, depth=2),
        of_timm("beit", "beit_base_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=4),
        of_timm("metaformer", "poolformerv2_s12"),
        of_timm("mambaout", "test_mambaout"),
        of_timm("hiera", "hiera_tiny_224", img_size=64, embed_dim=16, stages=(1, 1, 1, 1)),
        of_transformers(
            "focalnet",
            "FocalNetForImageClassification",
            image,
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
        ),
        of_timm("davit", "davit_tiny", depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4)),
        of_timm("pit", "pit_xs_224", img_size=64),
        of_timm("tiny_vit", "tiny_vit_5m_224"),
        of_timm("starnet", "starnet_s050"),
        of_timm("inception_next", "inception_next_atto"),
        of_timm("xception", "legacy_xception"),
        of_torchvision("squeezenet1_1", num_classes=10),
        of_torchvision("shufflenet_v2_x0_5", num_classes=10),
        of_torchvision("mnasnet0_5", num_classes=10),
        of_torchvision("googlenet", num_classes=10, init_weights=False),
        of_torchvision("alexnet", num_classes=10),
        of_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=5),
        of_torchvision("fcn_resnet50", weights_backbone=None, num_classes=5),
        of_torchvision_video("r3d_18"),
        of_transformers("siglip_vision_model", "SiglipVisionModel", image, **PATCHES),
        of_transformers("beit", "BeitForImageClassification", image, **PATCHES),
        of_transformers(
            "mobilevit",
            "MobileViTForImageClassification",
            image,
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 48],
        ),
        of_transformers(
            "dpt",
            "DPTForDepthEstimation",
            image,
            **PATCHES,
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
        ),
        of_transformers(
            "deformable_detr",
            "DeformableDetrForObjectDetection",
            image,
            **(DETECTOR | {"decoder_layers": 2}),
            backbone_config=backbone("stage2", "stage3", "stage4"),
            num_feature_levels=3,
            encoder_n_points=2,
            decoder_n_points=2,
        ),
        of_transformers(
            "layoutlm",
            "LayoutLMForTokenClassification",
            lambda: text() | {"bbox": torch.randint(0, 60, (BATCH, TOKENS, 4)).sort(-1).values},
            max_2d_position_embeddings=64,
        ),
        of_transformers("esm", "EsmForMaskedLM", text, mask_token_id=3, position_embedding_type="rotary"),
        of_transformers(
            "funnel",
            "Funnel" + ENCODER,
            text,
            block_sizes=[1, 1],
            n_head=4,
            d_head=8,
            d_model=32,
            d_inner=64,
            num_hidden_layers=None,
        ),
        of_transformers(
            "xlnet", "XLNet" + ENCODER, text, d_model=32, n_layer=2, n_head=4, d_inner=64, max_position_embeddings=None
        ),
        of_transformers("convbert", "ConvBert" + ENCODER, text, embedding_size=32),
        of_transformers("fnet", "FNet" + ENCODER, lambda: text(mask=False)),
        of_transformers("mamba", "Mamba" + DECODER, lambda: text(mask=False), state_size=4),
        of_transformers("m2m_100", "M2M100" + SEQ2SEQ, both, **PAIR),
        of_transformers(
            "videomae",
            "VideoMAEForVideoClassification",
            lambda: {"pixel_values": torch.rand(BATCH, 4, 3, 64, 64)},
            **PATCHES,
            num_frames=4,
        ),
        ("transformers/decision_transformer", decision_transformer),
    ]
)
"""Name to model: `transformers/MODEL_TYPE`, `timm/MODULE` or `torchvision/MODEL`."""


def build(name: str) -> tuple[nn.Module, Any]:
    """The model in eval mode and its inputs, the same at every call."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    return model.eval(), inputs
