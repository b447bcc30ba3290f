"""What is made of each sample: the part that the core does, and the Python part behind it."""

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


def images_of(memory: Tensor, recipe: Recipe) -> Tensor:
    """View a batch's memory as images of shape (N, 3, H, W), whatever its layout."""
    return memory.permute(0, 3, 1, 2) if recipe.layout == Layout.HWC else memory


def memory_shape(pipeline: Pipeline, recipe: Recipe) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of a row as it lies in memory; empty where Python makes it all."""
    if pipeline.out_shape is None:
        return (0,), torch.uint8
    channels, height, width = pipeline.out_shape
    hwc = recipe.layout == Layout.HWC
    shape = (height, width, channels) if hwc else (channels, height, width)
    dtype = torch.uint8 if recipe.table is None or pipeline.table is None else pipeline.table.dtype
    return shape, dtype


def one_sample(pipeline: Pipeline, data: bytes, key: Key) -> Any:
    """Return what the pipeline makes of one encoded image, as a row of a batch would be."""
    if pipeline.rows == Rows.FROM_BYTES:
        return pipeline.from_bytes(data, key)
    shape, dtype = memory_shape(pipeline, pipeline.recipe)
    memory = torch.empty((1, *shape), dtype=dtype)
    if not native.decode(pipeline.recipe, key, data, memory.data_ptr()):
        decode_with_pillow(pipeline, pipeline.recipe, data, key, memory.data_ptr())
    row = images_of(memory, pipeline.recipe)[0]
    return pipeline.finish(row, key) if pipeline.rows == Rows.FINISHED_BY_PYTHON else row


def decode_with_pillow(pipeline: Pipeline, recipe: Recipe, data: bytes, key: Key, row: int) -> None:
    """Fill the row at an address from an image that the core does not decode."""
    pixels = np.ascontiguousarray(pipeline.open_image(data))
    if not native.apply(recipe, key, pixels, row):
        height, width, _ = pixels.shape
        raise ValueError(
            f"the transform turns this image of {width} x {height} pixels into another size than "
            f"{recipe.out_width} x {recipe.out_height}, so it can't be batched; add a "
            "RandomResizedCrop or a CenterCrop"
        )


@dataclass(frozen=True, eq=False)
class Pipeline:
    """An interpreted transform: what the core does and what Python does after it.

    Immutable; every method may run on any thread at once.

    Attributes:
        recipe: the core's part. With `Rows.FROM_BYTES` it is valid and unused.
        rows: DECODED: the core's row is the result. FINISHED_BY_PYTHON: `finish` makes the result
            of it. FROM_BYTES: `from_bytes` makes the result of the encoded image.
        out_shape: (3, height, width) of the rows that the core writes; None with FROM_BYTES.
        dtype: element type of the results where known before the first one, otherwise None.
        channels_last: asked for by the caller: batches are to lie in memory as NHWC.
        table: (3, 256) values that the core's rows take for (channel, byte); None where the rows
            are uint8. Applied to the rows of `uint8_recipe`, on any device, it gives the same.
        tail: members of the transform that run in Python after the core, in order.
        notes: sentences for the user: what runs in Python, why, and what would change that.
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
    _one_at_a_time: bool  # the Python part may draw from `random` or NumPy, whose state is global

    @property
    def uint8_recipe(self) -> Recipe:
        """The recipe without the table: rows of bytes, for a device that applies `table` itself."""
        return replace(self.recipe, dtype=Dtype.UINT8, table=None)

    def open_image(self, data: bytes) -> Image.Image:
        """Decode an image with Pillow, as torchvision's ImageFolder does.

        Ignores the EXIF orientation and follows the user's Pillow settings, such as
        ``ImageFile.LOAD_TRUNCATED_IMAGES``: torchvision.datasets.folder.pil_loader, 0.16 to 0.28.

        Raises:
            OSError, SyntaxError, ValueError: Pillow's own, for bytes that it can't decode.
        """
        return Image.open(io.BytesIO(data)).convert("RGB")

    def finish(self, row: torch.Tensor, key: Key) -> Any:
        """Run the Python part on a row that the core has written.

        Deterministic: a function of the row and the key (see `reproducible` for its limits).

        Args:
            row: tensor of shape `out_shape`, dtype and layout as the recipe says. Not changed.
            key: (seed, epoch, sample).

        Returns:
            What the last member of the transform returns, in the dtype asked for.
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

        Deterministic as `finish`; the random numbers are not those of the core's recipe.

        Args:
            data: the encoded image.
            key: (seed, epoch, sample).

        Raises:
            ValueError: there is no Python transform, because the standard one was interpreted.
            Exception: what Pillow or the transform raises for this image.
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
    if want == torch.uint8 and have.is_floating_point:
        raise ValueError(
            f"dtype=torch.uint8 would cut the transform's {have} values to integers; end the "
            "transform with PILToTensor() instead of ToTensor() and Normalize()"
        )
