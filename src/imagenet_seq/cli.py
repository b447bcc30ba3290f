"""The command `imagenet-seq`: pack, preprocess, info, verify.

Nothing here imports torch but `pack --max-side`, whose forecast decodes some images.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, get_args

from imagenet_seq import __version__
from imagenet_seq.errors import ImagenetSeqError
from imagenet_seq.index.cache import OnError
from imagenet_seq.index.source import Source
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.place import SPLITS, Found, Opening, SplitNeededError
from imagenet_seq.sources.recognise import find_source
from imagenet_seq.text import format_bytes, parse_bytes

if TYPE_CHECKING:
    from imagenet_seq.pack.shards import Summary
    from imagenet_seq.pack.shrink import Shrink


EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


_SHOWN = 5
"""Samples named in a summary."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        0: done; 1: failed, or `verify` found problems; 2: wrong usage; 130: interrupted.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        print(f"imagenet-seq: interrupted{options.after_interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ImagenetSeqError, ImportError, OSError, ValueError) as error:
        if options.debug:
            raise
        print(f"imagenet-seq: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imagenet-seq",
        description="Pack ImageNet for sequential reading, look at data sets, check packs.",
    )
    parser.add_argument("--version", action="version", version=f"imagenet-seq {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_pack(commands)
    _add_preprocess(commands)
    _add_info(commands)
    _add_verify(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, text: str, examples: str) -> Any:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, after_interrupt="")
    command.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return command


# ---- pack ----------------------------------------------------------------------------------------


def _add_pack(commands: Any) -> None:
    command = _add_command(
        commands,
        "pack",
        _pack,
        "make a pack of a data set of any format; run again, it continues where it stopped",
        "  imagenet-seq pack /data/imagenet /disk/imagenet-pack          # its train/ and val/\n"
        "  imagenet-seq pack '/data/imagenet1k-train-{0000..1023}.tar' /disk/train-pack\n"
        "  imagenet-seq pack /data/imagenet /disk/pack --on-error skip   # leave bad images out\n"
        "  imagenet-seq pack /data/imagenet /disk/small --max-side 500   # half the bytes; lossy\n"
        "  imagenet-seq pack /data/imagenet /disk/in100 --classes imagenet100.txt   # a subset\n"
        "  imagenet-seq pack --reshuffle /disk/pack /disk/pack2          # another order\n",
    )
    command.set_defaults(after_interrupt="; run the same command again to continue")
    command.add_argument(
        "source",
        help="class folders, the official archives, WebDataset, TFRecord, Parquet, LMDB, ...: a "
        "folder, a file, a pattern of files, or a folder with both splits",
    )
    command.add_argument("destination", help="the pack to make, outside SOURCE")
    command.add_argument(
        "--format",
        choices=("pack", "lmdb"),
        default=argparse.SUPPRESS,
        help="make a pack (default), or DESTINATION/ILSVRC-train.lmdb and -val.lmdb for tensorpack",
    )
    command.add_argument(
        "--reshuffle",
        action="store_true",
        help="SOURCE is a pack: make one of another order of it, the images as they are",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=argparse.SUPPRESS,
        help="of the permutation (default 0; with --reshuffle, the next after the pack's)",
    )
    _add_settings(command)
    _add_selection(command)
    _add_shrink(command)
    command.add_argument(
        "--splits", type=_splits, help="of a folder with both: train, val or train,val (default)"
    )
    _add_workers(command)
    command.add_argument(
        "--memory",
        type=_size,
        default=512 << 20,
        metavar="SIZE",
        help="for dealing samples to shards (default 512MiB); one shard beside",
    )
    command.add_argument(
        "--log-io", metavar="FILE", help="append every read and write to FILE, a line of JSON each"
    )


def _add_settings(command: Any) -> None:
    """Add what decides the bytes of a pack; what is not given has the defaults of `Settings`."""
    absent = argparse.SUPPRESS
    command.add_argument(
        "--keep-bytes",
        action="store_true",
        default=absent,
        help="store every file's own bytes, re-code nothing",
    )
    command.add_argument(
        "--strip",
        action="store_true",
        default=absent,
        help="drop ICC profiles, Exif thumbnails and comments",
    )
    command.add_argument(
        "--on-error",
        choices=("fail", "skip", "keep"),
        default=absent,
        help="images that cannot be decoded: pack the others, then stop and name them (fail, the "
        "default); leave them out (skip); store their bytes as they are (keep)",
    )
    command.add_argument(
        "--shard-size",
        type=_size,
        default=absent,
        metavar="SIZE",
        help="of a shard (default 1GB)",
    )
    command.add_argument(
        "--restart-interval",
        type=int,
        default=absent,
        metavar="MCUS",
        help="MCUs between restart markers (default 8)",
    )
    command.add_argument(
        "--tables",
        choices=("pack", "image"),
        default=absent,
        help="Huffman tables: the pack's, fastest to decode (default); each image its own, smaller",
    )


