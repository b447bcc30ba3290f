"""The layout of the sources: which module imports which, how long a file is, what it is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "imagenet_seq"

# From bottom to top: a module imports from the floors below its own, and from its own folder.
FLOORS = (
    ("errors", "text", "machine", "device"),
    ("index",),
    ("plan",),
    ("native",),
    ("read", "decode"),
    ("batch", "sources"),
    ("options", "dataset", "info"),
    ("loader",),
    ("pack",),
    ("cli", "data"),
    ("__init__",),
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}

IMPORTS_BY_NAME = {
    "__init__.py": "imports the module of a public name when the name is first used",
    "sources/formats/huggingface.py": "imports pyarrow, which is optional",
}

MOST_LINES = {"src": 600, "core": 600, "tests": 1000}
LONG_FILES = {
    "tests/native/engine_test.cpp": "the engine as a whole, through its C functions",
    "tests/pack/test_pack.py": "packing as a whole: each test runs the command",
    "tests/read/test_read.py": "the read stage as a whole, on one recording engine",
}


def module_files() -> dict[str, Path]:
    """The modules of the package, such as "plan.epoch"; "native" is native/__init__.py."""
    folder = ROOT / "src" / PACKAGE
    paths = {path.relative_to(folder).with_suffix("").parts: path for path in folder.rglob("*.py")}
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts): path
        for parts, path in paths.items()
    }


MODULES = module_files()


def imports_of(path: Path) -> Iterator[str]:
    """All imports in a file, as full names; those in functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for name in imports_of(path):
        package, _, rest = name.partition(".")
        # The version is set before anything else is imported, so everybody may have it.
        if package == PACKAGE and rest != "__version__":
            module = rest if rest in MODULES else rest.rpartition(".")[0]
            found.add(module or "__init__")
    return found


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def test_modules_import_from_floors_below() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in own_imports(path)
        if folder_of(imported) != folder_of(module)
        and FLOOR[folder_of(imported)] >= FLOOR[folder_of(module)]
    ]
    assert not wrong


def test_no_modules_import_each_other() -> None:
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def test_imports_are_seen_by_these_tests() -> None:
    names = ("import_module", "__import__")
    found = {
        path.relative_to(ROOT / "src" / PACKAGE).as_posix()
        for path in MODULES.values()
        if any(name in path.read_text() for name in names)
    }
    assert found == IMPORTS_BY_NAME.keys()


def test_only_native_imports_ctypes() -> None:
    modules = {
        folder_of(module)
        for module, path in MODULES.items()
        if any(name.partition(".")[0] == "ctypes" for name in imports_of(path))
    }
    assert modules == {"native"}


def test_files_are_short_or_say_why() -> None:
    long = {
        path.relative_to(ROOT).as_posix()
        for folder, most in MOST_LINES.items()
        for suffix in ("py", "cpp", "h")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        if path.read_bytes().count(b"\n") > most
    }
    assert long == LONG_FILES.keys()


def test_names_say_what_is_inside() -> None:
    paths = [path for folder in ("src", "core") for path in (ROOT / folder).rglob("*")]
    assert paths
    assert not [path for path in paths if path.stem in ("utils", "common", "base", "misc")]
