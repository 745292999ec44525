"""DeconvNet's forward pass written out once more, layer by layer; its other tests stand with SegNet's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detseg.models import DeconvNet


def test_forward_written_out():
    model = DeconvNet(num_classes=3, widths=(4, 6), convolutions=(1, 1), fully_connected=5, kernel=3).eval()
    images = torch.rand(2, 3, 16, 24)
    one, two = model.backbone.features[:3], model.backbone.features[4:7]
    with torch.no_grad():
        first, places = F.max_pool2d(one(model.normalize(images)), 2, return_indices=True)
        second, more = F.max_pool2d(two(first), 2, return_indices=True)
        six, seven = model.backbone.fc[0], model.backbone.fc[3]
        vector = F.relu(F.conv2d(F.relu(F.conv2d(second, six.weight, six.bias, padding=1)), seven.weight, seven.bias))
        up = F.relu(model.back[1](F.conv_transpose2d(vector, model.back[0].weight, padding=1)))
        for level, switches in ((0, more), (1, places)):
            layer, norm, _ = model.decoder.stages[level]
            up = F.relu(norm(F.conv_transpose2d(F.max_unpool2d(up, switches, 2), layer.weight, padding=1)))
        assert_close(model(images), model.head(up))
