"""Blocks with no paper of their own: backbones, pyramids, normalisation, and the strict loader of weights."""

from detseg.nn.aggregation import DeepAggregation
from detseg.nn.alexnet import AlexNetEncoder
from detseg.nn.atrous_vgg import AtrousVGG16
from detseg.nn.backbone import Backbone, TimmBackbone, TorchvisionBackbone
from detseg.nn.convolutionalise import LinearAsConvolution, convolutionalise
from detseg.nn.csp import CSPBackbone
from detseg.nn.dark_necks import BackboneWithConcat, BackboneWithPassthrough
from detseg.nn.darknet import Darknet19, Darknet53, YOLOv1Body
from detseg.nn.deconv import DeconvBackbone
from detseg.nn.dilated_resnet import DilatedResNet
from detseg.nn.extra_levels import BackboneWithExtras
from detseg.nn.fpn import BackboneWithFPN
from detseg.nn.hourglass import StackedHourglass
from detseg.nn.mirrored import MirroredDecoder
from detseg.nn.mobile import MobileNetV3
from detseg.nn.norm import freeze_batch_norm, set_norm_eps
from detseg.nn.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from detseg.nn.pan import BackboneWithPAN
from detseg.nn.tiny import TinyBackbone
from detseg.nn.unet_blocks import DenseBlock, DoubleConvolution, InceptionBlock, ResidualDoubleConvolution
from detseg.nn.upsampling import (
    BedOfNails,
    BilinearUpsampling,
    MaxUnpooling,
    NearestUpsampling,
    ResizeConvolution,
    TransposedConvolution,
    Upsampling,
)
from detseg.nn.vgg import VGGEncoder
from detseg.nn.weights import CheckpointMismatch, load_weights, read_state

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AlexNetEncoder",
    "AtrousVGG16",
    "Backbone",
    "BackboneWithConcat",
    "BackboneWithExtras",
    "BackboneWithFPN",
    "BackboneWithPAN",
    "BackboneWithPassthrough",
    "BedOfNails",
    "BilinearUpsampling",
    "CSPBackbone",
    "CheckpointMismatch",
    "Darknet19",
    "Darknet53",
    "DeconvBackbone",
    "DeepAggregation",
    "DenseBlock",
    "DilatedResNet",
    "DoubleConvolution",
    "InceptionBlock",
    "LinearAsConvolution",
    "MaxUnpooling",
    "MirroredDecoder",
    "MobileNetV3",
    "NearestUpsampling",
    "Normalize",
    "ResidualDoubleConvolution",
    "ResizeConvolution",
    "StackedHourglass",
    "TimmBackbone",
    "TinyBackbone",
    "TorchvisionBackbone",
    "TransposedConvolution",
    "Upsampling",
    "VGGEncoder",
    "YOLOv1Body",
    "convolutionalise",
    "freeze_batch_norm",
    "load_weights",
    "read_state",
    "set_norm_eps",
]