def _add_selection(command: Any) -> None:
    group = command.add_argument_group(
        "subsets",
        "Labels of the chosen classes are 0, 1, ... in the order that these have in SOURCE.\n"
        "Patterns are as in a shell; several in one argument are separated by commas.",
    )
    group.add_argument(
        "--include", action="append", type=_names, metavar="GLOB", help="pack only these classes"
    )
    group.add_argument(
        "--exclude", action="append", type=_names, metavar="GLOB", help="leave these classes out"
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="pack only the classes that FILE names, one in a line; words behind a name are "
        "ignored, # begins a comment",
    )
    group.add_argument(
        "--limit",
        type=_positive,
        metavar="N",
        help="pack at most N images of each class: always the same ones, chosen by a hash of their "
        "names",
    )


def _selection(options: argparse.Namespace) -> dict[str, Any]:
    from imagenet_seq.pack.selection import read_classes

    return {
        "include": list(itertools.chain(*options.include or ())),
        "exclude": list(itertools.chain(*options.exclude or ())),
        "classes": read_classes(options.classes) if options.classes else None,
        "limit": options.limit,
    }


def _add_shrink(command: Any) -> None:
    group = command.add_argument_group(
        "smaller copies",
        "Not lossless: images with a side of more than PX pixels are resized (antialiased), and\n"
        "all images that get smaller by it are encoded anew. What this does to size and speed is\n"
        "measured on some of them and shown first. --strip saves more: ICC profiles go, too.",
    )
    group.add_argument("--max-side", type=_positive, metavar="PX", help="longer side, at most")
    group.add_argument(
        "--quality", type=_positive, metavar="Q", help="JPEG quality, 1 to 100 (default 90)"
    )
    group.add_argument(
        "--subsampling", choices=("420", "422", "444"), help="of the colours (default 420)"
    )


def _shrink(options: argparse.Namespace) -> Shrink | None:
    from imagenet_seq.pack.shrink import Shrink

    given = {key: getattr(options, key) for key in ("quality", "subsampling")}
    given = {key: value for key, value in given.items() if value is not None}
    if options.max_side is not None:
        return Shrink(options.max_side, **given)
    if given:
        raise ValueError(
            f"--{next(iter(given))}: is for smaller copies only: add --max-side PX, the longest "
            "side that images may have, or leave it out to pack losslessly"
        )
    return None


_FOR_RECODING = (
    "format", "keep_bytes", "strip", "on_error", "shard_size", "restart_interval", "tables",
    "max_side", "quality", "subsampling", "include", "exclude", "classes", "limit",
)  # fmt: skip


def _pack(options: argparse.Namespace) -> int:
    from imagenet_seq.pack.encode import Settings
    from imagenet_seq.pack.packing import pack_dataset, reshuffle

    given = {key: value for key, value in vars(options).items() if value is not None}
    common = {
        "splits": options.splits,
        "num_workers": options.workers,
        "memory_bytes": options.memory,
        "io_log": options.log_io,
    }
    if options.reshuffle:
        if refused := [key for key in _FOR_RECODING if key in given]:
            raise ValueError(
                f"--{refused[0].replace('_', '-')}: is for packing images, and --reshuffle keeps "
                "those of a pack as they are: leave it out, or pack the original images anew"
            )
        summaries = reshuffle(options.source, options.destination, seed=given.get("seed"), **common)
    else:
        keys = ("keep_bytes", "strip", "restart_interval", "tables", "seed")
        settings = {key: given[key] for key in keys if key in given}
        if "shard_size" in given:
            settings["shard_bytes"] = given["shard_size"]
        summaries = pack_dataset(
            options.source,
            options.destination,
            format=given.get("format", "pack"),
            settings=Settings(**settings, shrink=_shrink(options)),
            on_error=given.get("on_error", "fail"),
            **_selection(options),
            **common,
        )
    for summary in summaries.values():
        _print_summary(summary)
    if given.get("format") != "lmdb":
        _warn_of_different_classes([summary.folder for summary in summaries.values()])
    return EXIT_OK


