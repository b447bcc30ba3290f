"""What a source is, how a Loader with its defaults reads it, and what packing would change.

A `Report` has the facts as plain data, as `imagenet-seq info --json` prints them, and says them to
people, in short or in full.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from imagenet_seq import native
from imagenet_seq.index.mixing import label_runs
from imagenet_seq.index.source import Source
from imagenet_seq.plan import quality
from imagenet_seq.plan.order import Order
from imagenet_seq.read import arrange
from imagenet_seq.read.forecast import Forecast, forecast_reading
from imagenet_seq.read.options import ReadOptions
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.place import SPLITS, Found, SplitNeededError
from imagenet_seq.sources.recognise import find_source
from imagenet_seq.text import format_bytes, format_seconds

_SAMPLED = 200  # images whose headers are read, to estimate how large all of them are
_SAMPLED_BLOCKS = 8  # of python blocks, each of which is read whole
_HEAD_BYTES, _LONG_HEAD_BYTES = 64 << 10, 4 << 20  # read for a header, and where that is too little
_INTERVALS = re.compile(rb"\xff\xe9..imseq\0", re.DOTALL)
"""The segment by which a JPEG in a pack's canonical form is recognised (docs/format.md)."""


def find_splits(path: str, split: str | None) -> dict[str, Found]:
    """Return what lies at a path; with both splits there and none asked for, both."""
    try:
        return {split or "": find_source(path, split)}
    except SplitNeededError:
        found = {}
        for name in SPLITS:
            with contextlib.suppress(FileNotFoundError):
                found[name] = find_source(path, name)
        if not found:
            raise
        return found


@dataclass(frozen=True)
class Report:
    """What is known of a source: facts as plain data, and a forecast of training on it."""

    facts: dict[str, Any]
    forecast: Forecast

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {**self.facts, "forecast": self.forecast.to_dict()}

    def summary(self, path: str) -> str:
        """Return what matters to people, in three to six lines, and the notes.

        `path` is what the user calls the source.
        """
        facts = self.facts
        about = "about " * self.forecast.job.is_estimate
        size = f"{facts['samples']:,} images, {about}{format_bytes(facts['bytes'])}"
        lines = {
            "reading": f"{facts['reading']}; {facts['training_shuffle'].partition(':')[0]} shuffle",
            "disk": facts["disk"],
            "training": self.forecast.epochs(),
        }
        if "packing" in facts:
            lines["packing"] = _packing(facts["packing"], path)
        elif self.forecast.choices:
            lines["faster"] = "; ".join(_faster(self.forecast))
        if facts["notes"]:
            lines["notes"] = ("\n" + " " * 12).join(facts["notes"])
        shown = [f"  {name:9} {value}" for name, value in lines.items()]
        return "\n".join([f"{facts['path']}: {facts['found']}: {size}", *shown])

    def text(self) -> str:
        """Return all of it for people, a line for each fact."""
        title = "training, as far as the disk allows it:"
        return f"{fact_lines(self.facts)}\n\n{title}\n{self.forecast.text()}"


def report(
    source: Source, found: Found, *, ram: str = "auto", num_ranks: int = 1, measure: bool = True
) -> Report:
    """Find out about a source, which was opened from `found`; reads the headers of 200 images.

    All ranks that train are on this node. With `measure`, a disk not measured lately is measured.
    """
    order = training_order(source, num_ranks)
    strategy = arrange.choose_strategy(
        source, ram, ReadOptions(), order, num_ranks, measure=measure
    )
    forecast = forecast_reading(source, strategy, order)
    index = source.index
    facts: dict[str, Any] = {
        "path": index.root,
        "kind": source.kind,
        "found": found.what,
        "samples": len(index),
        "classes": len(index.classes),
        "bytes": strategy.data_bytes,
        "mean_image_bytes": round(arrange.source_bytes(source) / max(1, len(index))),
    }
    if source.kind == "pack":
        facts |= _pack_facts(layout.read_pack(index.root))
    facts |= _header_facts(source)
    facts |= {
        "order": _order_fact(source),
        "reading": _reading_fact(source, strategy, order),
        "validation": "from front to back" if source.permuted else "in the order of the index",
        "training_shuffle": _shuffle_fact(source),
        "disk": _disk_fact(strategy, forecast, measure),
        "notes": [*source.notes, *strategy.notes],
    }
    if source.kind != "pack":
        facts["packing"] = _packing_facts(source, forecast, facts)
    return Report(facts, forecast)


