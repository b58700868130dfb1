import io

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from PIL import Image

from octomed import images
from octomed.core import OctomedError
from octomed.images import (MAX_PIXELS, image_path, intake, intake_all, load_image, open_image, pixel_hash, smart_resize,
                            stored_size, visual_tokens)

NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), "uint8"))
sides = st.integers(1, 6000)

def encoded(img, kind="PNG", **kw):
    img.save(b := io.BytesIO(), kind, **kw)
    return b.getvalue()

@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path/"store"))

@pytest.mark.parametrize("given_,want", [((512, 512), (504, 504)), ((1024, 768), (588, 420)), ((70, 70), (56, 56)), ((42, 42), (56, 56)), ((28, 5600), (28, 5600))])
def test_smart_resize_golden(given_, want): assert smart_resize(*given_) == want

@settings(max_examples=150, deadline=None)
@given(st.integers(15, 6000), st.integers(15, 6000), st.sampled_from([12_544, 50_176, MAX_PIXELS, 1_003_520]))
def test_smart_resize_equals_transformers(h, w, limit):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs
    assume(max(h, w)/min(h, w) <= 200)
    assert smart_resize(h, w, max_pixels=limit) == theirs(h, w, max_pixels=limit)

@settings(max_examples=150, deadline=None)
@given(sides, sides)
def test_fault_20_any_size_fits_the_grid_or_is_refused(h, w):
    if max(h, w)/min(h, w) > 200:
        with pytest.raises(OctomedError, match="aspect ratio over 200"): smart_resize(h, w)
        return
    a, b = smart_resize(h, w)
    assert a % 28 == b % 28 == 0 and a*b >= 3136 and a*b <= MAX_PIXELS
    if max(h, w)/min(h, w) <= 100: assert smart_resize(a, b) == (a, b)
    assert visual_tokens(h, w) == a*b//784 <= 334

@settings(max_examples=100, deadline=None)
@given(sides, sides, st.sampled_from([12_544, 50_176]))
def test_stored_size_is_left_alone_by_the_preprocessor(h, w, limit):
    assume(max(h, w)/min(h, w) <= 100)
    a, b = stored_size(h, w, limit)
    assert smart_resize(a, b, max_pixels=limit) == (a, b)

def test_fault_20_a_strip_that_rounding_pushes_over_the_ratio_is_refused():
    assert smart_resize(42, 5075) == (28, 5628)
    with pytest.raises(OctomedError, match="aspect ratio"): intake(Image.new("RGB", (5075, 42)))

def test_fault_20_sides_under_the_factor(): assert smart_resize(1, 1) == (56, 56) and smart_resize(10, 1000) == (28, 1008)

def test_fault_18_every_dress_opens_as_rgb():
    rgba = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert open_image(encoded(rgba)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(NOISE.quantize(16))).mode == "RGB"
    red = open_image(encoded(Image.new("RGB", (8, 6), "red").convert("CMYK"), "JPEG", quality=95)).getpixel((2, 2))
    assert red[0] > 230 and red[1] < 40
    sixteen = Image.fromarray(np.array([[0, 65535], [32768, 256]], "uint16"))
    assert [open_image(encoded(sixteen, k)).getpixel(p)[0] for k in ("PNG", "TIFF") for p in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 255, 128, 1]*2
    film = encoded(Image.new("RGB", (8, 6), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])
    assert open_image(film).getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif(); exif[0x0112] = 6
    assert open_image(encoded(NOISE, "JPEG", exif=exif)).size == (60, 90)
    grey_alpha = Image.merge("LA", [Image.new("L", (3, 3), 7), Image.new("L", (3, 3), 255)])
    assert open_image(encoded(grey_alpha)).getpixel((0, 0)) == (7, 7, 7)

def test_fault_18_rotated_pil_image_and_stored_file_agree():
    exif = Image.Exif(); exif[0x0112] = 6
    data = encoded(NOISE, "PNG", exif=exif)
    assert pixel_hash(open_image(Image.open(io.BytesIO(data)))) == pixel_hash(open_image(data))

@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_fault_18_cut_files_give_one_sentence(kind):
    data = encoded(NOISE, kind)
    for cut in (len(data)//2, len(data)//3, 30, 9, 1):
        with pytest.raises(OctomedError, match="cut short|not an image"): open_image(data[:cut])

def test_fault_18_floating_point_is_refused_with_advice():
    with pytest.raises(OctomedError, match="window"): open_image(encoded(Image.fromarray(np.ones((4, 4), "float32")), "TIFF"))

def test_fault_18_zero_bytes_and_missing_file(tmp_path):
    (tmp_path/"nothing.png").touch()
    with pytest.raises(OctomedError, match="nothing.png is empty"): open_image(tmp_path/"nothing.png")
    with pytest.raises(OctomedError, match="no image gone.png"): open_image(tmp_path/"gone.png")

@pytest.mark.parametrize("side", [9_500, 20_000])
def test_fault_19_bomb_is_refused_even_if_pillows_limit_is_off(side, monkeypatch):
    bomb = encoded(Image.new("1", (side, side)))
    with pytest.raises(OctomedError, match="unpacks to more than"): open_image(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(OctomedError, match="unpacks to more than"): open_image(bomb)

def test_fault_19_the_limit_stays_on():
    open_image(encoded(NOISE))
    assert Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS <= images.LARGEST

def test_fault_21_same_pixels_other_encoding_and_transposed_shape():
    a, b = intake(encoded(NOISE)), intake(encoded(NOISE, "BMP"))
    assert a == b == pixel_hash(NOISE)
    bars = Image.new("RGB", (4, 9), "red")
    assert bars.tobytes() == Image.new("RGB", (9, 4), "red").tobytes() and pixel_hash(bars) != pixel_hash(Image.new("RGB", (9, 4), "red"))

def test_intake_is_idempotent_and_keyed_by_size():
    name = intake(NOISE, 12_544); path = image_path(name, 12_544)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert intake(NOISE, 12_544) == name and (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert intake(NOISE) == name and image_path(name) != path and path.parts[-3] == "qwen2_5_vl-12544"
    shown = load_image(name, 12_544)
    assert (shown.height, shown.width) == smart_resize(60, 90, max_pixels=12_544)

def test_load_image_says_what_is_missing():
    with pytest.raises(OctomedError, match="not at hand"): load_image("name:MM-0-a.jpeg")
    with pytest.raises(OctomedError, match="load its source again"): load_image("0"*32)
    with pytest.raises(OctomedError, match="no grid is known"): intake(NOISE, family="unknown")

def test_intake_all_keeps_order_and_remembers(tmp_path, monkeypatch):
    paths = []
    for i in range(6): paths.append(tmp_path/f"{i}.png"); NOISE.rotate(90*i, expand=True).save(paths[-1])
    (tmp_path/"bad.png").write_bytes(b"no image"); paths.insert(3, tmp_path/"bad.png"); paths.append(tmp_path/"gone.png")
    first = intake_all(paths, 12_544)
    assert isinstance(first[3], OctomedError) and isinstance(first[-1], OctomedError)
    assert [f for f in first if isinstance(f, str)] == [pixel_hash(NOISE.rotate(90*i, expand=True)) for i in range(6)]
    monkeypatch.setattr(images, "intake", lambda *a, **k: (_ for _ in ()).throw(OctomedError("asked again")))
    assert [str(f) for f in intake_all(paths[:3], 12_544)] == first[:3]
