"""Models of torchvision and timm: full width, unless their note says otherwise, on small images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .entries import Entry, images

_LIBRARIES: list[torch.library.Library] = []  # a library's operators go with it


def stub_torchvision() -> None:
    """Declares two operators of torchvision's binary, so that its Python imports on a torch built without CUDA."""
    if not _LIBRARIES:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


def _torchvision(name: str, size: int = 32, note: str = "", **options: Any) -> Entry:
    def build() -> nn.Module:
        stub_torchvision()
        from torchvision.models import get_model

        return get_model(name, weights=None, **options)

    return Entry("torchvision", build, images(size), note)


def _vision_transformer() -> nn.Module:
    stub_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=6, hidden_dim=384, mlp_dim=1536)


def _swin(version: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        stub_torchvision()
        from torchvision.models import swin_transformer as swin

        block, merging = {
            "v1": (swin.SwinTransformerBlock, swin.PatchMerging),
            "v2": (swin.SwinTransformerBlockV2, swin.PatchMergingV2),
        }[version]
        return swin.SwinTransformer(
            [4, 4], 96, [2, 2, 2], [3, 6, 12], window_size=[4, 4], block=block, downsample_layer=merging
        )

    return build


def _maxvit() -> nn.Module:
    stub_torchvision()
    from torchvision.models.maxvit import MaxVit

    return MaxVit(
        input_size=(64, 64), stem_channels=32, block_channels=[32, 64], block_layers=[1, 1], head_dim=16,
        partition_size=4, stochastic_depth_prob=0.1,
    )  # fmt: skip


class _Dense(nn.Module):
    """A detector without what depends on the data: backbone, pyramid, and every head on the pyramid's features."""

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module]):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Any]:
        features = list(self.backbone(x).values())
        return [head(features) for head in self.heads]


class _BoxHead(nn.Module):
    """The second stage of Faster R-CNN, on features pooled from a fixed place."""

    def __init__(self, head: nn.Module, predictor: nn.Module, resolution: int):
        super().__init__()
        self.head, self.predictor, self.pool = head, predictor, nn.AdaptiveAvgPool2d(resolution)

    def forward(self, features: list[Tensor]) -> Any:
        return self.predictor(self.head(self.pool(features[0])))


