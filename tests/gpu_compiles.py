"""Compiling steps for GPUs in less time, where no figure depends on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from visionfm_jax.planning import compiled


@contextlib.contextmanager
def without_softmax_kernels(*flags: str) -> Iterator[None]:
    """Compiles by `planning.compiled` leave out XLA's pass that makes one kernel of a softmax, and take more `flags`.

    That pass and what follows of it take a third of a compile and more, and change estimated seconds by 3 %; what
    travels, what is computed, and the peak of full-size steps (to 4 digits) are the same.
    """
    before = compiled.COMPILE_ONLY_FLAGS
    compiled.COMPILE_ONLY_FLAGS = (*before, "--xla_disable_hlo_passes=triton-softmax-rewriter", *flags)
    try:
        yield
    finally:
        compiled.COMPILE_ONLY_FLAGS = before
