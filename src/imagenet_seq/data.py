"""The names the original project (sequential-imagenet-dataloader) used."""

from __future__ import annotations

from imagenet_seq.loader import ImagenetLoader, Loader

__all__ = ["ImagenetLoader", "Loader"]