def _packing(gains: list[str], path: str) -> str:
    if not gains:
        return "not needed: it is read in blocks already, and its images are as in a pack"
    command = f"imagenet-seq pack {shlex.quote(path)} DESTINATION"
    return f"{'; '.join(gains)}:\n{' ' * 12}{command}"


def training_order(source: Source, num_ranks: int) -> Order:
    """Return the order in which a Loader with its defaults trains."""
    return Order("block" if source.permuted else "uniform", num_streams=num_ranks)


def shuffle_quality(source: Source, num_ranks: int, batch_size: int) -> quality.Quality:
    """Measure that order against a uniform shuffle, with `batch_size` samples a rank."""
    order = training_order(source, num_ranks)
    pool = arrange.blocks_of_pool(source, order.shuffle_blocks, order.block_bytes)
    order = replace(order, shuffle_blocks=pool)
    return quality.measure(source.index, order, batch_size, source.python_blocks)


def fact_lines(facts: dict[str, Any]) -> str:
    """Return facts for people, a line for each."""
    lines = []
    for name, value in facts.items():
        if value is None or value in ([], {}) or name in _SAMPLE_COUNTS:
            continue
        lines.append(f"{name.replace('_', ' ') + ':':20} {_shown(name, value, facts)}")
    return "\n".join(lines)


_SAMPLE_COUNTS = ("sampled_images", "jpegs_among_them", "canonical_among_them")


