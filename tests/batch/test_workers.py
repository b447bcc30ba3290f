"""Workers and their threads: what is left of an epoch that ended early."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.images import add_split
from torchvision.transforms import v2

from imagenet_seq.batch.memory import PagedMemory
from imagenet_seq.batch.progress import PlanAhead, Progress
from imagenet_seq.errors import SampleError
from imagenet_seq.loader import Loader

EVAL = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])


def join_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("imagenet-seq"):
            thread.join(20)
            assert not thread.is_alive()


def test_a_failed_epoch_keeps_no_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_split(tmp_path, 12, 2, "train")
    victim = sorted((tmp_path / "train").rglob("*.jpg"))[7]
    victim.write_bytes(victim.read_bytes()[:-200])
    allocate: Callable[[PagedMemory], torch.Tensor] = PagedMemory.allocate
    batches = []

    def recorded(memory: PagedMemory) -> torch.Tensor:
        batch = allocate(memory)
        batches.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(PagedMemory, "allocate", recorded)
    # With ram=0 the next epoch's plan is made and read ahead from the first batch on.
    loader = Loader(tmp_path, "train", EVAL, batch_size=2, shuffle=False, ram=0)
    with pytest.raises(SampleError):
        list(loader)
    join_threads()
    gc.collect()
    assert len(batches) > 3
    assert not any(batch() is not None for batch in batches)
    assert len(loader) == 6  # it is the epoch's memory that went, not the loader's


def test_a_plan_made_ahead_does_not_keep_workers_alive(make_folder: Callable[..., Path]) -> None:
    loader = Loader(make_folder(12, 2), "train", EVAL, batch_size=2)
    workers = loader._new_workers()
    ahead = PlanAhead(Progress(1), workers, loader._plan, prepare_rows=None)
    ahead.wait()
    assert ahead.plan is not None
    del workers  # as Ctrl-C may do it, between forgetting and closing
    gc.collect()
    join_threads()
