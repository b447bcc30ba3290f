"""An interpreted transform at work: the core's part of it, and the Python part that follows."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagenet_seq import native
from imagenet_seq.decode.random import reproducible
from imagenet_seq.native.recipe import Dtype, Key, Layout, Recipe, Rows


@dataclass(frozen=True, eq=False)
class Pipeline:
    """An interpreted transform: the core's part, and the Python part that follows.

    Immutable; any method may run on several threads at once.

    Attributes:
        recipe: the core's part. With `Rows.FROM_BYTES` it is valid but not used.
        rows: DECODED: the core's row is the result. FINISHED_BY_PYTHON: `finish` turns that row
            into the result. FROM_BYTES: `from_bytes` makes the result from the encoded image.
        out_shape: (3, height, width) of the rows that the core writes; None with FROM_BYTES.
        dtype: element type of the results; None if it is not known before the first result.
        channels_last: whether batches lie in memory as NHWC.
        table: (3, 256) values by (channel, byte) in the core's rows; None if the rows are uint8.
            Looking up the rows of `uint8_recipe` in it gives the same rows, on any device.
        tail: members of the transform that run in Python after the core, in order.
        notes: sentences for the user: what runs in Python, why, and how to change that.
    """

    recipe: Recipe
    rows: Rows
    out_shape: tuple[int, int, int] | None
    dtype: torch.dtype | None
    channels_last: bool
    table: torch.Tensor | None
    tail: tuple[Callable[[Any], Any], ...]
    notes: tuple[str, ...]
    _transform: Callable[[Any], Any] | None
    _tail_type: type  # what the core's row becomes before the tail: an Image, or a class of tensors
    _one_at_a_time: bool  # the Python part may draw from `random` or NumPy: their state is global

    @property
    def uint8_recipe(self) -> Recipe:
        """The recipe without the table: rows of bytes, for a device that looks them up itself."""
        return replace(self.recipe, dtype=Dtype.UINT8, table=None)

    def decode_one(self, data: bytes, key: Key) -> Any:
        """Decode one image, with the same result as a row of a batch."""
        if self.rows == Rows.FROM_BYTES:
            return self.from_bytes(data, key)
        shape, dtype = memory_shape(self, self.recipe)
        memory = torch.empty((1, *shape), dtype=dtype)
        if not native.decode(self.recipe, key, data, memory.data_ptr()):
            self.decode_with_pillow(self.recipe, data, key, memory.data_ptr())
        row = images_of(memory, self.recipe)[0]
        return self.finish(row, key) if self.rows == Rows.FINISHED_BY_PYTHON else row

    def open_image(self, data: bytes) -> Image.Image:
        """Decode an image with Pillow, as torchvision's ImageFolder does.

        Ignores the EXIF orientation and follows the user's Pillow settings, such as
        ``ImageFile.LOAD_TRUNCATED_IMAGES``: torchvision.datasets.folder.pil_loader, 0.16 to 0.28.

        Raises:
            OSError, SyntaxError, ValueError: Pillow's own, for bytes that it can't decode.
        """
        return Image.open(io.BytesIO(data)).convert("RGB")

    def decode_with_pillow(self, recipe: Recipe, data: bytes, key: Key, row: int) -> None:
        """Fill the row at address `row` from an image that the core does not decode.

        `recipe` is the attribute of that name, or `uint8_recipe`.

        Raises:
            ValueError: the transform gives another size than that of the other images.
            Exception: Pillow's own, for bytes that it can't decode.
        """
        pixels = np.ascontiguousarray(self.open_image(data))
        if not native.apply(recipe, key, pixels, row):
            height, width, _ = pixels.shape
            raise ValueError(
                f"the transform turns this image of {width} x {height} pixels into another size "
                f"than {recipe.out_width} x {recipe.out_height}, so it can't be batched; add a "
                "RandomResizedCrop or a CenterCrop"
            )

    def finish(self, row: torch.Tensor, key: Key) -> Any:
        """Run the Python part on a row that the core has written; the row is not changed.

        Deterministic: a function of row and key (`reproducible` states the limits).
        """
        value: Any
        if self._tail_type is Image.Image:
            value = Image.fromarray(row.permute(1, 2, 0).contiguous().numpy())
        else:
            value = row.clone().as_subclass(self._tail_type)
        with reproducible(key, self._one_at_a_time):
            for member in self.tail:
                value = member(value)
        return self._converted(value)

    def from_bytes(self, data: bytes, key: Key) -> Any:
        """Decode with Pillow and run the whole transform in Python.

        Deterministic as `finish`; the random numbers differ from those of the core's recipe.

        Raises:
            ValueError: the transform is the standard one, which has no Python objects.
            Exception: whatever Pillow or the transform raises for this image.
        """
        if self._transform is None:
            raise ValueError(
                "the standard ImageNet transform can't be applied to this image: "
                "its resized size is out of bounds"
            )
        image = self.open_image(data)
        with reproducible(key, self._one_at_a_time):
            return self._converted(self._transform(image))

    def _converted(self, value: Any) -> Any:
        if self.dtype is None or getattr(value, "dtype", None) == self.dtype:
            return value
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"dtype={self.dtype} needs a transform that ends in a tensor; it returned "
                f"{type(value).__name__}. Leave dtype out, or append ToTensor or PILToTensor."
            )
        refuse_floats_as_bytes(value.dtype, self.dtype)
        return value.to(self.dtype)


def refuse_floats_as_bytes(have: torch.dtype, want: torch.dtype) -> None:
    """Raise a ValueError if values of dtype `have` would be cut off to bytes."""
    if want == torch.uint8 and have.is_floating_point:
        raise ValueError(
            f"dtype=torch.uint8 would cut the transform's {have} values to integers; end the "
            "transform with PILToTensor() instead of ToTensor() and Normalize()"
        )


def images_of(memory: Tensor, recipe: Recipe) -> Tensor:
    """View the memory of a batch as images of shape (N, 3, H, W), whatever its layout."""
    return memory.permute(0, 3, 1, 2) if recipe.layout == Layout.HWC else memory


def memory_shape(pipeline: Pipeline, recipe: Recipe) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of a row in memory; empty if Python makes the whole sample."""
    if pipeline.out_shape is None:
        return (0,), torch.uint8
    channels, height, width = pipeline.out_shape
    hwc = recipe.layout == Layout.HWC
    shape = (height, width, channels) if hwc else (channels, height, width)
    dtype = torch.uint8 if recipe.table is None or pipeline.table is None else pipeline.table.dtype
    return shape, dtype
