"""Random numbers of Python transforms, as a function of the sample's key."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from imagenet_seq.native.recipe import Key

_global_state_lock = threading.RLock()  # reentrant: a transform may use loader.dataset[i]


def _renew_lock() -> None:
    """Replace the lock in a forked child: a thread of the parent may have held it."""
    global _global_state_lock
    _global_state_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def reproducible(key: Key, one_at_a_time: bool) -> Iterator[None]:
    """Make all random numbers drawn inside, on this thread, a function of the key.

    torch's operators get a generator of the sample's own, so threads neither wait for each other
    nor touch torch's global state. `random` and NumPy have only global state: with `one_at_a_time`
    it is set and restored under a lock. Not covered: another thread of the user that draws from
    them meanwhile, and generators that a transform owns.
    """
    seed = _tail_seed(key)
    if not one_at_a_time:
        with _FilteredInjection(seed):
            yield
        return
    with _global_state_lock:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        try:
            with _InjectGenerator(seed):
                yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _tail_seed(key: Key) -> int:
    """Hash a key into a seed of 64 bits."""
    packed = struct.pack("<Qqq", *key)
    return int.from_bytes(
        hashlib.blake2b(packed, digest_size=8, person=b"imseq tail").digest(), "little"
    )


class _InjectGenerator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes a generator to every operator that torch tags as drawing random numbers.

    The numbers drawn are those after ``torch.manual_seed(seed)``.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func.overloadpacket in _FILLS:
            return _filled(_FILLS[func.overloadpacket], self._generator, *args, **kwargs)
        return _overload_with_generator(func)(*args, **{**kwargs, "generator": self._generator})


class _FilteredInjection(TorchFunctionMode):
    """The same for torchvision's own code: only calls that may draw run under `_InjectGenerator`.

    `_InjectGenerator` costs 12 us an operator, this filter 3 us: for RandAugment 0.1 instead of
    0.4 ms an image. It can't see into compiled functions (torch.jit); torchvision's transforms call
    none.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._inject = _InjectGenerator(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _may_draw(func):
            return func(*args, **(kwargs or {}))
        with self._inject:
            return func(*args, **(kwargs or {}))


# In older torch these take no generator; torch itself computes them by these methods.
_FILLS = {
    torch.ops.aten.rand_like: "uniform_",
    torch.ops.aten.randn_like: "normal_",
    torch.ops.aten.randint_like: "random_",
}


def _filled(
    method: str, generator: torch.Generator, like: torch.Tensor, *bounds: Any, **options: Any
) -> torch.Tensor:
    fill: Callable[..., torch.Tensor] = getattr(torch.empty_like(like, **options), method)
    low_high = (0, *map(int, bounds))[-2:] if bounds else ()
    return fill(*low_high, generator=generator)


def _is_random(operator: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operator.tags


@lru_cache(maxsize=1024)
def _may_draw(func: Any) -> bool:
    """Return whether a function of torch's Python API may call a random operator."""
    if hasattr(func, "__code__"):  # written in Python: it may call anything
        return True
    packet: Any = getattr(torch.ops.aten, getattr(func, "__name__", ""), None)
    overloads = packet.overloads() if hasattr(packet, "overloads") else []
    return any(_is_random(getattr(packet, name)) for name in overloads)


@lru_cache(maxsize=1024)
def _overload_with_generator(operator: Any) -> Any:
    """Return the operator if it takes `generator`, else its overload that also does."""

    def arguments(overload: Any) -> list[str]:
        return [argument.name for argument in overload._schema.arguments]

    wanted = [name for name in arguments(operator) if name != "generator"]
    packet = operator.overloadpacket
    for overload in [operator, *(getattr(packet, name) for name in packet.overloads())]:
        names = arguments(overload)
        if "generator" in names and [name for name in names if name != "generator"] == wanted:
            return overload
    raise RuntimeError(
        f"the transform calls {operator}, which draws random numbers but takes no generator: "
        "its result could not be reproduced. Replace it, for example by torch.rand and arithmetic."
    )
