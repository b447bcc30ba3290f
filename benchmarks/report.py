"""Make the tables of README and docs, and docs/performance.svg, from committed results.

    python benchmarks/report.py [--check]

Reads benchmarks/results/decode.json, loader.json and compare.json (`make bench` writes them),
sources.json (bench_loader.py --source all), read.json and read_sources.json (bench_read.py;
docs/hard-disk.md says how) and replaces what stands between the markers of each page; tables whose
results are missing stay as they are. With --check nothing is written; the exit status says whether
the pages and the plot are what the results give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
MARKERS = "<!-- {}: made by benchmarks/report.py -->", "<!-- {}: end -->"
README = Path("README.md")
PERFORMANCE_PAGE = Path("docs/performance.md")
SOURCES_PAGE = Path("docs/sources.md")
READ_PAGE = Path("docs/hard-disk.md")
PLOT = Path("docs/performance.svg")
COMMANDS = {
    "decode": "bench_decode.py",
    "loader": "bench_loader.py",
    "compare": "compare.py",
    "sources": "bench_loader.py --source all",
    "read": "bench_read.py --spindle PROGRAM",
    "read_sources": "bench_read.py --spindle PROGRAM --spindle-options=--rt=1 --cases sources",
}
LABELS = {
    "torchvision": "torchvision, DataLoader",
    "opencv": "OpenCV",
    "tensorflow": "tf.data",
    "dali": "DALI, CPU",
    "ffcv": "FFCV",
    "imagenet_seq": "**imagenet-seq**, the same folder",
    "imagenet_seq_pack": "**imagenet-seq**, a pack",
}
SPLITS = {"train": "training crop", "val": "validation crop"}
Row = dict[str, Any]


def read_results(folder: Path) -> dict[str, Row]:
    """Return the results there are, by name."""
    paths = {name: folder / f"{name}.json" for name in COMMANDS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


# ---- tables ----


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin_line(name: str, result: Row) -> str:
    """Say where, when and how a result was measured."""
    origin = result["origin"]
    versions = ", ".join(f"{key} {origin[key]}" for key in ("Pillow", "torch", "torchvision"))
    return (
        f"{origin['machine']}, {origin['cores']} cores, {origin['memory_gb']} GB, {versions}, "
        f"commit {origin['commit']}, {origin['date']}: `python benchmarks/{COMMANDS[name]}`"
    )


def summary_section(compare: Row, decode: Row | None) -> str:
    """The table of README: loaders on one core, and the decoder on smaller copies."""
    shown = [peer for peer in compare["peers"] if peer != "opencv"]
    rows = [row for row in compare["rows"] if (row["cores"], row["dtype"]) == (1, "uint8")]
    by_peer = {row["peer"]: row for row in rows or compare["rows"]}
    lines = [summary_row(peer, compare["peers"][peer], by_peer[peer]) for peer in shown]
    made = [origin_line("compare", compare)]
    if small := best_row(decode, "smaller copies"):
        rate, ratio = f"{small['images_per_second']:,.0f}", f"**{small['ratio']:.1f}x**"
        name = "**imagenet-seq**, smaller copies, decoder alone"
        lines.append([name, "exact, of lossy copies", rate, f"{ratio} on the same copies"])
        made.append(f"Last row: `python benchmarks/{COMMANDS['decode']}`")
    head = ["training crop 224, uint8, one core", "pixels", "images/s", "beside torchvision"]
    return "\n\n".join([table(head, lines), ". ".join(made)])


def summary_row(peer: str, about: Row, row: Row) -> list[str]:
    ratio = f"{row['ratio']:.1f}x" if "ratio" in row else ""  # torchvision may not have been run
    if ratio and peer.startswith("imagenet_seq"):
        ratio = f"**{ratio}**"
    return [LABELS[peer], pixels_of(about), f"{row['images_per_second']:,.0f}", ratio]


def pixels_of(about: Row) -> str:
    """Say by how much a loader's pixels differ from Pillow's: on average, and at most."""
    if about["max_difference"] == 0:
        return "exact"
    return f"differ by {about['mean_difference']:.1f}, at most {about['max_difference']}"


def best_row(decode: Row | None, source: str) -> Row | None:
    """Return the training crop to uint8 from a source, with the best kernels there are."""
    rows = decode["rows"] if decode else []
    wanted = {"split": "train", "dtype": "uint8", "source": source}
    found = [row for row in rows if row["group"] and wanted.items() <= row.items()]
    return found[-1] if found else None


def stages_section(result: Row) -> str:
    """Where the time of a training crop goes: microseconds of each stage."""
    rows = [
        row
        for row in result["rows"]
        if (row["split"], row["dtype"], row["class"]) == ("train", "uint8", "all") and row["group"]
    ]
    stages = list(rows[0]["stages_ns"])
    lines = [
        [
            f"{row['source']}, {row['level']}",
            *(f"{row['stages_ns'][stage] / 1e3:.0f}" for stage in stages),
            f"{row['ns_per_image'] / 1e3:.0f}",
        ]
        for row in rows
    ]
    head = ["us an image, training crop to uint8", *stages, "all"]
    return "\n\n".join([table(head, lines), origin_line("decode", result)])


def decode_section(result: Row) -> str:
    """The decoder beside Pillow, one row a piece of work."""
    rows = [row for row in result["rows"] if row["class"] in ("all", "smaller copies")]
    grouped = [row for row in rows if row["group"] is not None]
    best = grouped[-1]["level"]
    levels = [best, *(["avx2"] if best == "avx512" else [])]
    lines = [decode_row(row) for row in grouped if row["level"] in levels]
    return "\n\n".join(
        [
            f"**The decoder alone**, one core, {rows[0]['images']} photos in memory, images/s "
            "(median ratio of CPU times, least to greatest):",
            table(["", "Pillow + torchvision", "imagenet-seq", "ratio"], lines),
            origin_line("decode", result),
        ]
    )


def decode_row(row: Row) -> list[str]:
    crop = f"{SPLITS[row['split']]} {row['size']}"
    name = f"{crop}, {row['dtype']}, from {row['source']}, {row['level']}"
    ratio = f"**{row['ratio']:.1f}x** ({row['ratio_least']:.1f} to {row['ratio_greatest']:.1f})"
    baseline = median_rate(row["baseline_seconds"], row["images"])
    return [name, f"{baseline:,.0f}", f"{row['images_per_second']:,.0f}", ratio]


def median_rate(seconds: Sequence[float], num_images: int) -> float:
    return float(num_images / sorted(seconds)[len(seconds) // 2])


def loader_section(result: Row) -> str:
    """The Loader beside the decoder alone."""
    lines = [
        [
            f"{row['dtype']}, {count_cores(row['cores'])}",
            f"{row['kernel']:,.0f}",
            f"{row['loader']:,.0f}",
            f"**{row['ratio']:.0%}** ({row['ratio_least']:.0%} to {row['ratio_greatest']:.0%})",
        ]
        for row in result["rows"]
    ]
    return "\n\n".join(
        [
            "**The Loader beside the decoder alone**, a pack in memory, batches of "
            f"{result['batch_size']}, images/s; on several cores the decoder runs in as many "
            "processes:",
            table(["", "decoder alone", "Loader", "ratio"], lines),
            origin_line("loader", result),
        ]
    )


def sources_section(result: Row) -> str:
    """Each kind of source beside the ImageFolder it was made of: a row a kind, a column a case."""
    cases = list(dict.fromkeys((row["split"], row["cores"]) for row in result["rows"]))
    by_kind: dict[str, dict[Any, Row]] = {}
    for row in result["rows"]:
        by_kind.setdefault(row["kind"], {})[row["split"], row["cores"]] = row
    lines = [
        [kind, *(f"{rows[case]['ratio']:.0%} / {rows[case]['cpu_ratio']:.0%}" for case in cases)]
        for kind, rows in by_kind.items()
    ]
    names = [f"{split}, {cores} core{'s' * (cores > 1)}" for split, cores in cases]
    return "\n\n".join(
        [
            f"**Sources**, {result['images']} photos in memory: images/s beside the ImageFolder of "
            "the same photos / the same for a CPU second. Training: from the source by block "
            "shuffle, from the folder by a uniform one. FFCV's writer makes smaller images:",
            table(["source", *names], lines),
            origin_line("sources", result),
        ]
    )


def compare_section(result: Row) -> str:
    """Loaders beside each other: a row a loader, a column a case."""
    cases = list(dict.fromkeys((row["cores"], row["dtype"]) for row in result["rows"]))
    by_case = {(row["peer"], row["cores"], row["dtype"]): row for row in result["rows"]}
    head = ["", "pixels", *(f"{count_cores(n)}, {d}" for n, d in cases)]
    lines = [
        compare_row(peer, about, [by_case[(peer, *case)] for case in cases])
        for peer, about in result["peers"].items()
    ]
    return "\n\n".join(
        [
            f"**Loaders**, RandomResizedCrop(224) and flip of {result['images']} photos in the "
            f"page cache, batches of {result['batch_size']}: images/s / CPU seconds for 1000 "
            "images; then seconds to the first batch and peak MB of the first case:",
            table([*head, "first batch", "MB"], lines),
            origin_line("compare", result),
        ]
    )


def compare_row(peer: str, about: Row, rows: Sequence[Row]) -> list[str]:
    name = LABELS[peer] if peer.startswith("imagenet_seq") else f"{LABELS[peer]} {about['version']}"
    return [
        name,
        pixels_of(about),
        *(f"{r['images_per_second']:,.0f} / {r['cpu_seconds_per_1000']:.2f}" for r in rows),
        f"{rows[0]['first_batch_seconds']:.1f}",
        f"{rows[0]['peak_megabytes']:,.0f}",
    ]


def count_cores(number: int) -> str:
    return "1 core" if number == 1 else f"{number} cores"


# ---- tables of docs/hard-disk.md ----

READERS = {
    "imagenet_seq": "**imagenet-seq**",
    "torchvision": "torchvision ImageFolder, DataLoader",
    "webdataset": "WebDataset",
}


def read_section(result: Row) -> str:
    """Reading from a hard disk: ours, memory that is kept, the peers, and the targets."""
    rows = [row for row in result["rows"] if not row["void"]]
    rate = max(result["sequential_mb_per_s"])
    parts = {
        f"**Packs.** The disk reads one file from end to end at {rate:.0f} MB/s:": packs_table(
            rows, rate
        ),
        "**Memory.** GB that the disk reads in each epoch:": memory_table(rows),
        "**Beside others.** Seconds for 256 images:": peers_table(rows),
        "**Targets:**": targets_table(result["targets"]),
    }
    shown = [f"{title}\n\n{made}" for title, made in parts.items() if made.count("\n") > 1]
    return "\n\n".join([*shown, origin_line("read", result)])


def packs_table(rows: Sequence[Row], rate: float) -> str:
    names = {"bytes": "140 GB, bytes", "decoded": "pack, decoded", "training": "pack, paced script"}
    head = ["", "ranks", "readahead KB", "disk MB/s", "of its rate", "JPEG MB/s", "slowest rank"]
    lines = [
        [
            f"{names[row['case']]}, blocks of {row['block_mb']} MB",
            str(row["ranks"]),
            str(row["readahead_kb"]),
            f"**{row['disk_mb_per_s']:.1f}**",
            f"{row['disk_mb_per_s'] / rate:.0%}",
            f"{row['sample_mb_per_s']:.1f}",
            f"{row['slowest']:.0%}",
        ]
        for row in rows
        if row["case"] in names
    ]
    return table(head, lines)


def memory_table(rows: Sequence[Row]) -> str:
    lines = [
        [row["case"], *(f"{count / 1e9:.3f}" for count in row["epoch_disk_bytes"])]
        for row in rows
        if row["case"] in ("nothing kept", "half kept", "no argument")
    ]
    most = max(map(len, lines), default=0)
    return table(
        ["", *(f"epoch {number}" for number in range(1, most))],
        [[*line, *[""] * (most - len(line))] for line in lines],
    )


def peers_table(rows: Sequence[Row]) -> str:
    shown = [
        row
        for row in rows
        if row["case"] in ("shards", "decoded") or row["case"].endswith(" files")
    ]
    lines = [
        [
            READERS[row["reader"]],
            "pack" if row["case"] == "decoded" else row["case"],
            "decoded" if row["decoded"] else "bytes",
            str(row["readahead_kb"]),
            f"**{row['seconds_per_256']:.3f}**",
        ]
        for row in shown
    ]
    return table(["", "reads", "gives", "readahead KB", "s for 256 images"], lines)


def targets_table(found: Sequence[Row]) -> str:
    lines = [
        [
            target["measure"],
            target["wanted"],
            f"{target['value']:.3g}" if target["met"] else f"**{target['value']:.3g}, missed**",
        ]
        for target in found
    ]
    return table(["", "target", "measured"], lines)


# ---- the table of docs/sources.md that was measured on a disk ----

DISK_SOURCES = {  # case -> what it is called, and the name under which its indexing was measured
    "webdataset": ("WebDataset, two shuffled shards", "webdataset"),
    "lmdb": ("LMDB in random order, the photos' own bytes", "lmdb"),
    "official, in order": ("the official train archive, `shuffle=False`", "ilsvrc2012"),
    "official, shuffled": ("the same, its uniform shuffle in windows", ""),
}


def read_sources_section(result: Row) -> str:
    """Sources on the disk model: how fast each was indexed and read."""
    indexed = {name: f"{rate:.1f} MB/s" for name, rate in result["indexing_mb_per_s"].items()}
    lines = []
    for row in result["rows"]:
        label, key = DISK_SOURCES[row["case"]]
        disk, seconds = f"{row['disk_mb_per_s']:.1f} MB/s", f"{row['seconds_per_256']:.3f} s"
        lines.append([label, indexed.get(key, ""), disk, seconds])
    made = table(["", "indexed at", "disk", "256 images"], lines)
    return "\n\n".join([made, origin_line("read_sources", result)])


# ---- plot ----

BAR_PX, GAP_PX, NAME_PX, WIDTH_PX, RATE_PX = 22, 10, 250, 760, 70
# Colours that stand out on white and on black: a page's theme need not be the system's, which is
# all that an image could ask for.
STYLE = """<style>
text { font: 14px sans-serif; fill: #768390 }
.bar { fill: #8c959f } .ours { fill: #2f81f7 }
</style>"""


def make_plot(result: Row) -> str:
    """Draw images/s on one core, uint8, as bars; readable on light and dark pages."""
    rows = [row for row in result["rows"] if (row["cores"], row["dtype"]) == (1, "uint8")]
    rows = rows or result["rows"]
    most = max(row["images_per_second"] for row in rows)
    height = 40 + len(rows) * (BAR_PX + GAP_PX)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {height}" '
        f'width="{WIDTH_PX}" height="{height}" role="img">',
        STYLE,
        f'<text x="0" y="18">Images/s, {count_cores(rows[0]["cores"])}, {rows[0]["dtype"]}: '
        "RandomResizedCrop(224) and flip</text>",
    ]
    for place, row in enumerate(rows):
        parts += bar(row, 34 + place * (BAR_PX + GAP_PX), most)
    return "\n".join([*parts, "</svg>"]) + "\n"


def bar(row: Row, top: int, most: float) -> list[str]:
    rate = row["images_per_second"]
    length = (WIDTH_PX - NAME_PX - RATE_PX) * rate / most
    kind = "bar ours" if row["peer"].startswith("imagenet_seq") else "bar"
    name = escape(LABELS[row["peer"]].replace("*", ""))
    baseline = top + BAR_PX - 6
    return [
        f'<text x="{NAME_PX - 8}" y="{baseline}" text-anchor="end">{name}</text>',
        f'<rect class="{kind}" x="{NAME_PX}" y="{top}" width="{length:.1f}" height="{BAR_PX}"/>',
        f'<text x="{NAME_PX + length + 6:.1f}" y="{baseline}">{rate:,.0f}</text>',
    ]


# ---- files ----


def made_sections(results: dict[str, Row]) -> dict[tuple[Path, str], str]:
    """Return what stands between the markers of each page; "" where there are no results."""
    decode = results.get("decode")
    makers = {
        (README, "performance"): {"compare": lambda compare: summary_section(compare, decode)},
        (PERFORMANCE_PAGE, "stages"): {"decode": stages_section},
        (PERFORMANCE_PAGE, "performance"): {
            "decode": decode_section,
            "compare": compare_section,
            "loader": loader_section,
        },
        (SOURCES_PAGE, "sources"): {"sources": sources_section},
        (SOURCES_PAGE, "disk"): {"read_sources": read_sources_section},
        (READ_PAGE, "reading"): {"read": read_section},
    }
    return {
        place: "\n\n".join(make(results[name]) for name, make in of_page.items() if name in results)
        for place, of_page in makers.items()
    }


def made_files(root: Path, results: dict[str, Row]) -> dict[Path, str]:
    """Return the files to write and their text."""
    made: dict[Path, str] = {}
    for (page, name), section in made_sections(results).items():
        if section:
            path = root / page
            made[path] = with_section(made.get(path) or path.read_text(), name, section, path)
    if "compare" in results:
        made[root / PLOT] = make_plot(results["compare"])
    return made


def with_section(text: str, name: str, section: str, page: Path) -> str:
    """Return a page's text with this between the two markers of that name."""
    begin, end = (marker.format(name) for marker in MARKERS)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{page}: expected the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md lies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    made = made_files(args.root, read_results(args.results))
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if not args.check:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made[path])
        return 0
    for path in stale:
        print(f"{path} is not what {args.results} gives: run python benchmarks/report.py")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
