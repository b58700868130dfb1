"A store of its own for every test session, and a small student that several rooms test with."

import os
import signal
import tempfile

os.environ["OCTOMED_STORE"] = tempfile.mkdtemp(prefix="octomed-store-")
os.environ["OCTOMED_OUTPUTS"] = tempfile.mkdtemp(prefix="octomed-outputs-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # started in the background of a script: the commands that are tested must hear Ctrl-C

import pytest


@pytest.fixture(scope="session")
def student():
    "(model, processor) of a tiny student that knows a few words."
    from octomed.clinic.students import Size, build_student

    words = "Please reason step - by - step , and put your final answer within \\boxed{ } . which is it ? one two three fever rash the option is user assistant : - ."
    return build_student([words, words.lower()], Size(32, 2, 2, 1, 64, 32, 2), 0, 12_544)


@pytest.fixture(scope="session")
def picture():
    "The pixel hash of a stored picture."
    from PIL import Image

    from octomed.data.images import intake

    return intake(Image.effect_noise((120, 100), 60).convert("RGB"), max_pixels=12_544)
