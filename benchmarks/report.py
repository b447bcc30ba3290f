"""Make the tables of README and docs/hard-disk.md, and docs/performance.svg, of committed results.

    python benchmarks/report.py [--check]

Reads benchmarks/results/decode.json, loader.json and compare.json (`make bench` writes them),
sources.json (bench_loader.py --source all) and read.json (bench_read.py; docs/hard-disk.md says
how); what is missing is left out. Replaces what stands between the two markers in README.md and
docs/hard-disk.md. With --check nothing is written; the exit status says whether the pages and the
plot are what the results give.
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
BEGIN = "<!-- performance: made by benchmarks/report.py -->"
END = "<!-- performance: end -->"
READ_BEGIN = "<!-- reading: made by benchmarks/report.py -->"
READ_END = "<!-- reading: end -->"
READ_PAGE = Path("docs/hard-disk.md")
PLOT = Path("docs/performance.svg")
COMMANDS = {
    "decode": "bench_decode.py",
    "loader": "bench_loader.py",
    "compare": "compare.py",
    "sources": "bench_loader.py --source all",
    "read": "bench_read.py --spindle PROGRAM",
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
    head = ["", "pixels differ by (at most)", *(f"{count_cores(n)}, {d}" for n, d in cases)]
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
            f"![images/s of the loaders]({PLOT})",
            origin_line("compare", result),
        ]
    )


def compare_row(peer: str, about: Row, rows: Sequence[Row]) -> list[str]:
    exact = about["max_difference"] == 0
    pixels = "exact" if exact else f"{about['mean_difference']:.1f} ({about['max_difference']})"
    name = LABELS[peer] if peer.startswith("imagenet_seq") else f"{LABELS[peer]} {about['version']}"
    return [
        name,
        pixels,
        *(f"{r['images_per_second']:,.0f} / {r['cpu_seconds_per_1000']:.2f}" for r in rows),
        f"{rows[0]['first_batch_seconds']:.1f}",
        f"{rows[0]['peak_megabytes']:,.0f}",
    ]


def count_cores(number: int) -> str:
    return "1 core" if number == 1 else f"{number} cores"


def make_section(results: dict[str, Row]) -> str:
    """Return what stands between the markers."""
    makers = {
        "decode": decode_section,
        "compare": compare_section,
        "loader": loader_section,
        "sources": sources_section,
    }
    sections = [make(results[name]) for name, make in makers.items() if name in results]
    return "\n\n".join(sections)


# ---- tables of docs/hard-disk.md ----

READERS = {
    "imagenet_seq": "**imagenet-seq**",
    "torchvision": "torchvision ImageFolder, DataLoader",
    "webdataset": "WebDataset",
}


def read_section(result: Row) -> str:
    """Reading from a hard disk: ours, memory that is kept, the peers, and what was promised."""
    rows = [row for row in result["rows"] if not row["void"]]
    rate = max(result["sequential_mb_per_s"])
    parts = {
        f"**Packs.** The disk reads one file from end to end at {rate:.0f} MB/s:": packs_table(
            rows, rate
        ),
        "**Memory.** GB that the disk reads in each epoch:": memory_table(rows),
        "**Beside others.** Seconds for 256 images:": peers_table(rows),
        "**What was wanted:**": targets_table(result["targets"]),
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
    return table(["", "wanted", "measured"], lines)


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


def made_files(root: Path, results: dict[str, Row]) -> dict[Path, str]:
    """Return the files to write and their text."""
    readme = root / "README.md"
    made = {readme: with_section(readme, BEGIN, END, make_section(results))}
    if "read" in results:
        page = root / READ_PAGE
        made[page] = with_section(page, READ_BEGIN, READ_END, read_section(results["read"]))
    if "compare" in results:
        made[root / PLOT] = make_plot(results["compare"])
    return made


def with_section(page: Path, begin: str, end: str, section: str) -> str:
    """Return a page's text with this between its two markers."""
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{page}: expected the lines {begin!r} and {end!r}")
    between = f"\n{section}\n\n" if section else ""
    return f"{before}{begin}\n{between}{end}{after}"


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
