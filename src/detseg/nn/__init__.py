"""Blocks with no paper of their own: backbones, pyramids, normalisation, and the strict loader of weights."""

from detseg.nn.backbone import Backbone, TimmBackbone, TorchvisionBackbone
from detseg.nn.csp import CSPBackbone
from detseg.nn.fpn import BackboneWithFPN
from detseg.nn.norm import freeze_batch_norm, set_norm_eps
from detseg.nn.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from detseg.nn.pan import BackboneWithPAN
from detseg.nn.tiny import TinyBackbone
from detseg.nn.weights import CheckpointMismatch, load_weights, read_state

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Backbone",
    "BackboneWithFPN",
    "BackboneWithPAN",
    "CSPBackbone",
    "CheckpointMismatch",
    "Normalize",
    "TimmBackbone",
    "TinyBackbone",
    "TorchvisionBackbone",
    "freeze_batch_norm",
    "load_weights",
    "read_state",
    "set_norm_eps",
]
