"""Vision models of the transformers library at test size, with random weights and live batch norms."""

import torch
import transformers as tf

from tests.models_vision import alive, smooth

SIZES = dict(hidden_sizes=[8, 16], depths=[1, 2])
VIT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)


def segformer(model, **options):
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[2, 1],
        patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3, **options,
    )  # fmt: skip
    return getattr(tf, model)(config)


def detr():
    backbone = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = tf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=5, num_labels=3,
    )  # fmt: skip
    return tf.DetrForObjectDetection(config)


def classifier(kind, **options):
    return lambda: getattr(tf, f"{kind}ForImageClassification")(getattr(tf, f"{kind}Config")(num_labels=5, **options))


def mobilenet(version, kept):
    """A MobileNet of its first, last and widening blocks, and of one other: those left out repeat one that is kept."""
    made = classifier(version, depth_multiplier=0.25, image_size=32)()
    body = made.base_model
    body.layer = torch.nn.ModuleList(body.layer[i] for i in kept)
    return made


EFFICIENT = dict(
    kernel_sizes=[3, 5, 3], in_channels=[32, 16, 24], out_channels=[16, 24, 40], strides=[1, 2, 2],
    num_block_repeats=[1, 2, 1], expand_ratios=[1, 6, 6], width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320,
)  # fmt: skip

MODELS = {
    "resnet": (classifier("ResNet", embedding_size=8, **SIZES), 32),
    "convnext": (classifier("ConvNext", num_stages=2, **SIZES), 32),
    "mobilenet-v1": (lambda: mobilenet("MobileNetV1", (*range(8), 10, 11, 12, 13, 22, 23, 24, 25)), 32),
    "mobilenet-v2": (lambda: mobilenet("MobileNetV2", (0, 1, 5, 9, 12, 15)), 32),
    "regnet": (classifier("RegNet", embedding_size=8, groups_width=8, **SIZES), 32),
    "efficientnet": (classifier("EfficientNet", image_size=32, **EFFICIENT), 32),
    "segformer": (lambda: segformer("SegformerForImageClassification"), 32),
    "segformer-semantic": (lambda: segformer("SegformerForSemanticSegmentation"), 32),
    "detr": (detr, 64),
    "yolos": (lambda: tf.YolosForObjectDetection(tf.YolosConfig(
        image_size=[32, 32], patch_size=8, num_detection_tokens=4, num_labels=3, **VIT)), 32),
}  # fmt: skip


def build(name):
    """(model, function that draws the keyword arguments of a batch of some size)."""
    factory, size = MODELS[name]
    torch.manual_seed(0)

    def inputs(count=4):
        return {"pixel_values": smooth(count, (3, size, size))}

    return alive(factory(), inputs), inputs
