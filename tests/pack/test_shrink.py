"""Smaller copies: never larger, reproducible, honest about what they cost, and decoded exactly."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from helpers.images import jpeg_bytes, photo_like
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from imagenet_seq import cli, native
from imagenet_seq.errors import PackError
from imagenet_seq.loader import Loader
from imagenet_seq.native.recipe import Geometry, Recipe
from imagenet_seq.pack.encode import Settings
from imagenet_seq.pack.packing import pack_dataset
from imagenet_seq.pack.shards import Summary
from imagenet_seq.pack.shrink import Shrink, shrunk_size, smaller_copy
from imagenet_seq.pack.verify import verify
from imagenet_seq.sources.formats import pack as pack_format
from imagenet_seq.sources.recognise import open_source

ORIENTATION, MAKER = 0x0112, 0x010F


def make_pack(source: Path, destination: Path, **options: Any) -> Summary:
    settings = Settings(shard_bytes=60_000, shrink=Shrink(150))
    options = {"settings": settings, "num_workers": 2, "progress": False, **options}
    return pack_dataset(source, destination, **options)[""]


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def stored(folder: Path) -> dict[str, bytes]:
    """The stored bytes of every sample."""
    index = open_source(folder).index
    assert index.length is not None
    shards = [(folder / name).read_bytes() for name in index.files]
    return {
        name: shards[index.file[i]][index.offset[i] : index.offset[i] + index.length[i]]
        for i, name in enumerate(index.name)
    }


def flags(folder: Path) -> dict[str, int]:
    index = open_source(folder).index
    assert index.flags is not None
    return dict(zip(index.name, index.flags.tolist(), strict=True))


@pytest.fixture(scope="module")
def source(make_folder: Callable[..., Path]) -> Path:
    """40 to 260 px, quality 40 to 98, some grey."""
    return make_folder(40, num_classes=4) / "train"


@pytest.fixture
def photo() -> Image.Image:
    return photo_like(np.random.default_rng(1), 160, 120)


# ---- the size of a copy --------------------------------------------------------------------------

SIDES = st.integers(1, 70_000)


@given(SIDES, SIDES, st.integers(1, 65_500))
def test_a_size_never_grows_and_keeps_its_aspect(width: int, height: int, max_side: int) -> None:
    size = shrunk_size((width, height), max_side)
    if max(width, height) <= max_side:
        assert size == (width, height)
        return
    assert max(size) == max_side
    assert min(size) >= 1
    scale = max_side / max(width, height)
    for before, after in zip((width, height), size, strict=True):
        assert after == 1 or -1e-6 <= before * scale - after < 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (500, 375)),
        ((501, 376), (500, 375)),
        ((375, 5000), (37, 500)),
        ((1, 3000), (1, 500)),
        ((20_000, 3), (500, 1)),
    ],
)
def test_sizes_of_copies(size: tuple[int, int], expected: tuple[int, int]) -> None:
    copy = smaller_copy(jpeg_bytes(Image.new("RGB", size), quality=100), Shrink(500))
    assert (size if copy is None else opened(copy).size) == expected


# ---- the pixels of a copy ------------------------------------------------------------------------


@pytest.mark.parametrize(("subsampling", "factors"), [("420", 2), ("422", 1), ("444", 0)])
def test_a_copy_is_what_pillow_resizes_and_encodes(
    photo: Image.Image, subsampling: Any, factors: int
) -> None:
    data = jpeg_bytes(photo, quality=97)
    copy = smaller_copy(data, Shrink(100, 80, subsampling))
    assert copy is not None
    resized = opened(data).resize((100, 75), Image.Resampling.BICUBIC)
    assert copy == jpeg_bytes(resized, quality=80, subsampling=factors)


def test_small_images_are_encoded_anew_where_that_saves_bytes(photo: Image.Image) -> None:
    fine, coarse = jpeg_bytes(photo, quality=98), jpeg_bytes(photo, quality=40)
    copy = smaller_copy(fine, Shrink(500))
    assert copy == jpeg_bytes(opened(fine), quality=90, subsampling=2)
    assert len(copy) < len(fine)
    assert smaller_copy(coarse, Shrink(500)) is None


def test_large_images_are_resized_even_where_that_takes_more_bytes(photo: Image.Image) -> None:
    coarse = jpeg_bytes(photo, quality=10)
    copy = smaller_copy(coarse, Shrink(150))
    assert copy is not None
    assert opened(copy).size == (150, 112)
    assert len(copy) > len(coarse)


def palette_with_alpha(image: Image.Image) -> bytes:
    return encoded(image.quantize(64), "PNG", transparency=3)


INPUTS: dict[str, tuple[Callable[[Image.Image], bytes], str]] = {
    "grey JPEG": (lambda i: jpeg_bytes(i.convert("L")), "L"),
    "progressive JPEG": (lambda i: jpeg_bytes(i, progressive=True), "RGB"),
    "CMYK JPEG": (lambda i: jpeg_bytes(i.convert("CMYK")), "RGB"),
    "PNG": (lambda i: encoded(i, "PNG"), "RGB"),
    "PNG with alpha": (lambda i: encoded(i.convert("RGBA"), "PNG"), "RGB"),
    "grey PNG": (lambda i: encoded(i.convert("L"), "PNG"), "L"),
    "grey PNG with alpha": (lambda i: encoded(i.convert("LA"), "PNG"), "RGB"),
    "16-bit PNG": (lambda i: encoded(i.convert("L").convert("I;16"), "PNG"), "RGB"),
    "black and white PNG": (lambda i: encoded(i.convert("1"), "PNG"), "RGB"),
    "palette with alpha": (palette_with_alpha, "RGB"),
    "GIF": (lambda i: encoded(i, "GIF"), "RGB"),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_input_is_converted_as_the_loader_does(photo: Image.Image, kind: str) -> None:
    make, mode = INPUTS[kind]
    data = make(photo)
    copy = smaller_copy(data, Shrink(100, 100, "444"))
    assert copy is not None
    seen = opened(data).convert("RGB").resize((100, 75), Image.Resampling.BICUBIC)
    assert (opened(copy).mode, opened(copy).size) == (mode, (100, 75))
    difference = np.asarray(opened(copy).convert("RGB"), int) - np.asarray(seen, int)
    assert np.abs(difference).max() <= 6
    assert native.transcode(copy) is not None


def test_damaged_images_are_not_copied(photo: Image.Image) -> None:
    data = jpeg_bytes(photo)
    for damaged in (b"", b"nothing", data[: len(data) // 2]):
        assert smaller_copy(damaged, Shrink(100)) is None


# ---- metadata ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [False, True])
def test_orientation_stays_and_other_exif_goes(
    photo: Image.Image, tmp_path: Path, strip: bool
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = 6, "someone"
    (tmp_path / "source" / "a").mkdir(parents=True)
    data = jpeg_bytes(photo, exif=exif, comment=b"a comment")
    (tmp_path / "source" / "a" / "1.jpg").write_bytes(data)
    settings = Settings(strip=strip, shrink=Shrink(100))
    assert make_pack(tmp_path / "source", tmp_path / "pack", settings=settings).num_shrunk == 1
    (copy,) = stored(tmp_path / "pack").values()
    assert opened(copy).size == (100, 75)  # not turned: the tag says how
    assert dict(opened(copy).getexif()) == {ORIENTATION: 6}
    assert "comment" not in opened(copy).info


@pytest.mark.parametrize(
    "exif",
    [
        b"nothing",
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0\0\0\0\0",
    ],
    ids=["no header", "no directory", "cut off", "orientation abc"],
)
def test_damaged_exif_goes(photo: Image.Image, tmp_path: Path, exif: bytes) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "1.jpg").write_bytes(jpeg_bytes(photo, exif=b"Exif\0\0" + exif))
    make_pack(tmp_path / "source", tmp_path / "pack")
    (copy,) = stored(tmp_path / "pack").values()
    assert opened(copy).size == (150, 112)
    assert "exif" not in opened(copy).info


def test_a_profile_stays_where_it_fits_and_strip_drops_it(
    photo: Image.Image, tmp_path: Path
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "fits.jpg": jpeg_bytes(photo, icc_profile=profile),
        "grey.jpg": jpeg_bytes(photo.convert("L"), icc_profile=profile),
        "cmyk.jpg": jpeg_bytes(
            photo.convert("CMYK"), icc_profile=profile[:16] + b"CMYK" + profile[20:]
        ),
    }
    (tmp_path / "source" / "a").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "source" / "a" / name).write_bytes(data)
    make_pack(tmp_path / "source", tmp_path / "pack")
    kept = {
        name: opened(d).info.get("icc_profile") for name, d in stored(tmp_path / "pack").items()
    }
    assert kept == {"a/fits.jpg": profile, "a/grey.jpg": None, "a/cmyk.jpg": None}
    settings = Settings(strip=True, shrink=Shrink(100))
    make_pack(tmp_path / "source", tmp_path / "stripped", settings=settings)
    for data in stored(tmp_path / "stripped").values():
        assert "icc_profile" not in opened(data).info


# ---- packs ---------------------------------------------------------------------------------------


def test_a_pack_of_smaller_copies(source: Path, tmp_path: Path) -> None:
    summary = make_pack(source, tmp_path / "pack")
    flag = flags(tmp_path / "pack")
    shrunk = {name for name in flag if flag[name] & pack_format.FLAG_SHRUNK}
    assert summary.num_shrunk == len(shrunk)
    assert (summary.num_samples, summary.num_canonical, summary.num_as_is) == (40, 40, 0)
    for name, data in stored(tmp_path / "pack").items():
        original = (source / name).read_bytes()
        copy = smaller_copy(original, Shrink(150))
        assert (copy is not None) == (name in shrunk)
        assert opened(data).tobytes() == opened(copy or original).tobytes()
        assert max(opened(data).size) <= 150
    large = {name for name in flag if max(opened((source / name).read_bytes()).size) > 150}
    # All three cases occur: resized, small and encoded anew, small and left as it is.
    assert large < shrunk < set(flag)


def test_packs_do_not_depend_on_threads(source: Path, tmp_path: Path) -> None:
    for num_workers in (1, 5):
        make_pack(source, tmp_path / str(num_workers), num_workers=num_workers)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("1", "5")]
    assert files[0] == files[1]


def test_pack_json_records_what_made_the_copies(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "small", settings=Settings(shrink=Shrink(100, 70, "422")))
    make_pack(source, tmp_path / "lossless", settings=Settings())
    settings = [
        json.loads((tmp_path / name / "pack.json").read_text())["settings"]
        for name in ("small", "lossless")
    ]
    keys = ("max_side", "quality", "subsampling")
    assert [settings[0][key] for key in keys] == [100, 70, "422"]
    assert settings[0]["encoder"].startswith(f"Pillow {PIL.__version__}, libjpeg")
    assert [settings[1][key] for key in (*keys, "encoder")] == [None] * 4


def test_another_pillow_does_not_continue(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcode, calls = native.transcode, 0

    def interrupt(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2 * len(list(source.rglob("*.jpg"))) + 10:  # after the forecast, in the deal
            raise KeyboardInterrupt
        return transcode(*arguments)

    with monkeypatch.context() as context:
        context.setattr(native, "transcode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_pack(source, tmp_path / "pack")
    with monkeypatch.context() as context:
        context.setattr(PIL, "__version__", "99.1")
        with pytest.raises(PackError, match=r"encoder: 'Pillow .*' before, 'Pillow 99\.1, .*' now"):
            make_pack(source, tmp_path / "pack")
    assert make_pack(source, tmp_path / "pack").num_samples == 40
    assert make_pack(source, tmp_path / "pack").was_complete
    monkeypatch.setattr(PIL, "__version__", "99.1")
    with pytest.raises(PackError, match=r"exists already(.|\n)*encoder: 'Pillow .*' before"):
        make_pack(source, tmp_path / "pack")


def test_room_is_needed_for_the_copies_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    image_bytes = sum(p.stat().st_size for p in source.rglob("*.jpg"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=image_bytes))
    with pytest.raises(PackError, match="not enough room"):
        make_pack(source, tmp_path / "lossless", settings=Settings(shard_bytes=60_000))
    settings = Settings(shard_bytes=60_000, shrink=Shrink(80))
    summary = make_pack(source, tmp_path / "small", settings=settings)
    assert summary.pack_bytes < image_bytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shrink(0), "max_side: expected 1 to 65500 pixels, got 0"),
        (lambda: Shrink(70_000), "max_side: expected 1 to 65500"),
        (lambda: Shrink(500, 0), "quality: expected 1 to 100, got 0"),
        (lambda: Shrink(500, 101), "quality: expected 1 to 100"),
        (lambda: Shrink(500, 90, "411"), "subsampling: expected one of .*got '411'"),  # type: ignore[arg-type]
        (lambda: Settings(keep_bytes=True, shrink=Shrink(500)), "keep_bytes and max_side"),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- verify --------------------------------------------------------------------------------------


def test_verify_makes_the_copies_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source, tmp_path / "source")
    make_pack(source, tmp_path / "pack")
    report = verify(tmp_path / "pack", tmp_path / "source", num_workers=2, progress=False)
    assert (report.problems, report.num_compared) == ((), 40)
    changed = next(n for n, f in flags(tmp_path / "pack").items() if f & pack_format.FLAG_SHRUNK)
    image = opened((tmp_path / "source" / changed).read_bytes())
    darker = Image.eval(image, lambda value: value * 3 // 4)
    (tmp_path / "source" / changed).write_bytes(jpeg_bytes(darker, quality=98))
    (problem,) = verify(tmp_path / "pack", tmp_path / "source", progress=False).problems
    assert changed in problem
    assert "pixels differ" in problem
    monkeypatch.setattr(PIL, "__version__", "99.1")
    with pytest.raises(ValueError, match=r"only by the same versions, and these are Pillow 99\.1"):
        verify(tmp_path / "pack", tmp_path / "source", progress=False)
    assert verify(tmp_path / "pack", progress=False).problems == ()


@pytest.mark.parametrize("changes", [{"max_side": "x"}, {"quality": None}, {"subsampling": []}])
def test_verify_believes_no_settings(
    source: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    make_pack(source, tmp_path / "pack")
    path = tmp_path / "pack" / "pack.json"
    about = json.loads(path.read_text())
    about["settings"].update(changes)
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="describe no smaller copies"):
        verify(tmp_path / "pack", source, progress=False)


def test_verify_counts_the_copies(source: Path, tmp_path: Path) -> None:
    make_pack(source, tmp_path / "pack")
    path = tmp_path / "pack" / "pack.json"
    about = json.loads(path.read_text())
    about["counts"]["shrunk"] = 1
    path.write_text(json.dumps(about))
    (problem,) = verify(tmp_path / "pack", progress=False).problems
    assert "'counts.shrunk' is 1, the tables give" in problem


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_says_first_what_it_will_do(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = str(tmp_path / "pack")
    # The forecast is made before the pack's tables are chosen: with the images' own it is exact.
    options = ["--max-side", "100", "--tables", "image"]
    assert cli.main(["pack", str(source), destination, *options]) == 0
    captured = capsys.readouterr()
    notice, _, progress = captured.err.partition("read and encode")
    assert progress
    assert "smaller copies, NOT lossless: longer side at most 100 px, quality 90, 4:2:0" in notice
    sides = [max(opened(path.read_bytes()).size) for path in source.rglob("*.jpg")]
    large = sum(side > 100 for side in sides)
    assert f"size, from 40 images: {large / 40:.0%} get fewer pixels" in notice
    rows = pack_format.read_pack(destination).rows
    assert (
        f"{np.mean(sides):.0f} -> {np.mean(np.maximum(rows['width'], rows['height'])):.0f} px"
        in (notice)
    )
    assert f"-> {rows['length'].mean() / 1e3:.1f} KB" in notice
    shard_bytes = sum(path.stat().st_size for path in (tmp_path / "pack").glob("*.tar")) - 1024
    assert f"KB of images become about {shard_bytes / 1e3:.1f} KB of shards" in notice
    assert "x the images/s where the disk is the limit" in notice
    assert "x the CPU time to decode a 100 px training crop" in notice
    shrunk = np.count_nonzero(rows["flags"] & pack_format.FLAG_SHRUNK)
    assert f"{shrunk} encoded anew, {40 - shrunk} re-coded losslessly, 0 stored" in captured.out
    assert cli.main(["info", "--verbose", destination]) == 0
    assert "max_side 100, quality 90, subsampling 420, encoder Pillow" in capsys.readouterr().out
    assert cli.main(["verify", destination, "--against", str(source)]) == 0


def test_nothing_is_said_without_progress_or_copies(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pack(source, tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""
    make_pack(source, tmp_path / "lossless", settings=Settings(), progress=True)
    assert "smaller copies" not in capsys.readouterr().err


def test_a_source_of_which_nothing_can_be_measured(
    photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    path = tmp_path / "source" / "a" / "1.png"
    path.write_bytes(encoded(photo, "PNG"))
    make_pack(tmp_path / "source", tmp_path / "png", progress=True)
    notice = capsys.readouterr().err
    assert "size, from 1 images: 100% get fewer pixels" in notice
    assert "CPU time" not in notice  # a lossless pack leaves decoding it to Pillow
    path.write_bytes(b"nothing")
    with pytest.raises(PackError, match="1 of 1 images cannot be packed"):
        make_pack(tmp_path / "source", tmp_path / "damaged", progress=True)
    assert "smaller copies" not in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--quality", "80"], ["--subsampling", "444"]])
def test_options_of_copies_need_a_side(
    source: Path, tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pack", str(source), str(tmp_path / "pack"), *option]) == 1
    assert f"{option[0]}: is for smaller copies only: add --max-side PX" in capsys.readouterr().err
    assert not (tmp_path / "pack.partial").exists()


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side_px", [128, 160, 176, 192, 224])
def test_the_loader_decodes_copies_as_pillow_does(
    photos: list[Path], tmp_path: Path, side_px: int
) -> None:
    for path in photos[::10]:
        (tmp_path / "source" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "source" / path.parent.name / path.name)
    settings = Settings(shrink=Shrink(side_px * 8 // 7))
    make_pack(tmp_path / "source", tmp_path / "pack", settings=settings)
    images = [opened(data).convert("RGB") for data in stored(tmp_path / "pack").values()]

    def pixels(*transform: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        composed = v2.Compose([*transform, v2.PILToTensor()])
        loader = Loader(tmp_path / "pack", None, composed, shuffle=False, num_workers=2)
        return torch.cat([batch.clone() for batch, _ in loader]), loader.stats()

    validation = [v2.Resize(side_px), v2.CenterCrop(side_px)]
    decoded, stats = pixels(*validation)
    reference = v2.Compose([*validation, v2.PILToTensor()])
    assert torch.equal(decoded, torch.stack([reference(image) for image in images]))
    assert stats["python_rows"] == 0

    decoded, _ = pixels(v2.RandomResizedCrop(side_px))
    recipe = Recipe(
        Geometry.RANDOM_RESIZED_CROP,
        side_px,
        side_px,
        scale_min=0.08,
        scale_max=1.0,
        ratio_min=3 / 4,
        ratio_max=4 / 3,
    )
    for sample, image in enumerate(images):
        view = native.draw(recipe, 0, 0, sample, *image.size)
        assert view is not None
        box = (view.top, view.left, view.height, view.width)
        crop = F.resized_crop(image, *box, [side_px, side_px])
        assert np.array_equal(decoded[sample].permute(1, 2, 0).numpy(), np.asarray(crop))
