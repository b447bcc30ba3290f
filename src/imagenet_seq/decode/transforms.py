"""Interprets a torchvision transform: it becomes a recipe for the core and a Python part.

`interpret` reads a transform from the left. The longest prefix of members that the core implements
exactly becomes a `Recipe`, which the core runs without the GIL; from the next member on everything
runs in Python, on what that member would have received. Both give torchvision's result bit for bit;
only the random numbers differ, because here they are a function of (seed, epoch, sample).

torchvision is not imported here: if a transform has its classes, it is loaded already.
Supported: torchvision 0.16 (the release for torch 2.1) to 0.28, Pillow from 10.1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from imagenet_seq.decode.pipeline import Pipeline, refuse_floats_as_bytes
from imagenet_seq.native.recipe import Center, Dtype, Filter, Geometry, Layout, Passes, Recipe, Rows

_DTYPES = {
    torch.uint8: Dtype.UINT8,
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
}
_MAX_SIDE = 1 << 16  # of an output, a resize or a crop: the core's limit, above JPEG's own


# ---- what the core knows -------------------------------------------------------------------------


class _NotInCoreError(Exception):
    """The core does not implement this member here; the message tells the user why."""


@dataclass(frozen=True)
class _Prefix:
    """The combined effect of the members read so far."""

    fields: Mapping[str, Any] = field(default_factory=dict)  # of the recipe
    size: tuple[int, int] | None = None  # output (height, width); None while images differ in it
    has_geometry: bool = False
    has_crop: bool = False
    num_flips: int = 0
    flip_probability: float = 0.0
    # The members so far, applied to an image of one row with the 256 byte values in three channels.
    # Conversions are elementwise, so this describes them completely.
    value: Any = field(default_factory=lambda: Image.fromarray(_all_bytes()))

    @property
    def is_image(self) -> bool:
        return isinstance(self.value, Image.Image)

    @property
    def table(self) -> torch.Tensor | None:
        """The (3, 256) values of the bytes; None if they are the bytes themselves."""
        if self.is_image or self.value.dtype == torch.uint8:
            return None
        plain: torch.Tensor = self.value.as_subclass(torch.Tensor)
        return plain.reshape(3, 256).clone(memory_format=torch.contiguous_format)

    def fits_core(self) -> bool:
        """Return whether the core can produce exactly this."""
        if self.size is None or self.is_image:
            return self.size is not None
        if self.value.dtype == torch.uint8:
            return bool((self.value == torch.arange(256)).all())
        return self.value.dtype in _DTYPES


def _all_bytes() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise _NotInCoreError(reason)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _sides(size: Any) -> tuple[int, ...]:
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size,)
    _require(
        len(sides) in (1, 2) and all(type(s) is int and 1 <= s <= _MAX_SIDE for s in sides),
        f"size={size!r} is not one or two integers from 1 to {_MAX_SIDE}",
    )
    return sides


def _height_and_width(size: Any) -> tuple[int, int]:
    sides = _sides(size)
    return sides[0], sides[-1]


def _interpolation(value: Any) -> Filter:
    # An InterpolationMode, its name, or Pillow's number.
    names = {"box": Filter.BOX, "bilinear": Filter.BILINEAR, "bicubic": Filter.BICUBIC}
    numbers = {4: Filter.BOX, 2: Filter.BILINEAR, 3: Filter.BICUBIC}
    name = getattr(value, "value", value)
    found = numbers.get(name) if type(name) is int else names.get(name)
    if found is None:
        raise _NotInCoreError(f"interpolation {name!r} is not implemented in the core")
    return found


def _require_image(prefix: _Prefix, name: str) -> None:
    _require(
        prefix.is_image,
        f"{name} of a tensor is not Pillow's (other pixels); put ToImage, PILToTensor or ToTensor "
        f"behind {name} and it runs in the core",
    )
    _require(prefix.num_flips == 0, f"a flip comes before {name}; put it behind")


def _random_resized_crop(prefix: _Prefix, member: Any) -> _Prefix:
    _require_image(prefix, "RandomResizedCrop")
    _require(not prefix.has_geometry, "the image has been resized or cropped before")
    size = _height_and_width(member.size)
    for name, lowest in (("scale", 0.0), ("ratio", 1e-9)):
        bounds = getattr(member, name)
        _require(
            isinstance(bounds, Sequence)
            and len(bounds) == 2
            and all(map(_is_number, bounds))
            and lowest <= bounds[0] <= bounds[1] <= 1e9,
            f"{name}={bounds!r} is not (min, max) with {lowest:g} <= min <= max <= 1e9",
        )
    fields = {
        "geometry": Geometry.RANDOM_RESIZED_CROP,
        "filter": _interpolation(member.interpolation),
        "scale_min": float(member.scale[0]),
        "scale_max": float(member.scale[1]),
        "ratio_min": float(member.ratio[0]),
        "ratio_max": float(member.ratio[1]),
    }
    return replace(prefix, fields=fields, size=size, has_geometry=True, has_crop=True)


def _resize(prefix: _Prefix, member: Any) -> _Prefix:
    _require_image(prefix, "Resize")
    _require(not prefix.has_geometry, "the image has been resized or cropped before")
    _require(member.size is not None, "size=None is not implemented in the core")
    sides = _sides(member.size)
    limit = member.max_size
    fields = {
        "geometry": Geometry.RESIZE_CROP,
        "filter": _interpolation(member.interpolation),
        "resize_height": sides[0],
    }
    if len(sides) == 2:
        _require(limit is None, "max_size goes with one size only")
        fields["resize_width"] = sides[1]
        return replace(prefix, fields=fields, size=(sides[0], sides[1]), has_geometry=True)
    if limit is not None:
        is_above = type(limit) is int and sides[0] < limit <= _MAX_SIDE
        _require(is_above, f"max_size={limit!r} is not an integer above size")
        fields["resize_max"] = limit
    return replace(prefix, fields=fields, has_geometry=True)


def _center_crop(prefix: _Prefix, member: Any) -> _Prefix:
    _require_image(prefix, "CenterCrop")
    _require(not prefix.has_crop, "the image has been cropped before")
    size = _height_and_width(member.size)
    fields = {
        **prefix.fields,
        "geometry": Geometry.RESIZE_CROP,
        "crop_height": size[0],
        "crop_width": size[1],
        "center_rule": _center_rule(type(member)),
    }
    return replace(prefix, fields=fields, size=size, has_geometry=True, has_crop=True)


def _center_rule(center_crop: Callable[[int], Callable[[Any], Any]]) -> Center:
    """Find out how the installed CenterCrop rounds offsets of 0.5 and 1.5 pixels.

    Measured, not looked up by version: torchvision 0.16 to 0.28 all have int(round(n / 2.0)), 0.8
    and 0.9 rounded up, and rounding down is proposed from time to time.
    """
    probe = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4))
    kept = int(np.asarray(center_crop(1)(probe))[0, 0])  # 4 * top + left
    _require(
        kept in (1, 2), "this torchvision's CenterCrop rounds in a way that the core does not know"
    )
    return Center.ROUND if kept == 2 else Center.FLOOR


def _horizontal_flip(prefix: _Prefix, member: Any) -> _Prefix:
    # A flip commutes with everything elementwise, and two flips in a row are one flip or none.
    p, q = member.p, prefix.flip_probability
    _require(_is_number(p) and 0 <= p <= 1, f"p={p!r} is not a number from 0 to 1")
    either = p * (1.0 - q) + q * (1.0 - p)
    return replace(prefix, flip_probability=either, num_flips=prefix.num_flips + 1)


def _elementwise(prefix: _Prefix, member: Any) -> _Prefix:
    try:
        value = member(prefix.value)
    except Exception as error:
        raise _NotInCoreError(
            f"it raises {type(error).__name__} ({error}) on what it receives"
        ) from error
    is_tensor = isinstance(value, torch.Tensor) and value.shape == (3, 1, 256)
    _require(is_tensor or isinstance(value, Image.Image), "it returns no image tensor")
    return replace(prefix, value=value)


def _normalize(prefix: _Prefix, member: Any) -> _Prefix:
    for name in ("mean", "std"):
        value = torch.as_tensor(getattr(member, name))
        is_per_channel = value.ndim <= 1 and value.numel() in (1, 3)
        _require(is_per_channel, f"{name} is not one number per channel")
    return _elementwise(prefix, member)


# Class name in torchvision.transforms and torchvision.transforms.v2 -> the function that reads a
# member, and the attributes of a member that nobody has modified.
_KNOWN: dict[str, tuple[Callable[[_Prefix, Any], _Prefix], str]] = {
    "RandomResizedCrop": (
        _random_resized_crop,
        "size scale ratio interpolation antialias _log_ratio",
    ),
    "Resize": (_resize, "size interpolation max_size antialias"),
    "CenterCrop": (_center_crop, "size"),
    "RandomHorizontalFlip": (_horizontal_flip, "p"),
    "Normalize": (_normalize, "mean std inplace"),
    "ToDtype": (_elementwise, "dtype scale"),
    "ConvertImageDtype": (_elementwise, "dtype"),
    "ToTensor": (_elementwise, ""),
    "PILToTensor": (_elementwise, ""),
    "ToImage": (_elementwise, ""),
    "ToPureTensor": (_elementwise, ""),
}
_MODULE_ATTRIBUTES = vars(torch.nn.Module())


def _torchvision_name(member: Any) -> str | None:
    """Return the name by which torchvision exports this very class; None for any other class."""
    name = type(member).__name__
    for module in ("torchvision.transforms", "torchvision.transforms.v2"):
        if getattr(sys.modules.get(module), name, None) is type(member):
            return name
    return None


def _is_unmodified(member: Any, attributes: Sequence[str]) -> bool:
    """Return whether no hook was registered and no method replaced on the object."""
    return all(
        name in attributes
        or name == "training"
        or (name in _MODULE_ATTRIBUTES and value == _MODULE_ATTRIBUTES[name])
        for name, value in vars(member).items()
    )


def _read(prefix: _Prefix, member: Any) -> _Prefix:
    if type(member) is torch.nn.Identity and _is_unmodified(member, []):
        return prefix
    name = _torchvision_name(member)
    if name is None:
        raise _NotInCoreError(
            f"{_label(member)} is not a torchvision class that the core knows; "
            "subclasses and functions are not looked into"
        )
    if name not in _KNOWN:
        raise _NotInCoreError(f"{name} is not implemented in the core")
    reader, attributes = _KNOWN[name]
    _require(
        _is_unmodified(member, attributes.split()),
        "it has been modified (attributes or hooks added)",
    )
    return reader(prefix, member)


def _label(member: Any) -> str:
    return getattr(member, "__qualname__", None) or type(member).__qualname__


def _flatten(transform: Any) -> list[Any]:
    """Return the members of nested Compose and nn.Sequential objects, in order."""
    if type(transform) is torch.nn.Sequential and _is_unmodified(transform, ["_modules"]):
        members: Any = list(transform)
    elif _torchvision_name(transform) == "Compose" and _is_unmodified(transform, ["transforms"]):
        members = transform.transforms
    else:
        return [transform]
    return [inner for member in members for inner in _flatten(member)]


# ---- interpretation ------------------------------------------------------------------------------

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def interpret(
    transform: Callable[[Any], Any] | None,
    *,
    train: bool,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    pillow: str | None = None,
    strict: bool = False,
) -> Pipeline:
    """Divide a transform into the core's part and the Python part.

    Conversion and normalisation become a table of 3 x 256 values, made here by running the user's
    own objects on all bytes. ToTensor reads torch's default dtype here, not for every image.

    Args:
        transform: any callable from a PIL image, as torchvision's ImageFolder takes. None: the
            standard ImageNet ones: RandomResizedCrop(224) and RandomHorizontalFlip for training,
            Resize(256) and CenterCrop(224) otherwise; then ToTensor and Normalize, which
            dtype=torch.uint8 leaves out.
        train: which of the standard transforms.
        dtype: uint8, float32, float16 or bfloat16: the transform's result is converted as by
            ``.to(dtype)`` (bytes 0..255 stay 0..255). None: the transform's own dtype.
        channels_last: rows lie in memory as height x width x channel.
        pillow: Pillow version whose resize is to be matched, such as "12"; None: the installed one.
        strict: decode unpacked images in full, which finds damage outside the crop.

    Raises:
        TypeError: transform is not callable.
        ValueError: dtype is not implemented, or would cut off the transform's values; the pillow
            version is unknown, or can't be honoured.
    """
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be callable or None, got {type(transform).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise ValueError(f"dtype must be one of {names} or None, got {dtype}")
    passes = pass_order(pillow)
    members = [] if transform is None else _flatten(transform)
    prefix: _Prefix | None
    if transform is None:
        num_core, prefix, reason = 0, _standard(train, dtype), None
    else:
        num_core, prefix, reason = _longest_prefix(members, dtype)
    in_python = tuple(members[num_core:])
    notes = _notes(members, num_core, reason)
    from_bytes = Pipeline(
        recipe=Recipe(Geometry.RESIZE_CROP, 1, 1, passes=passes, crop_height=1, crop_width=1),
        rows=Rows.FROM_BYTES,
        out_shape=None,
        dtype=dtype,
        channels_last=channels_last,
        table=None,
        tail=(),
        notes=notes,
        _transform=transform,
        _tail_type=Image.Image,
        _one_at_a_time=not all(map(_draws_from_torch_only, in_python)),
    )
    if prefix is None:
        if passes != pass_order():
            raise ValueError(
                f"pillow={pillow!r} can't be honoured, because Pillow {PIL.__version__} does it: "
                + notes[0]
            )
        return from_bytes
    if prefix.is_image and not in_python and dtype is not None:
        raise ValueError(
            f"dtype={dtype} needs a transform that ends in a tensor; this one ends in a PIL image. "
            "Append ToTensor() or PILToTensor()."
        )
    rows = Rows.FINISHED_BY_PYTHON if in_python or prefix.is_image else Rows.DECODED
    recipe = _recipe(prefix, passes, _layout(rows, prefix, channels_last), strict)
    return replace(
        from_bytes,
        recipe=recipe,
        rows=rows,
        out_shape=(3, recipe.out_height, recipe.out_width),
        dtype=prefix.value.dtype if rows is Rows.DECODED else dtype,
        table=prefix.table,
        tail=in_python,
        _tail_type=Image.Image if prefix.is_image else type(prefix.value),
    )


def pass_order(pillow: str | None = None) -> Passes:
    """Return which of the two passes of a resize comes first in a version of Pillow.

    Pillow 10.4 to 12.2 always run the horizontal pass first; 13.0 runs the vertical one first
    exactly when the height shrinks by more than twice what the width shrinks by. Checked with
    these versions on 6000 random shapes; later versions are assumed to be like 13.

    Args:
        pillow: a version such as "12" or "12.2.0"; None: the installed one.

    Raises:
        ValueError: not a version, or one before 10.
    """
    version = PIL.__version__ if pillow is None else pillow
    major = version.split(".")[0]
    if not major.isdecimal() or int(major) < 10:
        raise ValueError(
            f"pillow must be a version of Pillow from 10 on, such as '12' or '13', got {pillow!r}"
        )
    return Passes.PILLOW_13 if int(major) >= 13 else Passes.HORIZONTAL_FIRST


def _standard(train: bool, dtype: torch.dtype | None) -> _Prefix:
    """Return the effect of the standard transforms; torchvision need not be installed."""
    if train:
        fields: dict[str, Any] = {
            "geometry": Geometry.RANDOM_RESIZED_CROP,
            "scale_min": 0.08,
            "scale_max": 1.0,
            "ratio_min": 3.0 / 4.0,
            "ratio_max": 4.0 / 3.0,
        }
    else:
        fields = {
            "geometry": Geometry.RESIZE_CROP,
            "resize_height": 256,
            "crop_height": 224,
            "crop_width": 224,
        }
    value = torch.from_numpy(_all_bytes()).permute(2, 0, 1).contiguous()
    if dtype != torch.uint8:
        # The operations of torchvision's ToTensor and Normalize, one by one.
        value = value.to(torch.get_default_dtype()).div(255)
        mean = torch.as_tensor(_MEAN, dtype=value.dtype).view(-1, 1, 1)
        std = torch.as_tensor(_STD, dtype=value.dtype).view(-1, 1, 1)
        value = value.sub_(mean).div_(std).to(dtype or value.dtype)
    if value.dtype not in _DTYPES:
        raise ValueError(
            f"the standard transform gives torch's default dtype, {value.dtype}, which is not "
            "implemented; pass dtype=torch.float32"
        )
    return _Prefix(fields, size=(224, 224), flip_probability=0.5 if train else 0.0, value=value)


def _longest_prefix(
    members: Sequence[Any], dtype: torch.dtype | None
) -> tuple[int, _Prefix | None, str | None]:
    """Return how many members the core runs, their effect (None: none), and why no more."""
    prefix, num_core, best, reason = _Prefix(), 0, None, None
    for num_read, member in enumerate(members, 1):
        try:
            prefix = _read(prefix, member)
        except _NotInCoreError as error:
            reason = str(error)
            break
        if num_read == len(members) and dtype is not None and not prefix.is_image:
            refuse_floats_as_bytes(prefix.value.dtype, dtype)
            prefix = replace(prefix, value=prefix.value.to(dtype))
        if prefix.fits_core():
            num_core, best = num_read, prefix
    if reason is None and prefix.size is None:
        reason = "no member of it gives every image the same size (CenterCrop would)"
    elif reason is None and num_core < len(members):
        reason = f"{prefix.value.dtype} with these values is not implemented in the core"
    return num_core, best, reason


def _layout(rows: Rows, prefix: _Prefix, channels_last: bool) -> Layout:
    if rows is not Rows.DECODED:
        # The Python part gets the strides it would have got: PILToTensor permutes, ToTensor copies.
        channels_last = prefix.is_image or prefix.value.stride(-1) == 3
    return Layout.HWC if channels_last else Layout.CHW


def _recipe(prefix: _Prefix, passes: Passes, layout: Layout, strict: bool) -> Recipe:
    assert prefix.size is not None  # see fits_core
    table = prefix.table
    return Recipe(
        **prefix.fields,
        out_height=prefix.size[0],
        out_width=prefix.size[1],
        passes=passes,
        dtype=Dtype.UINT8 if table is None else _DTYPES[table.dtype],
        layout=layout,
        strict=int(strict),
        flip_probability=prefix.flip_probability,
        max_pixels=Image.MAX_IMAGE_PIXELS or 0,
        table=None if table is None else table.view(torch.uint8).numpy(),
    )


def _notes(members: Sequence[Any], num_core: int, reason: str | None) -> tuple[str, ...]:
    if reason is None:
        return ()
    what = "the whole transform runs in Python"
    if num_core > 0:
        what = f"{_label(members[num_core])} (member {num_core + 1} of {len(members)}) "
        what += "and what follows it run in Python" if members[num_core + 1 :] else "runs in Python"
    notes = [f"{what}, because {reason}"]
    if not all(map(_draws_from_torch_only, members[num_core:])):
        notes.append(
            "the Python part has members that may draw from `random` or NumPy, so it handles one "
            "sample at a time"
        )
    return tuple(notes)


# torchvision's classes that call the user's functions, or draw from `random`.
_NOT_TORCH_ONLY = {
    "torchvision.transforms.transforms.Lambda",
    "torchvision.transforms.transforms.RandomChoice",
    "torchvision.transforms.transforms.RandomOrder",
    "torchvision.transforms.v2._misc.Lambda",
}


def _draws_from_torch_only(member: Any) -> bool:
    """Return whether a member draws from torch only: it and its members are torchvision's."""
    cls = type(member)
    if _torchvision_name(member) is None or f"{cls.__module__}.{cls.__name__}" in _NOT_TORCH_ONLY:
        return False
    return all(map(_draws_from_torch_only, getattr(member, "transforms", ())))
