"""Any architecture of segmentation_models_pytorch with any of its encoders, as a segmenter of ours.

The papers are those of the architectures: FPN, PSPNet (Zhao et al., arXiv:1612.01105), DeepLabV3+ (Chen et al.,
arXiv:1802.02611), UNet++ (Zhou et al., arXiv:1807.10165), MAnet, LinkNet, PAN, UPerNet, SegFormer (Xie et al.,
arXiv:2105.15203), DPT (Ranftl et al., arXiv:2103.13413). Encoders are its own and, as ``tu-<name>``, those of timm; DPT
is made for vision transformers. Images are padded to a multiple of the encoder's stride, and the places of a
transformer's patches interpolated, so that every architecture takes every size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detseg.models.segmenter import AnyMapLoss, SemanticSegmenter, pad_to_multiple
from detseg.nn import IMAGENET_MEAN, IMAGENET_STD, Normalize
from detseg.structures import Target

OWN = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params", "self", "kwargs")
"""Arguments of theirs that are set here, or that this model has no use for."""


class SMP(SemanticSegmenter):
    """An architecture of segmentation_models_pytorch.

    Args:
        num_classes: classes of the semantic map, background included.
        arch: its name there, in any case: ``Unet``, ``DeepLabV3Plus``, ``Segformer``, ...
        encoder: its name there, ``tu-<name>`` for timm's.
        encoder_weights: a name of its published weights such as ``imagenet`` (downloads), or ``None``.
        options: further arguments of the architecture, such as ``decoder_channels``.
        loss: gives the named terms; ``None`` means plain cross entropy.
        separation: w0 of U-Net's weight map, 0 for none; needs instance masks.

    Raises:
        ValueError: there is no such architecture, encoder or argument, or DPT's encoder takes images of one size alone.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        arch: str = "DeepLabV3Plus",
        encoder: str = "resnet50",
        encoder_weights: str | None = None,
        options: Mapping[str, Any] | None = None,
        loss: AnyMapLoss | None = None,
        separation: float = 0.0,
    ) -> None:
        super().__init__(num_classes=num_classes, loss=loss, separation=separation)
        import segmentation_models_pytorch as smp  # 3 s: only where it is used

        build = _architecture(smp, arch)
        more = dict(options or {})
        known = [name for name in inspect.signature(build).parameters if name not in OWN]
        if unknown := sorted(set(more) - set(known)):
            raise ValueError(f"SMP: {arch} has no option {unknown[0]!r}; it has {', '.join(known)}")
        mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
        try:
            if encoder_weights is not None:
                published = smp.encoders.get_preprocessing_params(encoder, pretrained=encoder_weights)
                mean, std = published["mean"], published["std"]
            more |= {"encoder_name": encoder, "encoder_weights": encoder_weights}
            self.network = _build(build, build is smp.DPT, in_channels=3, classes=num_classes, **more)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"SMP: {arch} cannot be built with encoder {encoder!r}: {error}") from error
        if build is smp.DPT:
            _check_sizes(self.network, encoder)
        self.normalize = Normalize(mean, std)
        # DeepLab's own stride is 8 or 16, but some decoders beside it want 32; that suits all
        self.step = max(32, int(getattr(self.network.encoder, "output_stride", 32)))
        # Batch norm wants more than one cell; PAN pools its last map thrice
        self.least = self.step * (4 if isinstance(self.network, smp.PAN) else 2)

    def forward(self, images: Tensor, sizes: Tensor | None = None, targets: list[Target] | None = None) -> Tensor:
        """Return logits ``(B, K, H, W)`` for every pixel of images of any size; ``targets`` are not read.

        Raises:
            ValueError: in training, the batch is too small for a batch norm after global pooling.
        """
        height, width = images.shape[-2:]
        images = pad_to_multiple(self.normalize(images, sizes), self.step, least=self.least)  # (B, 3, H', W')
        try:
            logits: Tensor = self.network(images)  # (B, K, H', W')
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"{type(self.network).__name__} trains on batches of 2 images or more: a batch norm after global "
                f"pooling sees one value per image, and the batch has {len(images)}; set data.batch_size to at least 2"
            ) from error
        return logits[:, :, :height, :width]


def _architecture(smp: Any, name: str) -> Any:
    """Return the class of that name, whatever its case."""
    kinds = [getattr(smp, key) for key in dir(smp)]
    base = smp.base.SegmentationModel
    known = {kind.__name__: kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, base)}
    found = {key.lower(): kind for key, kind in known.items()}.get(name.lower())
    if found is None or not issubclass(found, torch.nn.Module):
        raise ValueError(f"segmentation_models_pytorch has no architecture {name!r}; it has {', '.join(sorted(known))}")
    return found


def _build(build: Any, any_size: bool, **arguments: Any) -> torch.nn.Module:
    """Return the network; with ``any_size`` a vision transformer is told to interpolate the places of its patches."""
    network: torch.nn.Module
    if any_size:
        try:
            network = build(dynamic_img_size=True, **arguments)
            return network
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
    network = build(**arguments)  # most encoders that have no such argument take every size anyway
    return network


@torch.no_grad()
def _check_sizes(network: torch.nn.Module, encoder: str) -> None:
    """Refuse an encoder that cannot look at one small image: timm does not tell which of them are bound to a size."""
    image = torch.zeros(1, 3, 64, 96, device=next(network.parameters()).device)
    try:
        network.eval()(image)
    except (AssertionError, IndexError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"SMP: DPT over {encoder!r} takes no image of 64 x 96: {reason}; use a vision transformer with patches of "
            "8, 16 or 32 pixels such as 'tu-vit_small_patch16_224', or a convolutional network"
        ) from error
    network.train()
