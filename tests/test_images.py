"""Images are opened safely, resized by each family's rule, named and stored.

Training, inference and the model's own processor see the same picture."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from octomed.core.paths import OctomedError
from octomed.data import images
from octomed.data.images import (
    file_hash,
    file_hashes,
    hash_images,
    image_path,
    load_image,
    open_image,
    pixel_hash,
    resize_image,
    store_image,
    store_images,
)
from octomed.data.questions import Question
from octomed.data.resize import (
    FAMILIES,
    MAX_PIXELS,
    choose_tiling,
    count_visual_tokens,
    image_grid,
    processor_arguments,
    smart_resize,
    stored_size,
)
from octomed.data.twins import report_copies

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), "uint8"))
PHOTO = Image.fromarray(np.random.default_rng(2).integers(0, 256, (16, 24, 3), "uint8")).resize(
    (900, 600), Image.Resampling.BICUBIC
)
sides = st.integers(1, 6000)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Corrupt EXIF"),
    pytest.mark.filterwarnings("ignore:Image size"),
]


def encoded(img, kind="PNG", **kw):
    img.save(b := io.BytesIO(), kind, **kw)
    return b.getvalue()


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_,expected",
    [
        ((512, 512), (504, 504)),
        ((1024, 768), (588, 420)),
        ((70, 70), (56, 56)),
        ((42, 42), (56, 56)),
        ((28, 5600), (28, 5600)),
    ],
)
def test_smart_resize_golden(given_, expected):
    assert smart_resize(*given_) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.integers(16, 6000),
    st.integers(16, 6000),
    st.sampled_from([12_544, 50_176, MAX_PIXELS, 1_003_520]),
    st.sampled_from([28, 32]),
)
def test_smart_resize_equals_transformers(h, w, limit, factor):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

    assume(max(h, w) / min(h, w) <= 200 and min(h, w) > factor / 2)
    assert smart_resize(h, w, factor, max_pixels=limit) == theirs(h, w, factor, max_pixels=limit)


@settings(max_examples=150, deadline=None)
@given(sides, sides)
def test_fault_20_any_size_fits_the_grid_or_is_refused(h, w):
    if max(h, w) / min(h, w) > 200:
        with pytest.raises(OctomedError, match="aspect ratio over 200"):
            smart_resize(h, w)
        return
    a, b = smart_resize(h, w)
    assert a % 28 == b % 28 == 0 and a * b >= 3136 and a * b <= MAX_PIXELS
    if max(h, w) / min(h, w) <= 100:
        assert smart_resize(a, b) == (a, b) and count_visual_tokens(h, w) == a * b // 784 <= 334


@pytest.mark.parametrize("family", FAMILIES)
def test_fault_20_every_family_refuses_a_strip(family):
    with pytest.raises(OctomedError, match="aspect ratio over 200"):
        stored_size(10, 2001, family=family)


def test_fault_20_a_strip_that_rounding_pushes_over_the_ratio_is_refused():
    assert smart_resize(42, 5075) == (28, 5628)
    with pytest.raises(OctomedError, match="aspect ratio"):
        store_image(Image.new("RGB", (5075, 42)))


def test_fault_20_sides_under_the_factor():
    assert smart_resize(1, 1) == (56, 56) and smart_resize(10, 1000) == (28, 1008)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12))
def test_tiling_equals_transformers(h, w, most):
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    assert choose_tiling(h, w, most) == get_optimal_tiled_canvas((h, w), (448, 448), 1, most)[::-1]


@settings(max_examples=150, deadline=None)
@given(
    sides,
    sides,
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from([12_544, 50_176, MAX_PIXELS, 802_816, 2_408_448]),
)
def test_stored_size_is_within_the_limit_and_left_alone_by_the_familys_rule(h, w, family, limit):
    assume(max(h, w) / min(h, w) <= 100 and not (family == "internvl" and limit < 448**2))
    a, b = stored_size(h, w, limit, family)
    assert a * b <= limit and stored_size(a, b, limit, family) == (a, b)
    assert count_visual_tokens(a, b, limit, family) == count_visual_tokens(h, w, limit, family)


def test_what_no_family_or_tile_can_hold_is_said():
    with pytest.raises(OctomedError, match="no grid is known"):
        store_image(NOISE, family="unknown")
    with pytest.raises(OctomedError, match="at least 200704"):
        stored_size(100, 100, 12_544, "internvl")


# --- the models' own processors, built from their published configurations --------------------

CONFIGS = {
    "qwen2_vl": {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
    },
    "qwen2_5_vl": {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
    },
    "qwen3_vl": {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "internvl": {
        "size": {"height": 448, "width": 448},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
    },
    "internvl-112": {
        "size": {"height": 112, "width": 112},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
    },
}  # the clinic's, built small


def image_processor(family, backend="pil"):
    import transformers
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kinds = (
        (GotOcr2ImageProcessorPil, transformers.GotOcr2ImageProcessor)
        if family.startswith("internvl")
        else (Qwen2VLImageProcessorPil, transformers.Qwen2VLImageProcessor)
    )
    return kinds[backend != "pil"](**CONFIGS[family])


@pytest.fixture(scope="module")
def processors():
    "For each family its own whole processor."
    import transformers as tf

    from octomed.clinic.students import build_tokenizer

    tok = build_tokenizer(["which is it"])
    for name, token in (
        ("start_image", "<|vision_start|>"),
        ("end_image", "<|vision_end|>"),
        ("context_image", "<|image_pad|>"),
        ("video", "<|video_pad|>"),
    ):
        setattr(tok, f"{name}_token", token)
        setattr(tok, f"{name}_token_id", tok.convert_tokens_to_ids(token))
    kinds = {
        "qwen2_vl": (tf.Qwen2VLProcessor, tf.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor),
        "qwen3_vl": (tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
        "internvl": (tf.InternVLProcessor, tf.InternVLVideoProcessor),
    }
    built = {
        f: one(
            image_processor=image_processor(f, "torchvision"),
            tokenizer=tok,
            video_processor=video(),
        )
        for f, (one, video) in kinds.items()
    }
    return {
        **built,
        "internvl-112": tf.InternVLProcessor(
            image_processor("internvl-112", "torchvision"),
            tok,
            tf.InternVLVideoProcessor(),
            image_seq_length=16,
        ),
    }


LIMITS = (
    [(f, n) for f in FAMILIES for n in (MAX_PIXELS, 2_408_448)]
    + [(f, 12_544) for f in ("qwen2_5_vl", "qwen3_vl", "internvl-112")]
    + [("internvl-112", 75_264)]
)
SIZES = [(512, 512), (1024, 768), (333, 500), (40, 30), (90, 1300), (448, 900)]


@pytest.mark.parametrize("family, limit", LIMITS)
def test_visual_tokens_equal_the_models_own_processor(family, limit, processors):
    p = processors[family]
    for h, w in (
        SIZES if limit >= MAX_PIXELS else SIZES[:4]
    ):  # a long strip under a small limit: their rule once over it, ours until it is within
        img = PHOTO.resize((w, h))
        ids = p(
            text=[p.image_token],
            images=[img],
            return_tensors="pt",
            **processor_arguments(limit, family),
        )["input_ids"][0].tolist()
        assert ids.count(p.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == count_visual_tokens(
            h, w, limit, family
        ), (h, w)


def test_visual_tokens_at_the_papers_limit():
    most = {
        f: max(
            count_visual_tokens(32 * h, 28 * w, family=f)
            for h in range(1, 60)
            for w in range(1, 200)
            if max(32 * h, 28 * w) <= 100 * min(32 * h, 28 * w)
        )
        for f in ("qwen2_5_vl", "qwen3_vl", "internvl")
    }
    assert most == {"qwen2_5_vl": 334, "qwen3_vl": 256, "internvl": 256}


def processor_options(family, limit):
    return dict(
        processor_arguments(limit, family),
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("family, limit", LIMITS)
def test_stored_pixels_and_grid_equal_the_processors_on_the_original(family, limit):
    import torch

    p, q = image_processor(family), image_processor(family, "torchvision")
    for h, w in SIZES[:4]:
        img = PHOTO.resize((w, h))
        kept = resize_image(img, limit, family)
        ours, theirs, other = (
            p(images=[kept], **processor_options(family, limit)),
            p(images=[img], **processor_options(family, limit)),
            q(images=[kept], **processor_options(family, limit)),
        )
        grid = image_grid(kept.height, kept.width, family)
        if family.startswith("internvl"):
            tiles = grid[0] - (grid[0] > 1)
            assert theirs["num_patches"].tolist() == other["num_patches"].tolist() == [grid[0]]
            assert torch.equal(
                theirs["pixel_values"][:tiles], ours["pixel_values"][:tiles]
            ) and torch.equal(ours["pixel_values"][:tiles].byte(), other["pixel_values"][:tiles])
        else:
            assert (
                theirs["image_grid_thw"].tolist()
                == other["image_grid_thw"].tolist()
                == [list(grid)]
            )
            assert torch.equal(theirs["pixel_values"], ours["pixel_values"]) and torch.equal(
                ours["pixel_values"].byte(), other["pixel_values"]
            )


def test_training_inference_and_the_processor_on_the_original_see_the_same(student):
    import torch

    from octomed.generate.render import PixelCache, collate, encode_prompts

    _, processor = student
    limit, name = 12_544, store_image(PHOTO, 12_544)
    ids = processor.tokenizer(
        [processor.image_token * count_visual_tokens(PHOTO.height, PHOTO.width, limit)]
    )["input_ids"]
    trained = collate(processor, ids, [[name]], PixelCache(processor, limit))
    asked = encode_prompts(
        processor,
        [processor.image_token * count_visual_tokens(PHOTO.height, PHOTO.width, limit)],
        [[name]],
        limit,
    )
    assert (
        torch.equal(trained["pixel_values"], asked["pixel_values"])
        and torch.equal(trained["image_grid_thw"], asked["image_grid_thw"])
        and torch.equal(trained["input_ids"], asked["input_ids"])
    )
    theirs = image_processor("qwen2_5_vl")(
        images=[PHOTO], return_tensors="pt", **processor_arguments(limit)
    )
    assert torch.equal(theirs["image_grid_thw"], asked["image_grid_thw"]) and torch.allclose(
        theirs["pixel_values"], asked["pixel_values"], atol=1e-5
    )
    kept = load_image(name, limit)
    assert asked["image_grid_thw"][0].tolist() == list(image_grid(kept.height, kept.width))


def test_a_stored_picture_off_the_grid_is_refused():
    name = store_image(PHOTO)
    PHOTO.resize((500, 300)).save(image_path(name))
    with pytest.raises(OctomedError, match="500 × 300 pixels is off the grid of qwen2_5_vl"):
        load_image(name)


# --- opening safely ---------------------------------------------------------------------------


def test_fault_18_transparency_lies_on_white():
    half = Image.new("RGBA", (8, 6), (255, 0, 0, 128))
    half.putpixel((0, 0), (9, 9, 9, 0))
    for kind, more in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        shown = open_image(encoded(half, kind, **more))
        assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((3, 3)) == (
            255,
            127,
            127,
        )
    grey = Image.merge("LA", [Image.new("L", (3, 3), 7), Image.new("L", (3, 3), 255)])
    grey.putpixel((1, 1), (7, 0))
    assert open_image(encoded(grey)).getpixel((0, 0)) == (7, 7, 7) and open_image(
        encoded(grey)
    ).getpixel((1, 1)) == (255, 255, 255)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    keyed.putpixel((0, 0), (200, 0, 0))
    shown = open_image(encoded(keyed, transparency=(1, 2, 3)))
    assert shown.getpixel((0, 0)) == (200, 0, 0) and shown.getpixel((1, 1)) == (255, 255, 255)


def test_fault_18_palettes():
    few = NOISE.quantize(16)
    assert np.array_equal(open_image(encoded(few)), few.convert("RGB"))
    dots = Image.new("P", (4, 4), 1)
    dots.putpalette([0, 0, 255, 10, 20, 30])
    dots.putpixel((0, 0), 0)
    shown = open_image(encoded(dots, transparency=0))
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((1, 1)) == (10, 20, 30)
    assert open_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)


def test_fault_18_four_inks_plain_and_as_adobe_inverts_them():
    cmyk = (0, 200, 180, 25)  # a red
    ink = Image.new("CMYK", (16, 16), cmyk)
    expected = ink.convert("RGB").getpixel((0, 0))
    assert expected[0] > 200 and max(expected[1:]) < 80
    assert open_image(encoded(ink, "TIFF")).getpixel((2, 2)) == expected
    jpeg = encoded(ink, "JPEG", quality=100, subsampling=0)
    assert jpeg[jpeg.index(b"Adobe") + 11] == 0 and np.allclose(
        open_image(jpeg).getpixel((2, 2)), expected, atol=4
    )
    r, g, b = (
        255 - i for i in cmyk[:3]
    )  # Adobe's YCCK: luma and chroma of the inverted inks, black inverted beside them
    y, cb, cr = Image.new("RGB", (1, 1), (r, g, b)).convert("YCbCr").getpixel((0, 0))
    jpeg = bytearray(
        encoded(
            Image.new("CMYK", (16, 16), (y, cb, cr, cmyk[3])), "JPEG", quality=100, subsampling=0
        )
    )
    jpeg[jpeg.index(b"Adobe") + 11] = 2
    assert np.allclose(open_image(bytes(jpeg)).getpixel((2, 2)), expected, atol=6)


def deep_png(rows):
    "A PNG of 16 bits a channel in RGB, which Pillow reads and does not write."
    h, w, _ = rows.shape

    def part(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
        + part(b"IDAT", zlib.compress(b"".join(b"\0" + r.astype(">u2").tobytes() for r in rows)))
        + part(b"IEND", b"")
    )


def test_fault_18_sixteen_bits_keep_their_range():
    values = np.array([[0, 65535], [32768, 256]], "uint16")
    for data in (
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values), "TIFF"),
        encoded(Image.fromarray(values.astype("int32")), "TIFF"),
    ):
        assert [open_image(data).getpixel(p)[0] for p in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
            0,
            255,
            128,
            1,
        ]
    assert open_image(deep_png(np.full((3, 2, 3), (65535, 0, 2560)))).getpixel((1, 1)) == (
        255,
        0,
        10,
    )


RAMP = np.arange(4096, dtype="uint16").reshape(64, 64)


def tiff(data, bits, photometric=1, kind=1, samples=1, order="<"):
    "A TIFF file of 64 × 64 values. `kind` is 1 for unsigned, 2 for signed, 3 for fractions."
    entries = {
        256: (4, 64),
        257: (4, 64),
        258: (3, bits),
        259: (3, 1),
        262: (3, photometric),
        273: (4, 8 + 2 + 12 * 10 + 4),
        277: (3, samples),
        278: (4, 64),
        279: (4, len(data)),
        339: (3, kind),
    }
    parts = [b"II*\0" if order == "<" else b"MM\0*", struct.pack(order + "IH", 8, len(entries))]
    for tag, (size, value) in entries.items():
        packed = struct.pack(order + ("I" if size == 4 else "H"), value).ljust(4, b"\0")
        parts.append(struct.pack(order + "HHI", tag, size, 1) + packed)
    return b"".join([*parts, bytes(4), data])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_values_that_do_not_fill_sixteen_bits_are_shown_at_their_depth(bits):
    values = (RAMP << 4 >> (16 - bits)).astype("uint16")
    shown = (values >> (bits - 8)).astype("uint8")
    assert (shown.min(), shown.max()) == (0, 255)
    for data in (
        encoded(Image.fromarray(values)),
        encoded(Image.fromarray(values.astype("int32")), "TIFF"),
        tiff(values.astype("<u2").tobytes(), 16),
        tiff(values.astype(">u2").tobytes(), 16, order=">"),
        tiff(values.astype("<i4").tobytes(), 32, kind=2),
    ):
        assert np.array_equal(np.asarray(open_image(data))[..., 0], shown)


def test_the_depth_is_of_the_type_and_not_of_the_picture():
    dim = Image.fromarray(np.array([[0, 2000]], "uint16"))
    bright = Image.fromarray(np.array([[0, 4095]], "uint16"))
    assert open_image(dim).getpixel((1, 0))[0] == 2000 >> 4
    assert open_image(bright).getpixel((1, 0))[0] == 255


def test_white_may_be_zero_in_sixteen_bits_as_in_eight():
    shown = open_image(tiff(RAMP.astype("<u2").tobytes(), 16, photometric=0))
    eight = open_image(tiff((RAMP >> 4).astype("u1").tobytes(), 8, photometric=0))
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((63, 63)) == (0, 0, 0)
    assert np.array_equal(np.asarray(shown), np.asarray(eight))


@pytest.mark.parametrize("largest", [0, 1, 4, 63])
def test_a_picture_that_would_be_black_is_refused(largest):
    values = np.full((4, 4), largest, "uint16")
    with pytest.raises(OctomedError, match=f"no value over {largest} in its 16 bits"):
        open_image(encoded(Image.fromarray(values)), "m.png")


def test_colours_of_sixteen_bits_that_use_only_twelve_are_refused():
    ramp = np.repeat((RAMP % 4096)[..., None], 3, axis=2)
    with pytest.raises(OctomedError, match="fills only the lower of its 16 bits"):
        open_image(deep_png(ramp))
    assert open_image(deep_png(ramp * 16)).getextrema()[0] == (0, 255)


def test_signed_and_fractional_values_are_refused():
    signed = (RAMP.astype("int32") - 1024).astype("<i2").tobytes()
    for data in (
        tiff(signed, 16, kind=2),
        tiff((RAMP >> 4).astype("u1").tobytes(), 8, kind=2),
        tiff(RAMP.astype("<f4").tobytes(), 32, kind=3),
    ):
        with pytest.raises(OctomedError, match="a window of your choice"):
            open_image(data)


def test_a_picture_that_is_transparent_throughout_is_refused():
    clear = Image.new("RGBA", (8, 8), (200, 10, 10, 0))
    palette = Image.new("P", (8, 8), 0)
    for data in (encoded(clear), encoded(palette, transparency=0), clear, clear.convert("LA")):
        with pytest.raises(OctomedError, match="transparent throughout, so it would be white"):
            open_image(data, "t.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_a_film_that_begins_with_an_empty_frame_is_refused(kind):
    dark, shown = Image.new("RGB", NOISE.size), NOISE
    film = encoded(dark, kind, save_all=True, append_images=[dark, shown])
    with pytest.raises(OctomedError, match=r"the first of the \d frames of f is empty"):
        open_image(film, "f")
    shown_first = encoded(shown, kind, save_all=True, append_images=[dark])
    assert np.ptp(np.asarray(open_image(shown_first))) > 200


MODES = ("1", "L", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "PA")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_shows_the_picture(mode):
    steps = {"RGBa": ("RGBA",), "La": ("LA",), "PA": ("P",), "HSV": ("RGB",), "YCbCr": ("RGB",)}
    img = Image.fromarray((RAMP >> 4).astype("uint8"))
    for step in (*steps.get(mode, ()), mode):
        img = img.convert(step)
    shown = open_image(img)
    assert shown.mode == "RGB" and shown.getextrema() == ((0, 255),) * 3


NO_IMAGES = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:1": "a pointer of Git LFS",
    "<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing",
    "<?xml version='1.0'?>\n<svg/>": "an SVG drawing",
    "\ufeff<!DOCTYPE html><html>404</html>": "a web page",
    "\n<html><body>404</body></html>": "a web page",
    "\0" * 128 + "DICM\2\0": "a DICOM file",
    "\0\0\0\x18ftypheic\0\0\0\0": "a HEIC image",
    "%PDF-1.7\n": "a PDF document",
    "PK\3\4\x14": "an archive",
    '{"error": "not found"}': "JSON text",
}


@pytest.mark.parametrize("text", NO_IMAGES)
def test_a_file_that_is_no_image_is_called_what_it_is(text, tmp_path):
    (tmp_path / "x.jpg").write_text(text)
    with pytest.raises(OctomedError, match=r"^x\.jpg is " + NO_IMAGES[text]):
        open_image(tmp_path / "x.jpg")


def test_a_png_without_a_side_is_called_so():
    data = bytearray(encoded(NOISE))
    data[16:20] = bytes(4)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(OctomedError, match="w has no pixels, since one of its sides is 0"):
        open_image(bytes(data), "w")


def test_a_tag_that_cannot_be_read_turns_nothing(monkeypatch):
    from PIL import ImageOps

    def broken(*args, **options):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    assert np.array_equal(open_image(encoded(NOISE)), NOISE)


def test_what_shows_nothing_is_taken_in_with_a_warning():
    with pytest.warns(UserWarning, match="n is nearly black"):
        store_image(encoded(Image.new("RGB", (60, 60), (3, 9, 15))), name="n")
    with pytest.warns(UserWarning, match="all its pixels are alike"):
        store_image(encoded(Image.new("RGB", (60, 60), "red")))


@pytest.mark.parametrize(
    "values",
    [np.full((4, 4), -1, "int32"), np.full((4, 4), 70_000, "int32"), np.ones((4, 4), "float32")],
)
def test_fault_18_what_has_no_natural_window_is_refused_with_advice(values):
    with pytest.raises(OctomedError, match="a window of your choice"):
        open_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize(
    "kind, more", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_fault_18_of_a_film_the_first_frame_is_shown(kind, more):
    film = encoded(
        Image.new("RGB", (8, 6), "red"),
        kind,
        save_all=True,
        append_images=[Image.new("RGB", (8, 6), "blue")],
        **more,
    )
    assert Image.open(io.BytesIO(film)).n_frames == 2 and open_image(film).getpixel((0, 0)) == (
        255,
        0,
        0,
    )


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_fault_18_a_turned_camera_gives_an_upright_picture(turn, kind):
    exif = Image.Exif()
    exif[0x0112] = turn
    lying = Image.open(io.BytesIO(encoded(NOISE, kind))).convert("RGB")
    expected = lying.transpose(TURNS[turn]) if TURNS[turn] is not None else lying
    opened = open_image(encoded(NOISE, kind, exif=exif))
    assert opened.size == expected.size and np.array_equal(opened, expected)


def test_fault_18_rotated_pil_image_and_stored_file_agree():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(NOISE, "PNG", exif=exif)
    given_ = Image.open(io.BytesIO(data))
    assert pixel_hash(open_image(given_)) == pixel_hash(open_image(data)) and given_.size == (
        90,
        60,
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_fault_18_cut_files_give_one_sentence(kind):
    data = encoded(NOISE, kind)
    for cut in (len(data) // 2, len(data) // 3, 30, 9, 1):
        with pytest.raises(OctomedError, match=r"cut short|not an image"):
            open_image(data[:cut])


def test_fault_18_cut_files_are_refused_even_if_somebody_lets_pillow_fill_them(monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(OctomedError, match="cut short"):
        open_image(encoded(NOISE, "JPEG")[:1500])


def test_fault_18_zero_bytes_and_missing_file(tmp_path):
    (tmp_path / "nothing.png").touch()
    with pytest.raises(OctomedError, match=r"nothing\.png is empty"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(OctomedError, match="an image is empty"):
        open_image(b"")
    with pytest.raises(OctomedError, match=r"no image gone\.png"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(OctomedError, match="no image"):
        open_image(tmp_path)


def test_fault_18_postscript_is_never_run(monkeypatch):
    from PIL import EpsImagePlugin

    ran = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *a, **k: ran.append(1) or Image.new("RGB", (4, 4)).im
    )
    with pytest.raises(OctomedError, match="not an image"):
        open_image(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
        )
    assert not ran


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_fault_19_bomb_is_refused_even_if_pillows_limit_is_off(side, monkeypatch):
    bomb = encoded(Image.new("1", (side, side)))
    with pytest.raises(OctomedError, match="unpacks to more than"):
        open_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(OctomedError, match="unpacks to more than"):
        open_image(bomb)


@pytest.mark.filterwarnings("error")
def test_fault_19_a_warning_made_an_error_is_still_one_sentence():
    with pytest.raises(OctomedError, match="unpacks to more than"):
        open_image(encoded(Image.new("1", (9_500, 9_500))))


def test_fault_19_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as f:
        f.truncate(8 * images.LARGEST + 1)  # a hole: no disk is used
    with pytest.raises(OctomedError, match=r"huge\.png is larger"):
        open_image(tmp_path / "huge.png")


def test_fault_19_the_limit_stays_on():
    open_image(encoded(NOISE))
    assert Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS <= images.LARGEST


# --- names and intake -------------------------------------------------------------------------


def test_fault_21_same_pixels_other_encoding_and_transposed_shape():
    a, b = store_image(encoded(NOISE)), store_image(encoded(NOISE, "BMP"))
    assert a == b == pixel_hash(NOISE)
    bars = Image.new("RGB", (4, 9), "red")
    assert bars.tobytes() == Image.new("RGB", (9, 4), "red").tobytes() and pixel_hash(
        bars
    ) != pixel_hash(Image.new("RGB", (9, 4), "red"))


def test_names_and_stored_pixels_are_frozen():
    "Question ids rest on these."
    assert (
        pixel_hash(NOISE) == "e4d729bf4c719349614fb9542bf4fb5e"
        and pixel_hash(resize_image(NOISE, 12_544)) == "737fe400abdf798d126991252f993b21"
        and pixel_hash(resize_image(PHOTO)) == "5fdc30eaa41978a10c965158dc7f464e"
    )


def test_intake_is_idempotent_and_keyed_by_family_and_size():
    name = store_image(NOISE, 12_544)
    path = image_path(name, 12_544)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert (
        store_image(NOISE, 12_544) == name
        and (path.read_bytes(), path.stat().st_mtime_ns) == before
    )
    assert (
        store_image(NOISE) == store_image(NOISE, family="qwen3_vl") == name
        and path.parts[-3] == "qwen2_5_vl-12544"
    )
    assert {load_image(name, family=f).size for f in ("qwen2_5_vl", "qwen3_vl")} == {
        (84, 56),
        (320, 224),
    }


def test_load_image_says_what_is_missing():
    with pytest.raises(OctomedError, match="not at hand"):
        load_image("name:MM-0-a.jpeg")
    with pytest.raises(OctomedError, match="load its source again"):
        load_image("0" * 32)


@pytest.fixture
def files(tmp_path):
    """Six pictures, and a function that writes more.

    The last has the pixels of the first in another encoding."""
    folder = tmp_path / "files"
    folder.mkdir()

    def write(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    write.paths = [
        write(f"{i}.png", encoded(NOISE.rotate(7 * i, expand=True))) for i in range(5)
    ] + [write("again.bmp", encoded(NOISE, "BMP"))]
    return write


def test_intake_all_keeps_order_and_is_equal_for_any_number_of_workers(
    files, tmp_path, monkeypatch
):
    sources = [
        *files.paths,
        files("bad.png", b"no image"),
        tmp_path / "gone.png",
        encoded(NOISE),
        NOISE,
    ]
    names = {}
    for workers in (1, 3):
        monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / f"with-{workers}"))
        names[workers] = [str(n) for n in store_images(sources, 12_544, workers=workers)]
    assert names[1] == names[3] and names[1][:5] == [
        pixel_hash(NOISE.rotate(7 * i, expand=True)) for i in range(5)
    ]
    assert (
        names[1][5] == names[1][8] == names[1][9] == names[1][0]
        and "bad.png is not an image" in names[1][6]
        and "no image gone.png" in names[1][7]
    )
    made = [
        {
            p.relative_to(tmp_path / f"with-{n}"): p.read_bytes()
            for p in (tmp_path / f"with-{n}").rglob("*.png")
        }
        for n in (1, 3)
    ]
    assert made[0] == made[1] and len(made[0]) == 5


def test_a_file_is_known_by_its_content_and_not_decoded_twice(files, monkeypatch):
    first, opened = store_images(files.paths, 12_544), []
    real = images.open_image
    monkeypatch.setattr(images, "open_image", lambda *a, **k: opened.append(1) or real(*a, **k))
    moved = files("moved.png", files.paths[2].read_bytes())
    assert (
        store_images([*files.paths, moved], 12_544) == [*first, first[2]]
        and hash_images([moved])[0] == (file_hash(moved), first[2])
        and not opened
    )
    files("1.png", encoded(PHOTO))
    assert store_images(files.paths[1:2], 12_544) == [pixel_hash(PHOTO)] and len(opened) == 1
    image_path(first[0], 12_544).unlink()
    assert store_images(files.paths[:1], 12_544) == first[:1] and load_image(first[0], 12_544)


def test_a_damaged_index_costs_time_only(files):
    first = store_images(files.paths, 12_544)
    images._index_path().write_text("{")
    assert store_images(files.paths, 12_544) == first and len(
        json.loads(images._index_path().read_text())
    ) == len(files.paths)


def test_what_was_met_before_a_stop_is_remembered(files, monkeypatch):
    real = images.store_image

    def stop(data, *a, **k):
        if data == files.paths[3].read_bytes():
            raise KeyboardInterrupt
        return real(data, *a, **k)

    monkeypatch.setattr(images, "store_image", stop)
    with pytest.raises(KeyboardInterrupt):
        store_images(files.paths, 12_544, workers=1)
    known = json.loads(images._index_path().read_text())
    assert {file_hash(p) for p in files.paths[:3]} <= known.keys()


def test_fault_4_a_full_disk_stops_the_intake(files, monkeypatch):
    import errno

    def full(*a):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OctomedError, match="no space left"):
        store_images(files.paths, 12_544)


def test_fault_7_two_processes_share_the_index_and_the_pictures(files):
    paths = [files(f"p{i}.png", encoded(NOISE.rotate(3 * i))) for i in range(8)]
    code = (
        "import sys; from octomed.data import images\n"
        "who, *paths = sys.argv[1:]; sys.stdin.readline()\n"
        "for i in range(40): images._remember({f'{who}{i}': 'x'})\n"
        "for p in paths: images.store_images([p], 12_544, workers=1)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, who, *map(str, paths)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in "ab"
    ]
    for p in both:
        p.stdin.write("go\n")
        p.stdin.flush()
    for p in both:
        assert p.communicate(timeout=60)[1] is not None and p.returncode == 0
    index = json.loads(images._index_path().read_text())
    assert len(index) == 80 + len(paths) and all(
        load_image(index[file_hash(p)], 12_544) for p in paths
    )
    assert not [p for p in images._index_path().parent.rglob(".*") if p.is_file()]


@pytest.mark.parametrize("offered", [True, False])
def test_file_hashes_are_those_of_the_bytes_with_and_without_reading_ahead(
    tmp_path, monkeypatch, offered
):
    if not offered:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    data = [os.urandom(n) for n in (0, 1, 20_000, (1 << 20) - 1, 1 << 20, (3 << 20) + 7)] * 3
    paths = [tmp_path / str(n) for n in range(len(data))]
    for p, d in zip(paths, data, strict=False):
        p.write_bytes(d)
    for workers in (1, 2):
        assert file_hashes(paths, workers) == [blake3(d).hexdigest() for d in data]
    with pytest.raises(FileNotFoundError):
        file_hashes([*paths, tmp_path / "gone"])


@pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="this system takes no advice about files"
)
def test_files_are_read_ahead_of_their_turn_and_no_further(tmp_path, monkeypatch):
    paths, events = [tmp_path / str(n) for n in range(30)], []
    for p in paths:
        p.write_bytes(b"x")
    monkeypatch.setattr(images, "read_ahead", lambda p: events.append(("ahead", int(p.name))))
    monkeypatch.setattr(images, "file_hash", lambda p: events.append(("hash", int(p.name))))
    file_hashes(paths, 1)
    parts = [range(n, min(n + images.AHEAD, 30)) for n in range(0, 30, images.AHEAD)]
    assert events == [(what, n) for part in parts for what in ("ahead", "hash") for n in part]


# --- the report -------------------------------------------------------------------------------


def test_fault_21_report_names_copies_conflicts_and_twins(files):
    a, b, c, d, _, again = files.paths
    copy = files("copy.png", a.read_bytes())
    train = [
        (a, "x"),
        (copy, "x"),
        (again, "y"),
        (b, "x"),
        (c, "x"),
        (files("bad.png", b"?"), "x"),
        (d, "x"),
    ]
    bench = [
        (files("t1.png", b.read_bytes()), "x"),
        (files("t2.tif", encoded(Image.open(c), "TIFF")), "y"),
    ]
    r = report_copies(train, bench)
    assert (
        r.byte_copies == [(0, 1)]
        and r.pixel_copies == r.conflicts == [(0, 1, 2)]
        and list(r.unreadable) == [5]
    )
    assert (
        r.byte_twins == ((3,), (0,))
        and r.pixel_twins == ((3, 4), (0, 1))
        and r.contradicted == (4,)
    )
    assert r.counts() == {
        "rows": 7,
        "unreadable": 1,
        "byte_groups": 1,
        "byte_extra": 1,
        "pixel_groups": 1,
        "pixel_extra": 2,
        "conflicts": 1,
        "conflict_rows": 3,
        "against": 2,
        "byte_twins": (1, 1),
        "pixel_twins": (2, 2),
        "contradicted": 1,
    }
    kept, dropped = r.split(train)
    assert kept == [train[6]] and [why for _, why in dropped] == [
        "same pixels under another label"
    ] * 3 + ["same pixels as a benchmark image"] * 2 + ["image cannot be read"]
    assert [row for row, _ in r.split(train, by="bytes")[0]] == [c, d]


def test_fault_25_report_conserves_rows(files):
    r = report_copies(files.paths)
    kept, dropped = r.split(files.paths)
    assert len(kept) + len(dropped) == r.rows == 6 and dropped == [
        (files.paths[5], "same pixels as row 0")
    ]
    with pytest.raises(OctomedError, match="6 rows and 5 were given"):
        r.split(files.paths[:5])
    with pytest.raises(OctomedError, match="no key names"):
        r.split(files.paths, by="names")
    assert report_copies([]).counts()["rows"] == 0


def test_report_distinguishes_another_question_from_another_label():
    def ask(stem, answer, *pics):
        return Question(stem, ("yes", "no"), answer, "s", "train", "multimodal_reasoning", pics)

    r = report_copies(
        [
            ask("is it?", "A", "p1"),
            ask("is it?", "B", "p1"),
            ask("was it?", "B", "p1"),
            ask("is it?", "A", "p2", "p3"),
            ask("is it?", "A", "name:f.png"),
        ],
        [ask("what?", "A", "p3")],
    )
    assert (
        r.pixel_copies == [(0, 1, 2)]
        and r.conflicts == [(0, 1)]
        and r.byte_copies == []
        and r.pixel_twins == ((3,), (0,))
    )
    assert r.unreadable == {4: "image is not at hand"} and r.contradicted == ()


DATA = os.environ.get("OCTOMED_DATA")


@pytest.mark.skipif(
    not DATA or not (Path(DATA) / "brain_tumor").is_dir(),
    reason="the Brain Tumor MRI files are not at hand: point OCTOMED_DATA at them",
)
def test_report_on_the_real_mri():
    train, test = (
        [(p, p.parent.name) for p in sorted((Path(DATA) / "brain_tumor" / f).glob("*/*.jpg"))]
        for f in ("Training", "Testing")
    )
    r = report_copies(train, test)
    assert r.counts() == {
        "rows": 2_870,
        "unreadable": 0,
        "byte_groups": 73,
        "byte_extra": 93,
        "pixel_groups": 75,
        "pixel_extra": 101,
        "conflicts": 0,
        "conflict_rows": 0,
        "against": 394,
        "byte_twins": (83, 88),
        "pixel_twins": (244, 251),
        "contradicted": 0,
    }
    assert [len(r.split(train, by)[0]) for by in ("bytes", "pixels")] == [2_713, 2_556]