def _print_summary(summary: Summary) -> None:
    is_lmdb = not os.path.isdir(summary.folder)
    already = ", complete already: nothing was done" if summary.was_complete else ""
    print(f"{summary.folder}: {summary.num_samples} samples{already}")
    if not (is_lmdb and summary.was_complete):  # nothing in it says what it was made of
        ratio = summary.pack_bytes / max(summary.source_bytes, 1)
        print(
            f"  {format_bytes(summary.source_bytes)} of images became {format_bytes(summary.pack_bytes)} of "
            f"{'LMDB' if is_lmdb else 'shards'} ({ratio:.1%})"
        )
        shrunk = f"{summary.num_shrunk} encoded anew, " if summary.num_shrunk else ""
        print(
            f"  {shrunk}{summary.num_canonical - summary.num_shrunk} re-coded losslessly, "
            f"{summary.num_as_is} stored as they are"
        )
    for note in summary.notes:
        print(f"  {note}")
    if summary.failures:
        kept = sum(failure.kept for failure in summary.failures)
        where = "" if is_lmdb else f"; all in {os.path.join(summary.folder, layout.FAILURES_FILE)}"
        print(
            f"  {len(summary.failures)} could not be decoded or read: {kept} kept, "
            f"{len(summary.failures) - kept} left out{where}:"
        )
        for failure in summary.failures if is_lmdb else summary.failures[:_SHOWN]:
            print(f"    {failure.name}: {failure.reason}")


def _warn_of_different_classes(folders: Sequence[str]) -> None:
    classes = {tuple(layout.read_pack(folder).classes) for folder in folders}
    if len(classes) > 1:
        print(
            "imagenet-seq: warning: the splits have different classes, so one label means "
            "different things in them",
            file=sys.stderr,
        )


# ---- preprocess ----------------------------------------------------------------------------------


def _add_preprocess(commands: Any) -> None:
    command = _add_command(
        commands,
        "preprocess",
        _preprocess,
        "make ILSVRC-train.lmdb and ILSVRC-val.lmdb, as the original project did; run again, it "
        "continues",
        "  imagenet-seq preprocess                                # of $IMAGENET, into it\n"
        "  imagenet-seq preprocess /data/imagenet /disk/lmdb\n",
    )
    command.set_defaults(after_interrupt="; run the same command again to continue")
    command.add_argument(
        "source", nargs="?", help="folder with train/ and val/, or any data set (default $IMAGENET)"
    )
    command.add_argument("destination", nargs="?", help="folder for the files (default SOURCE)")
    command.add_argument(
        "--keep-bytes",
        action="store_true",
        help="store every file's own bytes; the Loader decodes them more slowly",
    )
    command.add_argument(
        "--on-error",
        choices=("fail", "skip", "keep"),
        default="fail",
        help="images that cannot be decoded, as for pack",
    )
    command.add_argument("--seed", type=int, default=0, help="of train's order (default 0)")
    _add_workers(command)


def _preprocess(options: argparse.Namespace) -> int:
    from imagenet_seq.pack.packing import preprocess

    summaries = preprocess(
        options.source,
        options.destination,
        keep_bytes=options.keep_bytes,
        seed=options.seed,
        on_error=options.on_error,
        num_workers=options.workers,
    )
    for summary in summaries.values():
        _print_summary(summary)
    return EXIT_OK


# ---- info ----------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    command = _add_command(
        commands,
        "info",
        _info,
        "say what a data set is, how it is read, what packing would bring, how fast its disk is",
        "  imagenet-seq info /disk/imagenet-pack --split train\n"
        "  imagenet-seq info /disk/imagenet-pack --split train --ram 64GB --ranks 8\n"
        "  imagenet-seq info /disk/train-pack --json\n"
        "  imagenet-seq info '/data/imagenet1k-train-{0000..1023}.tar'\n"
        "  imagenet-seq info /disk/train-pack --shuffle    # is it as good as a uniform one?\n",
    )
    command.add_argument("path", help="a folder, file or pattern of files: see docs/sources.md")
    command.add_argument("--split", choices=SPLITS, help="which split of a folder with both")
    command.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="fail",
        help="samples that can't be indexed: stop and name the first (default), or leave them out",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--ranks", type=_positive, default=1, metavar="N", help="that train (default 1)"
    )
    group = command.add_argument_group(
        "forecast",
        "No image is decoded; of 200 the header is read. The speed of a disk is measured once in\n"
        "30 days, where the data is 2 GB or more: parts of some files are read for a second.",
    )
    group.add_argument(
        "--ram",
        default="auto",
        metavar="SIZE",
        help="memory for training, as the Loader's ram: 48GB, 30%%, 0 or auto (default)",
    )
    group.add_argument(
        "--no-measure", dest="measure", action="store_false", help="don't measure the disk"
    )
    _add_shuffle(command)


