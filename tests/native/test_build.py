"""What the build says where it can't work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def test_windows_is_refused_before_anything_else(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake on PATH")
    result = subprocess.run(
        [
            cmake,
            *("-S", str(Path(__file__).parents[2]), "-B", str(tmp_path)),
            *("-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_CXX_COMPILER=/no/compiler"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "Windows is not supported" in result.stderr
    assert "WSL" in result.stderr
    assert "/no/compiler" not in result.stderr
