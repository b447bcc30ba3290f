"""What the original project's preprocess_sequential.py does: LMDBs beside ImageNet's folders."""

from __future__ import annotations

import os

from imagenet_seq.pack import OnError, Settings, Summary, pack


def preprocess(
    source: str | os.PathLike[str] | None = None,
    destination: str | os.PathLike[str] | None = None,
    *,
    keep_bytes: bool = False,
    seed: int = 0,
    on_error: OnError = "fail",
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[str, Summary]:
    """Make ILSVRC-train.lmdb and ILSVRC-val.lmdb of the splits that are there.

    Train gets a random order, val keeps its own, as tensorpack has them. A file that is there
    already is left as it is. When interrupted, the same call continues.

    Args:
        source: any data set, such as a folder with train/ and val/; None: that in $IMAGENET.
        destination: folder for the files; None: `source`, or the folder that it lies in.
        keep_bytes: store every image's own bytes; otherwise they are re-coded losslessly, which
            lets the Loader decode them faster.
        seed: of train's order.
        on_error: as for `pack`.
        num_workers: threads that re-code; None: one for each available core.
        progress: whether to show progress on stderr.

    Returns:
        For each split what its file holds.

    Raises:
        ValueError: where there is no source; else as `pack`.
    """
    source = source or os.environ.get("IMAGENET")
    if not source:
        raise ValueError("expected a path with ImageNet as argument or in $IMAGENET, got none")
    source = os.path.abspath(os.path.expanduser(os.fspath(source)))
    return pack(
        source,
        destination or (source if os.path.isdir(source) else os.path.dirname(source)),
        format="lmdb",
        settings=Settings(keep_bytes=keep_bytes, seed=seed),
        on_error=on_error,
        num_workers=num_workers,
        progress=progress,
    )
