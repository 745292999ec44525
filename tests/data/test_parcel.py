from __future__ import annotations

import pickle

import torch
from torch.testing import assert_close

from detseg.data.parcel import Parcel, pack, unpack
from detseg.data.sample import Sample, collate
from detseg.structures import Batch, PanopticMap, SemanticMap, Target


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(3):
        target = Target(
            boxes=torch.rand((number, 4), generator=generator),
            labels=torch.arange(number),
            masks=torch.rand((number, 6, 5), generator=generator) > 0.5,
            image_id=number,
            size=(6, 5),
            semantic=SemanticMap(torch.full((6, 5), number)),
            panoptic=PanopticMap(torch.ones((6, 5), dtype=torch.int64), torch.tensor([2]), torch.tensor([True])),
            file=f"{number}.png",
            proposals=torch.rand((2 * number, 4), generator=generator),
        )
        image = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8, generator=generator)
        samples.append(Sample(image, target, target))
    return collate(samples, size_divisor=4)


def same(one: Target, other: Target) -> None:
    for name in ("boxes", "labels", "masks", "iscrowd", "area", "difficult"):
        assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    assert one.semantic is not None and other.semantic is not None
    assert_close(one.semantic.labels, other.semantic.labels)
    assert one.panoptic is not None and other.panoptic is not None
    assert_close(one.panoptic.labels, other.panoptic.labels)
    assert (one.image_id, one.size, one.file) == (other.image_id, other.size, other.file)


def test_a_parcel_arrives_as_the_batch_it_was() -> None:
    sent = batch()
    received = pickle.loads(pickle.dumps(Parcel(sent)))
    assert isinstance(received, Batch) and received.truths is not None and sent.truths is not None
    assert_close(received.images, sent.images)
    assert_close(received.sizes, sent.sizes)
    assert sent.proposals is not None and received.proposals is not None
    for mine, theirs in zip(sent.proposals, received.proposals, strict=True):
        assert_close(mine, theirs, rtol=0, atol=0)
    for one, other in zip([*sent.targets, *sent.truths], [*received.targets, *received.truths], strict=True):
        same(one, other)


def test_a_batch_takes_one_buffer_per_type_of_number() -> None:
    skeleton, buffers = pack(batch())
    assert set(buffers) == {torch.uint8, torch.int64, torch.float32, torch.bool}
    assert len(skeleton) < 4_000  # no numbers in it
    same(unpack(skeleton, buffers).targets[2], batch().targets[2])
