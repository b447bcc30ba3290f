"""The device stage: copies batches to the training device and normalises them there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def normalise(images: Tensor, table: Tensor) -> Tensor:
    """Look every byte up in its channel's table, so that all devices give the CPU path's bits.

    Pure.

    Args:
        images: uint8, shape (N, 3, H, W), contiguous or channels_last.
        table: shape (3, 256), on the same device.

    Returns:
        Tensor of the table's dtype, with the shape and memory format of images.
    """
    channels_last = not images.is_contiguous()
    physical = images.permute(0, 2, 3, 1) if channels_last else images
    first = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=images.device)
    index = physical.to(torch.int32) + (first if channels_last else first.view(3, 1, 1))
    values = table.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)
    return values.permute(0, 3, 1, 2) if channels_last else values


def to_device(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts; keep all else."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, function) for v in value)
    if isinstance(value, dict):
        return {k: to_device(v, function) for k, v in value.items()}
    return value


def pinned(tensor: Tensor) -> Tensor:
    """Return the tensor in page-locked memory; itself if it is there already, or on a GPU."""
    return tensor if tensor.device.type != "cpu" or tensor.is_pinned() else tensor.pin_memory()


def stay_on_cpu(batches: Iterator[tuple[Any, Callable[[], None]]], *, pin: bool) -> Iterator[Any]:
    """Yield batches that stay on the CPU, in page-locked memory if `pin`; see `CudaFeeder`."""
    for batch, delivered in batches:
        delivered()
        yield to_device(batch, pinned) if pin else batch


class CudaFeeder:
    """Copies batches to a GPU on a side stream, ahead of the training stream.

    While the script trains on a batch, the next ones are copied and normalised. The script's
    stream waits for the copy of the batch that it gets; the host does not wait.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Any, Callable[[], None]]],
        stream: torch.cuda.Stream,
        table: Tensor | None,
        depth: int,
    ) -> None:
        """Args:
        batches: pairs of a batch and a function to call when the script gets it.
        stream: the stream of the GPU for the copies.
        table: shape (3, 256), on the GPU, to normalise uint8 images; None: images stay as they are.
        depth: number of batches copied ahead.
        """
        self._batches = batches
        self._device = stream.device
        self._stream = stream
        self._table = table
        self._depth = depth
        self._ahead: deque[tuple[Any, torch.cuda.Event, Callable[[], None]]] = deque()
        self._end: BaseException | None = None  # raised after the batches before it
        # The table was copied on the script's stream: the side stream must not read it earlier.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _copy_one(self) -> bool:
        if self._end is not None:
            return False
        try:
            batch, delivered = next(self._batches)
        except (Exception, StopIteration) as end:
            self._end = end
            return False
        with torch.cuda.stream(self._stream):
            moved = to_device(batch, lambda t: pinned(t).to(self._device, non_blocking=True))
            if self._table is not None:
                moved[0] = normalise(moved[0], self._table)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._ahead.append((moved, event, delivered))
        return True

    def __iter__(self) -> CudaFeeder:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch; the current stream waits for its copy."""
        while len(self._ahead) <= self._depth and self._copy_one():
            pass
        if not self._ahead:
            assert self._end is not None
            raise self._end
        batch, event, delivered = self._ahead.popleft()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)

        def used_on_stream(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        to_device(batch, used_on_stream)
        delivered()
        return batch
