"""What a source is, how a Loader with its defaults reads it, and what packing would change.

Facts are plain data, as `imagenet-seq info --json` prints them; `text` is for people.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from imagenet_seq import native
from imagenet_seq.index.mixing import label_runs
from imagenet_seq.index.source import Source
from imagenet_seq.read.arrange import (
    MEASURED_BYTES,
    WINDOW_SAMPLES,
    disk_of,
    num_readers,
    some_files,
    source_bytes,
)
from imagenet_seq.read.budget import ram_budget
from imagenet_seq.read.forecast import Forecast, Job, forecast_job
from imagenet_seq.read.speed import effective, speed_of
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.place import Found
from imagenet_seq.text import format_bytes, format_seconds

_SAMPLED = 200
"""Images whose headers are read, to know about how large all of them are."""


_SAMPLED_BLOCKS = 8
"""Of python blocks, whose images come at the price of the whole block."""


_HEAD_BYTES, _LONG_HEAD_BYTES = 64 << 10, 4 << 20
"""Read of an image for its header, and where the first bytes were too few."""


_BLOCK_BYTES = 16 << 20


_DECODING_GAIN = "about twice as fast (2.0 times with AVX2, 2.3 with AVX-512: docs/performance.md)"


def forecast_of(source: Source, ram_wish: str, ranks: int, measure: bool) -> Forecast:
    """Forecast training as a Loader with its defaults would read the source.

    Args:
        source: the data.
        ram_wish: as the Loader's `ram`.
        ranks: that train.
        measure: whether to measure the disk, where that was not done lately.
    """
    index = source.index
    data_bytes = _data_bytes(source)
    files = some_files(index)
    where = disk_of([*files[:1], index.root], "auto")
    is_measured = measure and data_bytes >= MEASURED_BYTES
    speed = speed_of(where, files if is_measured else [])
    where = effective(where, speed)
    budget = ram_budget(ram_wish, data_bytes)
    in_blocks = source.permuted or source.python_blocks
    unpacked = "window" if where.has_one_head else "files"
    return forecast_job(
        Job(
            name=os.path.basename(os.path.abspath(index.root)),
            kind=source.kind,
            num_samples=len(index),
            data_bytes=data_bytes,
            order="blocks" if in_blocks else unpacked,
            disk=where,
            speed=speed,
            kept_bytes=budget.kept_bytes,
            page_cache=budget.page_cache,
            num_readers=num_readers(where, in_blocks=in_blocks),
            num_ranks=ranks,
            is_estimate=index.length is None,
        )
    )


def facts(source: Source, found: Found, expected: Forecast) -> dict[str, Any]:
    """Return what is known of a source; reads the headers of 200 of its images.

    Args:
        source: the data.
        found: what `source` was opened from.
        expected: its forecast.
    """
    index = source.index
    known: dict[str, Any] = {
        "path": index.root,
        "kind": source.kind,
        "found": found.what,
        "samples": len(index),
        "classes": len(index.classes),
        "bytes": _data_bytes(source),
        "mean_image_bytes": round(source_bytes(source) / max(1, len(index))),
    }
    if source.kind == "pack":
        known |= _pack_facts(layout.read_pack(index.root))
    known |= _header_facts(source)
    known |= {
        "order": _order_fact(source),
        "reading": _reading_fact(source, expected),
        "training_shuffle": _shuffle_fact(source),
        "notes": list(source.notes),
    }
    if source.kind != "pack":
        known["packing"] = _packing_facts(source, expected, known["jpegs_among_them"] > 0)
    return known


def text(known: dict[str, Any]) -> str:
    """Return facts for people, a line for each."""
    lines = []
    for name, value in known.items():
        if value is None or value in ([], {}) or name in ("sampled_images", "jpegs_among_them"):
            continue
        lines.append(f"{name.replace('_', ' ') + ':':20} {_shown(name, value, known)}")
    return "\n".join(lines)


def _shown(name: str, value: Any, known: dict[str, Any]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ("\n" + " " * 21).join(map(str, value))
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("_px"):
        return f"{value} (of {known['sampled_images']:,} samples)"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- facts ---------------------------------------------------------------------------------------


def _data_bytes(source: Source) -> int:
    """Return what is read for all samples once: of python blocks, their files."""
    if not source.python_blocks:
        return source_bytes(source)
    files = set(source.index.files)
    return sum(os.path.getsize(os.path.join(source.index.root, name)) for name in files)


def _header_facts(source: Source) -> dict[str, Any]:
    """Return mean sizes in pixels: of all samples where the index has them, else of some."""
    index = source.index
    if index.width is not None and index.height is not None:
        known = (index.width > 0) & (index.height > 0)
        if known.any():
            sizes = [(float(index.width[known].mean()), float(index.height[known].mean()))]
            return _mean_facts(sizes, int(known.sum()), int(known.sum()))
    headers = [header for data in _some_images(source) if (header := _header(data))]
    num_jpegs = sum(is_jpeg for _, is_jpeg in headers)
    return _mean_facts([size_px for size_px, _ in headers], len(headers), num_jpegs)


def _mean_facts(sizes: list[tuple[float, float]], number: int, num_jpegs: int) -> dict[str, Any]:
    means = [round(float(mean), 1) for mean in np.mean(sizes, axis=0)] if sizes else [None, None]
    return {
        "mean_width_px": means[0],
        "mean_height_px": means[1],
        "sampled_images": number,
        "jpegs_among_them": num_jpegs,
    }


def _header(data: bytes) -> tuple[tuple[float, float], bool] | None:
    """Return (width, height) of an image in pixels and whether it is a JPEG; None: it is none."""
    header = native.read_header(data)
    if header is not None:
        return (header.width, header.height), True
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size, False
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError):
        return None


def _some_images(source: Source) -> Iterator[bytes]:
    """Yield what images begin with, of samples spread over the source."""
    index = source.index
    number = min(len(index), _SAMPLED)
    samples = np.arange(number) * len(index) // max(1, number)
    if source.python_blocks:
        yield from _some_images_in_blocks(source, samples)
        return
    for sample in samples:
        path = os.path.join(index.root, index.files[int(index.file[sample])])
        length = -1 if index.length is None else int(index.length[sample])
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(int(index.offset[sample]))
                head = file.read(min(length, _HEAD_BYTES) if length >= 0 else _HEAD_BYTES)
                if _header(head) is None:
                    rest = _LONG_HEAD_BYTES if length < 0 else min(length, _LONG_HEAD_BYTES)
                    head += file.read(max(0, rest - len(head)))
        except OSError:
            continue  # reading says why
        yield head


def _some_images_in_blocks(source: Source, samples: Any) -> Iterator[bytes]:
    index = source.index
    blocks = np.unique(index.file[samples])
    for number in blocks[:: -(-len(blocks) // _SAMPLED_BLOCKS)]:
        block = source.read_block(int(number))
        for sample in samples[index.file[samples] == number]:
            yield block.image(int(index.offset[sample]))[:_LONG_HEAD_BYTES].tobytes()


def _order_fact(source: Source) -> str:
    label = source.index.label
    if source.permuted:
        return "random: neighbours have one class no more often than after a shuffle"
    if label is None or not len(label) or int(label.min()) < 0:
        return "not known: samples without labels"
    if bool((np.diff(label) >= 0).all()):
        return "class by class"
    z = label_runs(label).z
    return f"not known to be random (label runs: z = {z:.1f})"


def _reading_fact(source: Source, expected: Forecast) -> str:
    job = expected.job
    if source.python_blocks:
        return "block by block through Python, which unpacks them; the images in them then as ever"
    if source.permuted:
        return f"blocks of {_BLOCK_BYTES >> 20} MB in random order; validation from front to back"
    each = "files" if len(source.index.files) == len(source.index) else "ranges of files"
    how = f"{each} one by one"
    if job.order == "window":
        how += f", {WINDOW_SAMPLES:,} at a time in the order in which they lie on the disk"
    return how + "; validation in the order of the index"


def _shuffle_fact(source: Source) -> str:
    if source.permuted:
        return "block: samples lie in random order, so blocks of them are mixed already"
    why = "samples are not known to lie in random order, so blocks of them might have few classes"
    if source.python_blocks:
        return (
            f"uniform: {why}. Every image costs a whole block, so pack it, or pass shuffle='block' "
            "where it is in random order after all; the forecast is of that"
        )
    return f"uniform: {why}"


def _packing_facts(source: Source, expected: Forecast, has_jpegs: bool) -> list[str]:
    """Say what packing would change, from the two forecasts and what was measured of decoding."""
    parts = [_reading_gain(source, expected)]
    if has_jpegs:
        parts.append(f"images are decoded {_DECODING_GAIN}, with the same pixels")
    if not source.permuted:
        parts.append("samples get a random order, in which a block shuffle is as good as a uniform")
    return parts


def _reading_gain(source: Source, expected: Forecast) -> str:
    packed = next((choice for choice in expected.choices if choice.what == "a pack"), None)
    if packed is None:
        return "the data is in memory as it is, so reading gains nothing"
    is_read_later = expected.later.bytes_from_disk > 0
    now = expected.later if is_read_later else expected.first
    then = packed.later if is_read_later else packed.first
    epoch = "an epoch" if is_read_later else "the first epoch, the only one that reads the disk,"
    if then.seeks >= now.seeks:
        return f"{epoch} would be read no faster than now: it is read in blocks already"
    if now.minutes is None or then.minutes is None:
        return (
            f"{epoch} would take the disk {then.seeks:,} instead of {now.seeks:,} seeks; it was "
            "not measured, so nothing is known about the time"
        )
    times = f"{format_seconds(60 * then.minutes)} instead of {format_seconds(60 * now.minutes)}"
    return f"{epoch} would read {format_bytes(then.bytes_from_disk)} in {times}"


def _pack_facts(pack: layout.Pack) -> dict[str, Any]:
    return {
        "shards": len(pack.shard_bytes),
        "bytes": int(pack.shard_bytes.sum()),
        "format_version": pack.about["format_version"],
        "made_by": pack.about.get("created_by"),
        "settings": pack.about.get("settings"),
        "huffman_tables": _tables_fact(pack),
        "source": pack.about.get("source"),
        "counts": pack.about.get("counts"),
    }


def _tables_fact(pack: layout.Pack) -> str:
    described = layout.describe_tables(pack.tables)
    if described is None:
        return "each image's own"
    return f"chosen for the pack (CRC-32C {described['crc32c']})"
