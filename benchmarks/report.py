"""Make README's tables and docs/performance.svg of the committed results.

    python benchmarks/report.py [--check]

Reads benchmarks/results/decode.json, loader.json and compare.json (`make bench` writes them; what
is missing is left out) and replaces what stands between the two markers in README.md. With --check
nothing is written; the exit status says whether README and the plot are what the results give.
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
PLOT = Path("docs/performance.svg")
COMMANDS = {
    "decode": "bench_decode.py",
    "loader": "bench_loader.py",
    "compare": "compare.py",
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
    makers = {"decode": decode_section, "compare": compare_section, "loader": loader_section}
    sections = [make(results[name]) for name, make in makers.items() if name in results]
    return "\n\n".join(sections)


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
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme}: expected the lines {BEGIN!r} and {END!r}")
    section = make_section(results)
    between = f"\n{section}\n\n" if section else ""
    made = {readme: f"{before}{BEGIN}\n{between}{END}{after}"}
    if "compare" in results:
        made[root / PLOT] = make_plot(results["compare"])
    return made


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