def _info(options: argparse.Namespace) -> int:
    from imagenet_seq import info

    how = Opening(options.on_error, progress=not options.json)
    all_facts: dict[str, dict[str, Any]] = {}
    for split, found in _found(options.path, options.split).items():
        source = found.open(how)
        expected = info.forecast_of(source, options.ram, options.ranks, options.measure)
        facts = info.facts(source, found, expected)
        if options.shuffle:
            facts.update(_shuffle_facts(source, options))
        if options.json:
            facts["forecast"] = expected.to_dict()
        else:
            print("\n" * bool(all_facts) + info.text(facts))
            print(f"\ntraining, as far as the disk allows it:\n{expected.text()}")
        all_facts[split] = facts
    if options.json:
        only = next(iter(all_facts.values())) if len(all_facts) == 1 else None
        print(json.dumps(only or all_facts, indent=1))
    return EXIT_OK


def _found(path: str, split: str | None) -> dict[str, Found]:
    """Return what lies at a path: with both splits there and none asked for, both."""
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


def _add_shuffle(command: Any) -> None:
    group = command.add_argument_group("shuffle quality", "See docs/shuffle.md.")
    group.add_argument(
        "--shuffle",
        action="store_true",
        help="measure the training shuffle, as the Loader has it by default, against a uniform one",
    )
    group.add_argument(
        "--batch-size",
        type=_positive,
        default=256,
        metavar="N",
        help="samples of one rank in a batch (default 256)",
    )


def _shuffle_facts(source: Source, options: argparse.Namespace) -> dict[str, Any]:
    from imagenet_seq.plan import quality
    from imagenet_seq.plan.order import Order
    from imagenet_seq.read.arrange import blocks_of_pool

    order = Order("block" if source.permuted else "uniform", num_streams=options.ranks)
    pool = blocks_of_pool(source, order.shuffle_blocks, order.block_bytes)
    order = replace(order, shuffle_blocks=pool)
    found = quality.measure(source.index, order, options.batch_size, source.python_blocks)
    return {"shuffle": asdict(found)} if options.json else quality.describe(found)


# ---- verify --------------------------------------------------------------------------------------


def _add_verify(commands: Any) -> None:
    command = _add_command(
        commands,
        "verify",
        _verify,
        "check every byte of a pack; exit status 0: sound, 1: problems were found",
        "  imagenet-seq verify /disk/imagenet-pack\n"
        "  imagenet-seq verify /disk/imagenet-pack --against /data/imagenet   # pixels too\n",
    )
    command.add_argument("pack", help="a pack, or a folder with the packs train/ and/or val/")
    command.add_argument(
        "--against", metavar="SOURCE", help="what it was made of: compare names, labels and pixels"
    )
    command.add_argument(
        "--problems", type=_positive, default=20, metavar="N", help="problems to show (default 20)"
    )
    _add_workers(command)


def _verify(options: argparse.Namespace) -> int:
    from imagenet_seq.pack.verify import verify

    found = [s for s in SPLITS if os.path.isfile(os.path.join(options.pack, s, layout.PACK_FILE))]
    for split in SPLITS:  # a split that is missing so far must not pass unnoticed
        layout.refuse_unfinished(os.path.join(options.pack, split))
    status = EXIT_OK
    for split in found or [""]:
        folder = os.path.join(options.pack, split) if split else options.pack
        against = options.against
        layout.refuse_unfinished(folder)
        report = verify(folder, against, split=split or None, num_workers=options.workers)
        for problem in report.problems[: options.problems]:
            print(problem)
        if len(report.problems) > options.problems:
            print(f"and {len(report.problems) - options.problems} more problems")
        compared = f", {report.num_compared} compared with {against}" if against else ""
        verdict = f"{len(report.problems)} problems" if report.problems else "sound"
        print(f"{folder}: {report.num_samples} samples{compared}: {verdict}")
        status = EXIT_FAILED if report.problems else status
    return status


# ---- arguments -----------------------------------------------------------------------------------


def _add_workers(command: Any) -> None:
    command.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="threads (default: one for each available core)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 byte, got {text!r}")
    return int(size)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _splits(text: str) -> tuple[str, ...]:
    splits = tuple(text.split(","))
    if not splits or any(split not in SPLITS for split in splits):
        raise argparse.ArgumentTypeError(f"expected train, val or train,val, got {text!r}")
    return splits


if __name__ == "__main__":
    sys.exit(main())
