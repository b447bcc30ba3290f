"""The origin of results (machine, versions, commit, date), and how results are written."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from photos import ROOT

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "Pillow", "numpy")


def describe_origin() -> dict[str, Any]:
    """Describe this machine and the versions of libraries."""
    from imagenet_seq import native

    return {
        "machine": _processor(),
        "cores": len(available_cores()),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.release()}",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "core": native.build_info(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `begin` and `write` follow."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement there")
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="write results of sources that are not committed, marked as such",
    )


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the origin; refuse to measure for the results file without a commit."""
    origin = describe_origin()
    if args.json and not args.allow_dirty and not _is_commit(origin["commit"]):
        raise SystemExit(
            f"the sources are at commit {origin['commit']!r}, which nobody could measure again: "
            "commit first, or pass --allow-dirty, or leave --json out"
        )
    print(", ".join(f"{name} {value}" for name, value in origin.items()), flush=True)
    return origin


def write(args: argparse.Namespace, origin: dict[str, Any], measured: dict[str, Any]) -> None:
    """Write the results to the file that was asked for, if any."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"origin": origin, **measured}, indent=1) + "\n")


def available_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_to(cores: list[int]) -> None:
    """Bind this thread and those it starts to these cores, if the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _is_commit(commit: str) -> bool:
    return commit != "unknown" and not commit.endswith("-dirty")


def _commit() -> str:
    """Return the commit, with "-dirty" if files differ that are not made from results."""
    made = (":!benchmarks/results", ":!README.md", ":!docs")
    changed = _git("status", "--porcelain", "--", ".", *made)
    commit = _git("rev-parse", "--short=10", "HEAD") or "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