def _shown(name: str, value: Any, facts: dict[str, Any]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ("\n" + " " * 21).join(map(str, value))
    if name.endswith("bytes"):
        return format_bytes(value)
    if name.endswith("_px"):
        about = "about " * (facts["sampled_images"] < facts["samples"])
        return f"{about}{value} (of {facts['sampled_images']:,} samples)"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---- images --------------------------------------------------------------------------------------


def _header_facts(source: Source) -> dict[str, Any]:
    """Return mean sizes in pixels: of all samples where the index has them, else of some."""
    index = source.index
    if index.width is not None and index.height is not None:
        known = (index.width > 0) & (index.height > 0)
        if known.any():
            sizes = [(float(index.width[known].mean()), float(index.height[known].mean()))]
            return _mean_facts(sizes, int(known.sum()), int(known.sum()), 0)
    images = [(header, data) for data in _some_images(source) if (header := _header(data))]
    return _mean_facts(
        [size_px for (size_px, _), _ in images],
        len(images),
        sum(is_jpeg for (_, is_jpeg), _ in images),
        sum(_INTERVALS.search(data) is not None for _, data in images),
    )


def _mean_facts(
    sizes: list[tuple[float, float]], number: int, num_jpegs: int, num_canonical: int
) -> dict[str, Any]:
    means = [round(float(mean), 1) for mean in np.mean(sizes, axis=0)] if sizes else [None, None]
    return {
        "mean_width_px": means[0],
        "mean_height_px": means[1],
        "sampled_images": number,
        "jpegs_among_them": num_jpegs,
        "canonical_among_them": num_canonical,
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


# ---- facts ---------------------------------------------------------------------------------------


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


def _reading_fact(source: Source, strategy: arrange.ReadStrategy, order: Order) -> str:
    if source.python_blocks:
        what = "block by block" if strategy.in_blocks else "a whole block for every image"
        return f"{what}, through Python, which unpacks it"
    if strategy.in_blocks:
        return f"blocks of {format_bytes(order.block_bytes)} in random order"
    each = "files" if len(source.index.files) == len(source.index) else "ranges of files"
    if strategy.window:
        window = min(strategy.window, len(source.index))
        return f"{each} one by one, {window:,} at a time as they lie on the disk"
    return f"{each} one by one"


def _shuffle_fact(source: Source) -> str:
    if source.permuted:
        return "block: samples lie in random order, so blocks of them are mixed already"
    why = "samples are not known to lie in random order, so blocks of them might have few classes"
    if source.python_blocks:
        return (
            f"uniform: {why}. Every image costs a whole block, so pack it, or pass shuffle='block' "
            "where it is in random order after all"
        )
    return f"uniform: {why}"


def _disk_fact(strategy: arrange.ReadStrategy, forecast: Forecast, measure: bool) -> str:
    """Return what the disk is; where that was not measured, why, and how to correct it."""
    disk, text = strategy.disk, forecast.disk()
    if strategy.speed or disk.kind == "memory":
        return text
    if not measure:
        text += ": leave out --no-measure to measure it"
    elif strategy.data_bytes < arrange.MEASURED_BYTES:
        text += f": that takes {format_bytes(arrange.MEASURED_BYTES)} of data or more"
    else:
        text += ": it did not answer in time, so try again"
    if disk.kind == "hdd" and not disk.chosen:
        text += '; if it is an SSD, set IMAGENET_SEQ_DISK=ssd, or ReadOptions(disk="ssd") in Python'
    return text


def _packing_facts(source: Source, forecast: Forecast, facts: dict[str, Any]) -> list[str]:
    """Return what packing gains, by the forecast and by what was measured of decoding."""
    gains = _reading_gains(forecast)
    if facts["jpegs_among_them"] > 2 * facts["canonical_among_them"]:
        gains.append("images decode about twice as fast, with the same pixels")
    if not source.permuted:
        gains.append("samples lie in random order, so that blocks can be shuffled")
    return gains


def _reading_gains(forecast: Forecast) -> list[str]:
    packed = next((choice for choice in forecast.choices if choice.what == "a pack"), None)
    if packed is None:
        return []
    is_read_later = forecast.later.bytes_from_disk > 0
    now = forecast.later if is_read_later else forecast.first
    then = packed.later if is_read_later else packed.first
    epoch = "an epoch" if is_read_later else "epoch 1"
    if then.seeks >= now.seeks:
        return []
    if now.minutes is None or then.minutes is None:
        return [f"{epoch} takes {then.seeks:,} instead of {now.seeks:,} disk seeks"]
    times = f"{format_seconds(60 * then.minutes)} instead of {format_seconds(60 * now.minutes)}"
    return [f"{epoch} takes the disk about {times}"]


def _faster(forecast: Forecast) -> list[str]:
    """Return what would make the epochs on a pack shorter."""
    is_read_later = forecast.later.bytes_from_disk > 0
    texts = []
    for choice in forecast.choices:
        epoch = choice.later if is_read_later else choice.first
        if not epoch.bytes_from_disk:
            time = "the disk is read in epoch 1 only"
        elif epoch.minutes is not None:
            time = f"about {format_seconds(60 * epoch.minutes)} an epoch"
        else:
            time = f"{format_bytes(epoch.bytes_from_disk)} an epoch from the disk"
        texts.append(f"with {choice.what} {time}")
    return texts


def _pack_facts(pack: layout.Pack) -> dict[str, Any]:
    tables = layout.describe_tables(pack.tables)
    return {
        "shards": len(pack.shard_bytes),
        "bytes": int(pack.shard_bytes.sum()),
        "format_version": pack.about["format_version"],
        "made_by": pack.about.get("created_by"),
        "settings": pack.about.get("settings"),
        "huffman_tables": f"chosen for the pack (CRC-32C {tables['crc32c']})"
        if tables
        else "each image's own",
        "source": pack.about.get("source"),
        "counts": pack.about.get("counts"),
    }
