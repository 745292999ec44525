"""``torch.compile`` that a run survives: where it fails, the run goes on as it is, and says why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import nn

log = logging.getLogger(__name__)


class Compile(L.Callback):
    """Compile the model's forward pass and its gradient, in training alone.

    Evaluation stays as it is: its images come in more sizes, each a compilation, and predictions are then those that
    ``detseg.load`` gives. The keys of a checkpoint stay the same, with and without averaged weights. Whatever goes
    wrong while compiling (no C++ compiler, an operation that the backend does not know) is told in one warning, and
    the part that failed runs as it is from then on.

    Args:
        parts: names of the model's submodules to compile, each by itself, such as ``["backbone", "head"]``; ``None``:
            its ``backbone``, and a model without one as a whole. What chooses among proposals or matches has another
            size in every step, and compiling it costs more than it saves.
        backend: ``"inductor"``, or any name that ``torch.compile`` takes.
        mode: ``"default"``, ``"reduce-overhead"``, ``"max-autotune"``; inductor's alone.
        dynamic: ``True`` compiles once for images of all sizes, ``False`` once per size; ``None``: once for the first
            size and, if there comes another, once for all.

    Raises:
        AttributeError: from ``setup``: the model has no such part.
    """

    def __init__(
        self,
        *,
        parts: Sequence[str] | None = None,
        backend: str = "inductor",
        mode: str = "default",
        dynamic: bool | None = None,
    ) -> None:
        self.parts, self.backend, self.mode, self.dynamic = parts, backend, mode, dynamic
        self._compiled: list[nn.Module] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the parts; what compiles is the first batch."""
        if stage != "fit":
            return
        model: nn.Module = pl_module.model  # type: ignore[assignment]  # every task of ours has one
        usual = ["backbone"] if hasattr(model, "backbone") else [""]
        for name in usual if self.parts is None else self.parts:
            part = model.get_submodule(name)
            options: dict[str, Any] = {"mode": self.mode} if self.backend == "inductor" else {}
            part.compile(backend=self.backend, dynamic=self.dynamic, **options)
            compiled = part._compiled_call_impl
            assert compiled is not None
            part._compiled_call_impl = WithFallback(part, compiled, name or type(model).__name__)
            self._compiled.append(part)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        for part in self._compiled:
            part._compiled_call_impl = None
        self._compiled = []


class WithFallback:
    """A compiled module's call that becomes the plain one when compiling fails.

    An error that the plain call raises too was not compiling's, and is raised as it is.

    Args:
        module: what is called.
        compiled: its compiled call.
        name: of the module, for the warning.
    """

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], name: str) -> None:
        self.module, self.compiled, self.name = module, compiled, name
        self.plain: Callable[..., Any] = module._call_impl
        self.failed = self.proven = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        if self.failed or not self.module.training:
            return self.plain(*args, **kwargs)
        with _kept_random_state(not self.proven) as back:
            try:
                with _gradient_at_once():
                    result = self.compiled(*args, **kwargs)
                self.proven = True
                return result
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                back()
                result = self.plain(*args, **kwargs)
                self.failed = True
                log.warning(
                    "torch.compile failed on %s, which runs uncompiled from now on: %s", self.name, _cause(error)
                )
                return result


def _gradient_at_once() -> AbstractContextManager[Any]:
    """Compile the backward pass with the forward pass, so that its failure shows where it can still be mended."""
    config: Any = torch._functorch.config
    if not hasattr(config, "force_non_lazy_backward_lowering"):  # of newer torch; a failure then stops the run
        return nullcontext()
    context: AbstractContextManager[Any] = config.patch(force_non_lazy_backward_lowering=True)
    return context


@contextmanager
def _kept_random_state(wanted: bool) -> Iterator[Callable[[], None]]:
    """Give a function that puts the random numbers back, if ``wanted``: a failed attempt may have drawn some."""
    state = torch.get_rng_state() if wanted else None
    cuda = torch.cuda.get_rng_state() if wanted and torch.cuda.is_available() else None

    def back() -> None:
        if state is not None:
            torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    yield back


def _cause(error: BaseException) -> str:
    """Return an error in one line: of one that wraps another, the other."""
    inner = getattr(error, "inner_exception", None) or error.__cause__  # dynamo's name for it
    if inner is not None:
        return _cause(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