def _detector(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        stub_torchvision()
        from torchvision.models import get_model

        model: Any = get_model(name, weights=None, weights_backbone=None)
        if not hasattr(model, "rpn"):
            return _Dense(model.backbone, [model.head])
        roi = model.roi_heads
        heads = [model.rpn.head, _BoxHead(roi.box_head, roi.box_predictor, 7)]
        for kind in ("mask", "keypoint"):
            if getattr(roi, f"{kind}_head", None) is not None:
                heads.append(_BoxHead(getattr(roi, f"{kind}_head"), getattr(roi, f"{kind}_predictor"), 14))
        return _Dense(model.backbone, heads)

    return build


NO_BOXES = "backbone, pyramid and heads; boxes, NMS and region proposals, which depend on the data, are left out"

CLASSIFIERS = {
    name: _torchvision(name)
    for name in (
        "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "mobilenet_v2",
        "mobilenet_v3_large", "shufflenet_v2_x1_0", "mnasnet1_0", "efficientnet_b0", "efficientnet_v2_s",
        "regnet_y_400mf", "regnet_x_400mf", "vgg11_bn",
    )
}  # fmt: skip
TORCHVISION = {
    **CLASSIFIERS,
    "alexnet": _torchvision("alexnet", 64),
    "squeezenet1_1": _torchvision("squeezenet1_1", 64),
    "convnext_tiny": _torchvision("convnext_tiny", 64),
    "googlenet": _torchvision("googlenet", 64, init_weights=False),
    "inception_v3": _torchvision("inception_v3", 96, "no auxiliary head: it needs images of 299 pixels",
                                 init_weights=False, aux_logits=False),
    "vit": Entry("torchvision", _vision_transformer, images(32), "3 layers of width 384"),
    "swin_t": Entry("torchvision", _swin("v1"), images(64), "6 layers, window 4"),
    "swin_v2_t": Entry("torchvision", _swin("v2"), images(64), "6 layers, window 4"),
    "maxvit": Entry("torchvision", _maxvit, images(64), "2 blocks"),
    **{
        name: _torchvision(name, 64, weights_backbone=None)
        for name in (
            "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
        )
    },
    **{
        name: Entry("torchvision", _detector(name), images(64), NO_BOXES)
        for name in (
            "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn",
            "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
        )
    },
}  # fmt: skip


def _timm(name: str, size: int = 32, note: str = "", **options: Any) -> Entry:
    def build() -> nn.Module:
        stub_torchvision()
        import timm

        return timm.create_model(name, pretrained=False, num_classes=100, **options)

    return Entry("timm", build, images(size), note)


def _patches(name: str, **options: Any) -> Entry:
    """A transformer on 64 x 64 images, of three layers."""
    return _timm(name, 64, "3 layers", img_size=64, depth=3, **options)


TIMM = {
    "vit_tiny_patch16_224": _patches("vit_tiny_patch16_224"),
    "deit_tiny_distilled_patch16_224": _patches("deit_tiny_distilled_patch16_224"),
    "beit_base_patch16_224": _patches("beit_base_patch16_224", embed_dim=192, num_heads=3),
    "eva02_tiny_patch14_224": _timm("eva02_tiny_patch14_224", 56, "3 layers", img_size=56, depth=3),
    "mixer_s32_224": _timm("mixer_s32_224", 64, img_size=64),
    "resmlp_12_224": _timm("resmlp_12_224", 64, img_size=64),
    "gmlp_s16_224": _timm("gmlp_s16_224", 64, img_size=64),
    "cait_xxs24_224": _timm("cait_xxs24_224", 64, "3 layers", img_size=64, depth=3),
    "xcit_nano_12_p16_224": _timm("xcit_nano_12_p16_224", 64, "3 layers", img_size=64, depth=3),
    "swin_tiny_patch4_window7_224": _timm(
        "swin_tiny_patch4_window7_224",
        64,
        "6 layers",
        img_size=64,
        depths=(2, 2, 2),
        num_heads=(3, 6, 12),
        window_size=4,
    ),
    "convnextv2_atto": _timm("convnextv2_atto", 64),
    "mobilenetv4_conv_small": _timm("mobilenetv4_conv_small", 64),
    "resnet50d": _timm("resnet50d"),
    "seresnet50": _timm("seresnet50"),
    "ecaresnet50t": _timm("ecaresnet50t"),
    "res2net50_26w_4s": _timm("res2net50_26w_4s"),
    "resnest14d": _timm("resnest14d"),
    "regnety_002": _timm("regnety_002"),
    "repvgg_a0": _timm("repvgg_a0"),
    "mobileone_s0": _timm("mobileone_s0"),
    "ghostnet_100": _timm("ghostnet_100"),
    "hrnet_w18_small": _timm("hrnet_w18_small"),
    "dla34": _timm("dla34", 64),
    "dpn48b": _timm("dpn48b"),
    "cspresnet50": _timm("cspresnet50"),
    "nf_resnet26": _timm("nf_resnet26"),
    "poolformer_s12": _timm("poolformer_s12", 64),
    "pvt_v2_b0": _timm("pvt_v2_b0", 64),
    "edgenext_xx_small": _timm("edgenext_xx_small", 64),
    "mobilevit_xxs": _timm("mobilevit_xxs", 64),
    "levit_128s": _timm("levit_128s", 64, img_size=64),
    "inception_next_tiny": _timm("inception_next_tiny", 64, "6 blocks", depths=(1, 1, 3, 1)),
    "tinynet_e": _timm("tinynet_e"),
}
