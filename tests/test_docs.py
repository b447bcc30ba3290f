"""The pages: docs/loader.md lists what a Loader takes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from imagenet_seq import ImagenetLoader, Loader, ReadOptions

PAGE = Path(__file__).parents[1] / "docs" / "loader.md"


def test_every_argument_of_the_loader_is_listed() -> None:
    listed = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    assert set(inspect.signature(Loader).parameters) <= listed
    assert set(inspect.signature(ImagenetLoader).parameters) - {"arguments"} <= listed
    assert {field.name for field in dataclasses.fields(ReadOptions)} <= listed
