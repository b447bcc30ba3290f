"""The command `imagenet-seq`: pack, preprocess, info, verify.

Only `pack --max-side` imports torch, since its forecast decodes some images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args

from imagenet_seq import __version__
from imagenet_seq.errors import ImagenetSeqError
from imagenet_seq.index.cache import OnError
from imagenet_seq.sources.formats import pack as layout
from imagenet_seq.sources.place import SPLITS, Opening, split_of
from imagenet_seq.text import format_bytes, parse_bytes

if TYPE_CHECKING:
    from imagenet_seq.pack.shards import Summary
    from imagenet_seq.pack.shrink import Shrink


EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 1, 2, 130, 141
_SHOWN = 5
"""Failures that a summary names."""

_KEEP_BYTES = "store every file unchanged; it decodes more slowly"
_ON_ERROR = ("fail", "skip", "keep")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        0: done; 1: failed, or `verify` found problems; 2: wrong usage; 130: interrupted; 141: what
        read the output (`head`, say) has closed it.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        status = run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The interpreter flushes stdout when it ends, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
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
        description="Pack images for sequential reading, look at data sets, check packs.",
        epilog="Each command has examples: imagenet-seq COMMAND --help.",
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
        "pack a data set of any format; after an interruption, run it again to continue",
        "  imagenet-seq pack /data/imagenet /disk/imagenet-pack          # train/ and val/\n"
        "  imagenet-seq pack '/data/imagenet1k-train-{0000..1023}.tar' /disk/train-pack\n"
        "  imagenet-seq pack /data/imagenet /disk/pack --on-error skip   # leave bad images out\n"
        "  imagenet-seq pack /data/imagenet /disk/small --max-side 500   # half the bytes; lossy\n"
        "  imagenet-seq pack /data/imagenet /disk/in100 --classes imagenet100.txt   # a subset\n"
        "  imagenet-seq pack --reshuffle /disk/pack /disk/pack2          # in another order\n",
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
        help="make a pack (default), or DESTINATION/ILSVRC-train.lmdb and -val.lmdb for tensorpack",
    )
    text = "SOURCE is a pack: copy it in another random order, image bytes unchanged"
    command.add_argument("--reshuffle", action="store_true", help=text)
    text = "seed of the random order (default 0; with --reshuffle, one more than the pack's)"
    command.add_argument("--seed", type=int, help=text)
    _add_settings(command)
    _add_selection(command)
    _add_shrink(command)
    text = "of a folder with both, pack train, val or train,val (default)"
    command.add_argument("--splits", type=_splits, help=text)
    _add_workers(command)
    command.add_argument(
        "--memory",
        type=_size,
        default=512 << 20,
        metavar="SIZE",
        help="memory for sorting samples into shards (default 512MiB), beside that of one shard",
    )
    command.add_argument(
        "--log-io", metavar="FILE", help="append every read and write to FILE, as a line of JSON"
    )


def _add_settings(command: Any) -> None:
    """Add the options that decide the bytes of a pack; their defaults are those of `Settings`."""
    command.add_argument("--keep-bytes", action="store_true", default=None, help=_KEEP_BYTES)
    text = "drop ICC profiles, Exif thumbnails and comments"
    command.add_argument("--strip", action="store_true", default=None, help=text)
    command.add_argument(
        "--on-error",
        choices=_ON_ERROR,
        help="images that cannot be decoded: pack the others, then stop and name them (fail, the "
        "default); leave them out (skip); store their bytes as they are (keep)",
    )
    command.add_argument(
        "--shard-size", type=_size, metavar="SIZE", help="size of a shard (default 1GB)"
    )
    text = "MCUs (8 or 16 pixels wide) between restart markers (default 8)"
    command.add_argument("--restart-interval", type=int, metavar="MCUS", help=text)
    command.add_argument(
        "--tables",
        choices=("pack", "image"),
        help="Huffman tables: one set for the pack, fastest to decode (default), or each image its "
        "own, 2 %% fewer bytes",
    )


def _add_selection(command: Any) -> None:
    group = command.add_argument_group(
        "subsets",
        "The chosen classes get the labels 0, 1, ... in their order in SOURCE. Patterns are those\n"
        "of a shell; commas separate several.",
    )
    group.add_argument(
        "--include", action="extend", type=_names, metavar="GLOB", help="pack only these classes"
    )
    group.add_argument(
        "--exclude", action="extend", type=_names, metavar="GLOB", help="leave these classes out"
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="pack only the classes that FILE names, one a line; further words on a line are "
        "ignored, # begins a comment",
    )
    text = "pack at most N images of each class, always the same ones"
    group.add_argument("--limit", type=_positive, metavar="N", help=text)


def _selection(options: argparse.Namespace) -> dict[str, Any]:
    from imagenet_seq.pack.selection import read_classes

    return {
        "include": options.include or [],
        "exclude": options.exclude or [],
        "classes": read_classes(options.classes) if options.classes else None,
        "limit": options.limit,
    }


def _add_shrink(command: Any) -> None:
    group = command.add_argument_group(
        "smaller copies",
        "Not lossless: images with a side of more than PX pixels are resized (antialiased), and\n"
        "all images that get smaller by it are encoded anew. The effect on size and speed is\n"
        "measured on some of them and shown first. --strip saves more: it drops ICC profiles, too.",
    )
    group.add_argument("--max-side", type=_positive, metavar="PX", help="greatest side")
    group.add_argument(
        "--quality", type=_positive, metavar="Q", help="JPEG quality, 1 to 100 (default 90)"
    )
    group.add_argument(
        "--subsampling", choices=("420", "422", "444"), help="chroma subsampling (default 420)"
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
    if given.get("format") != "lmdb":
        _warn_of_different_classes([summary.folder for summary in summaries.values()])
    _print_summaries(summaries, options.source)
    return EXIT_OK


def _print_summaries(summaries: dict[str, Summary], source: str) -> None:
    """Say what was made, and end with the Python that uses it."""
    for summary in summaries.values():
        _print_summary(summary)
    print("\nto use it:\n  from imagenet_seq import Loader")
    for split, summary in summaries.items():
        is_in_root = split and os.path.isdir(summary.folder)
        path = os.path.dirname(summary.folder) if is_in_root else summary.folder
        meant = split or split_of(source) or "train"
        print(f'  {meant} = Loader("{path}", "{meant}", batch_size=256, num_workers=8)')


def _print_summary(summary: Summary) -> None:
    is_lmdb = not os.path.isdir(summary.folder)
    already = ", complete already: nothing was done" if summary.was_complete else ""
    print(f"{summary.folder}: {summary.num_samples:,} samples{already}")
    if not (is_lmdb and summary.was_complete):  # nothing in it says what it was made of
        _print_sizes(summary, "LMDB" if is_lmdb else "shards")
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


def _print_sizes(summary: Summary, what: str) -> None:
    before, after = summary.source_bytes, summary.pack_bytes
    print(
        f"  {format_bytes(before)} of images became {format_bytes(after)} of {what} "
        f"({after / max(before, 1):.1%})"
    )
    shrunk = f"{summary.num_shrunk} encoded anew, " if summary.num_shrunk else ""
    print(
        f"  {shrunk}{summary.num_canonical - summary.num_shrunk} re-coded losslessly, "
        f"{summary.num_as_is} stored as they are"
    )


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
        "make ILSVRC-train.lmdb and ILSVRC-val.lmdb, as the original project did; after an "
        "interruption, run it again to continue",
        "  imagenet-seq preprocess                                # reads $IMAGENET, writes to it\n"
        "  imagenet-seq preprocess /data/imagenet /disk/lmdb\n",
    )
    command.set_defaults(after_interrupt="; run the same command again to continue")
    text = "folder with train/ and val/, or any data set (default: $IMAGENET)"
    command.add_argument("source", nargs="?", help=text)
    command.add_argument("destination", nargs="?", help="folder for the files (default: SOURCE)")
    command.add_argument("--keep-bytes", action="store_true", help=_KEEP_BYTES)
    text = "what to do with images that cannot be decoded, as for pack"
    command.add_argument("--on-error", choices=_ON_ERROR, default="fail", help=text)
    command.add_argument(
        "--seed", type=int, default=0, help="seed of train's random order (default 0)"
    )
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
    _print_summaries(summaries, options.source or "")
    return EXIT_OK


# ---- info ----------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    command = _add_command(
        commands,
        "info",
        _info,
        "say what a data set is, how it will be read, and what packing would bring",
        "  imagenet-seq info /data/imagenet                # a few lines for each split\n"
        "  imagenet-seq info /data/imagenet -v             # everything\n"
        "  imagenet-seq info /disk/imagenet-pack --split train --ram 64GB --ranks 8\n"
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
    command.add_argument("-v", "--verbose", action="store_true", help="print all that is known")
    command.add_argument("--json", action="store_true", help="print all of it as a JSON object")
    command.add_argument(
        "--ranks", type=_positive, default=1, metavar="N", help="that train together (default 1)"
    )
    group = command.add_argument_group(
        "forecast",
        "No image is decoded; the headers of 200 are read. A disk's speed is measured once in\n"
        "30 days, on data of 2 GB or more: parts of some files are read for a second.",
    )
    text = "memory that may keep data, as the Loader's ram: 48GB, 30%%, 0 or auto (default)"
    group.add_argument("--ram", default="auto", metavar="SIZE", help=text)
    group.add_argument(
        "--no-measure", dest="measure", action="store_false", help="don't measure the disk"
    )
    _add_shuffle(command)


def _info(options: argparse.Namespace) -> int:
    from imagenet_seq import info
    from imagenet_seq.plan import quality

    how = Opening(options.on_error, progress=not options.json)
    collected: dict[str, dict[str, Any]] = {}
    for split, found in info.find_splits(options.path, options.split).items():
        source = found.open(how)
        report = info.report(
            source, found, ram=options.ram, num_ranks=options.ranks, measure=options.measure
        )
        texts = [report.summary(options.path)]
        if options.verbose:
            texts.append(report.text())
        known = report.to_dict()
        if options.shuffle:
            found_out = info.shuffle_quality(source, options.ranks, options.batch_size)
            known["shuffle"] = asdict(found_out)
            texts.append(info.fact_lines(quality.describe(found_out)))
        if not options.json:
            print("\n" * bool(collected) + "\n\n".join(texts))
        collected[split] = known
    if options.json:
        only = next(iter(collected.values())) if len(collected) == 1 else None
        print(json.dumps(only or collected, indent=1))
    return EXIT_OK


def _add_shuffle(command: Any) -> None:
    group = command.add_argument_group("shuffle quality", "See docs/shuffle.md.")
    text = "compare the Loader's default training shuffle with a uniform one"
    group.add_argument("--shuffle", action="store_true", help=text)
    text = "samples in a batch of one rank (default 256)"
    group.add_argument("--batch-size", type=_positive, default=256, metavar="N", help=text)


# ---- verify --------------------------------------------------------------------------------------


def _add_verify(commands: Any) -> None:
    command = _add_command(
        commands,
        "verify",
        _verify,
        "check every byte of a pack; exit status 1 if there are problems",
        "  imagenet-seq verify /disk/imagenet-pack\n"
        "  imagenet-seq verify /disk/imagenet-pack --against /data/imagenet   # pixels too\n",
    )
    command.add_argument("pack", help="a pack, or a folder with the packs train/ and/or val/")
    text = "compare names, labels and pixels with the original data"
    command.add_argument("--against", metavar="SOURCE", help=text)
    text = "show N problems at most (default 20)"
    command.add_argument("--problems", type=_positive, default=20, metavar="N", help=text)
    _add_workers(command)


def _verify(options: argparse.Namespace) -> int:
    from imagenet_seq.pack.verify import verify

    found = [s for s in SPLITS if os.path.isfile(os.path.join(options.pack, s, layout.PACK_FILE))]
    for split in SPLITS:  # a split that is not finished must not pass unnoticed
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
    text = "threads (default: one for each available core)"
    command.add_argument("--workers", type=_positive, metavar="N", help=text)


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
