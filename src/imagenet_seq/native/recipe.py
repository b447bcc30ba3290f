"""What the core does to each sample: crop, resize, flip, conversion, layout."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

Key: TypeAlias = tuple[int, int, int]
"""(seed, epoch, sample): a sample's random numbers depend on these alone."""


class Geometry(IntEnum):
    """How the output's area is chosen (`IMSEQ_GEOMETRY_...`)."""

    RANDOM_RESIZED_CROP = 1
    RESIZE_CROP = 2
    FIXED_CROP = 3


class Filter(IntEnum):
    """Pillow's resampling filters that the core implements (`IMSEQ_FILTER_...`)."""

    BOX = 0
    BILINEAR = 1
    BICUBIC = 2


class Passes(IntEnum):
    """Order of the two passes of a resize (`IMSEQ_PASSES_...`); see `pass_order`."""

    HORIZONTAL_FIRST = 0
    PILLOW_13 = 1


class Center(IntEnum):
    """How CenterCrop rounds half a pixel (`IMSEQ_CENTER_...`)."""

    ROUND = 0
    FLOOR = 1


class Dtype(IntEnum):
    """Output types of the core (`IMSEQ_UINT8` and the others)."""

    UINT8 = 0
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3


class Layout(IntEnum):
    """Order of a row's values in memory (`IMSEQ_CHW`, `IMSEQ_HWC`)."""

    CHW = 0
    HWC = 1


class Rows(IntEnum):
    """Who fills the rows of a batch (`IMSEQ_ROWS_...`)."""

    DECODED = 0
    FINISHED_BY_PYTHON = 1
    FROM_BYTES = 2


@dataclass(frozen=True, eq=False)
class Recipe:
    """What the core does to every sample: the fields of `imseq_recipe`, explained there.

    `table` holds the bytes of 3 x 256 values of `dtype` (channel, byte); None for uint8.
    """

    geometry: Geometry
    out_height: int
    out_width: int
    filter: Filter = Filter.BILINEAR
    passes: Passes = Passes.PILLOW_13
    dtype: Dtype = Dtype.UINT8
    layout: Layout = Layout.CHW
    strict: int = 0
    scale_min: float = 0.0
    scale_max: float = 0.0
    ratio_min: float = 0.0
    ratio_max: float = 0.0
    resize_height: int = 0
    resize_width: int = 0
    resize_max: int = 0
    crop_height: int = 0
    crop_width: int = 0
    center_rule: Center = Center.ROUND
    fixed_top: int = 0
    fixed_left: int = 0
    fixed_height: int = 0
    fixed_width: int = 0
    fixed_flip: int = 0
    flip_probability: float = 0.0
    max_pixels: int = 0
    table: np.ndarray[Any, np.dtype[np.uint8]] | None = None
