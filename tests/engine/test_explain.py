"""Out of memory and dead workers: what the user is told."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from detseg.cli.main import main
from detseg.data.check import DataError
from detseg.data.watch import Watch
from detseg.engine.explain import OutOfMemory, explained, is_out_of_memory
from detseg.structures import Target
from fake_models import batch, boxes

GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB of which 5.00 MiB is "
    "free. Including non-PyTorch memory, this process has 139.00 GiB memory in use. Of the allocated memory 1 GiB is "
    "allocated by PyTorch. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
HOST = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def run(*, truths: bool = False, masks: bool = False, **data: Any) -> Any:
    """Return what a message is made from: a run with a batch of three images, of 2, 0 and 1 objects."""
    rows = [((0, 0, 4, 4), (1, 1, 5, 5)), (), ((2, 2, 8, 8),)]
    targets = [
        Target(
            boxes=boxes(*row),
            labels=torch.zeros(len(row), dtype=torch.int64),
            masks=torch.zeros((len(row), 1024, 1024), dtype=torch.bool) if masks else None,
        )
        for row in rows
    ]
    made = batch(targets, targets if truths else None, side=32)
    trainer = SimpleNamespace(precision="32-true", accumulate_grad_batches=2)
    return SimpleNamespace(
        cfg=SimpleNamespace(data={"batch_size": 3, "eval_batch_size": None} | data, trainer=trainer),
        data=SimpleNamespace(last_batch=made),
        task=SimpleNamespace(device=torch.device("cuda", 0)),
        trainer=SimpleNamespace(global_step=41),
    )


def told(error: BaseException, **settings: Any) -> str:
    with pytest.raises(OutOfMemory) as caught, explained(run(**settings)):
        raise error
    return str(caught.value)


class TestMemory:
    def test_names_shapes_objects_and_what_to_lower(self):
        said = told(torch.OutOfMemoryError(GPU))
        assert said.startswith("out of memory on cuda:0 in step 41 with a batch of training: images (3, 3, 32, 32), ")
        assert "3 objects (most in one image: 2). Lower data.batch_size=3 (halve it and set " in said
        assert "trainer.accumulate_grad_batches=4: the same step), or the sizes in the transform group, or " in said
        assert "or trainer.precision to bf16-mixed." in said
        assert said.endswith("The allocator: CUDA out of memory. Tried to allocate 20.00 GiB")

    def test_masks_and_image_size_where_there_are_any(self):
        said = told(torch.OutOfMemoryError(GPU), masks=True, image_size=512)
        assert ", whose masks are 3 MiB." in said and "or data.image_size=512, or" in said

    def test_in_evaluation_its_own_batch_size(self):
        said = told(torch.OutOfMemoryError(GPU), truths=True, eval_batch_size=9)
        assert "a batch of evaluation" in said and "Lower data.eval_batch_size=9, or" in said

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (torch.OutOfMemoryError(GPU), True),
            (RuntimeError(HOST), True),
            (RuntimeError("CUDA error: out of memory"), True),
            (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
            (MemoryError(), True),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
            (ValueError("out of memory"), False),
        ],
    )
    def test_all_allocators_are_known(self, error: BaseException, expected: bool):
        assert is_out_of_memory(error) is expected

    def test_a_real_failure_lets_its_tensors_go(self):
        """In a sweep the error outlives the trial; what the trial held must not."""
        held: list[Any] = []

        def step() -> None:
            import weakref

            image = torch.zeros(1000)
            held.append(weakref.ref(image))
            torch.empty(2**60, dtype=torch.uint8)

        with (
            pytest.raises(OutOfMemory, match=r"The allocator: .*(allocate|invalid|memory)") as caught,
            explained(run()),
        ):
            step()
        assert held[0]() is None and caught.value.__cause__ is not None

    def test_others_pass(self):
        with pytest.raises(RuntimeError, match=r"^shapes$"), explained(run()):
            raise RuntimeError("shapes")


def test_a_dead_worker_is_named_wherever_its_signal_arrives():
    watch = Watch(workers=1, split="train", file_of=lambda index: f"{index}.jpg")
    watch.table[0] = torch.tensor((77, 1, 6, 1))
    with pytest.raises(DataError, match=r"image 6 of split train, epoch 1 \(6.jpg\)"), explained(run()):
        raise RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_says_so_in_one_line(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from detseg.data.orchard import OrchardDataset

    read = OrchardDataset.__getitem__

    def deadly(self: Any, index: int) -> Any:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(OrchardDataset, "__getitem__", deadly)
    small = ["data.train_images=6", "data.val_images=2", "data.test_images=2", "data.batch_size=2"]
    rest = ["data.num_workers=1", "data.image_size=64", "trainer.max_epochs=1", "callbacks=none", "logger=none"]
    assert main(["train", "model=fcos_small", "trainer=cpu", *small, *rest]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-2]
    assert said.startswith("detseg: data worker 0 (process ") and "was killed by signal 9 (SIGKILL)" in said
    assert "image 3 of split train, epoch 0" in said and "lower data.num_workers" in said


def test_a_batch_of_one_whose_coarsest_map_is_one_cell_says_what_to_raise():
    norm = nn.BatchNorm2d(5).train()
    with (
        pytest.raises(ValueError, match=r"shape \(1, 5, 1, 1\): one value .* raise data\.batch_size=\d+ to 2"),
        explained(run()),
    ):
        norm(torch.zeros(1, 5, 1, 1))
    with pytest.raises(ValueError, match=r"^others pass$"), explained(run()):
        raise ValueError("others pass")


class TestDisk:
    def test_a_full_one_is_named_with_what_is_free(self, tmp_path: Path):
        made = run()
        made.cfg.paths = SimpleNamespace(output_dir=str(tmp_path))
        with (
            pytest.raises(
                OSError, match=r"the disk is full: [\d.]+ MiB are free where .*; make room, then resume="
            ) as caught,
            explained(made),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert caught.value.errno == errno.ENOSPC and str(tmp_path) in str(caught.value)
        for other in (OSError(errno.ENOSPC, "a.ckpt is not written: 3 MiB free"), PermissionError(errno.EACCES, "no")):
            with pytest.raises(OSError) as caught, explained(made):
                raise other
            assert caught.value is other
