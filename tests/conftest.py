"A store of its own for every test session, and a small student that many tests use."

import os
import signal
import tempfile

os.environ["OCTOMED_STORE"] = tempfile.mkdtemp(prefix="octomed-store-")
os.environ["OCTOMED_OUTPUTS"] = tempfile.mkdtemp(prefix="octomed-outputs-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A script's background process ignores Ctrl-C, and the commands under test must hear it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

WORDS = (
    "Please reason step - by - step , and put your final answer within \\boxed{ } . "
    "which is it ? one two three fever rash the option is user assistant : - ."
)


@pytest.fixture(scope="session")
def student():
    "(model, processor) of a tiny student that knows a few words."
    from octomed.clinic.students import Size, build_student

    size = Size(
        hidden=32,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate=64,
        vision_hidden=32,
        vision_layers=2,
    )
    return build_student([WORDS, WORDS.lower()], size, seed=0, max_pixels=12_544)


@pytest.fixture(scope="session")
def picture():
    "The pixel hash of a stored picture."
    from PIL import Image

    from octomed.data.images import store_image

    return store_image(Image.effect_noise((120, 100), 60).convert("RGB"), max_pixels=12_544)
