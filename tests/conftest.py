"A store of its own for every test session, and a small student that many tests use."

import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ["OCTOMED_STORE"] = tempfile.mkdtemp(prefix="octomed-store-")
os.environ["OCTOMED_OUTPUTS"] = tempfile.mkdtemp(prefix="octomed-outputs-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `book`, which is not installed

# A script's background process ignores Ctrl-C, and the commands under test must hear it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest


@pytest.fixture(scope="session")
def student():
    "(model, processor) of a tiny student that knows a few words."
    from toys import WORDS, toy_size

    from octomed.clinic.students import build_student

    return build_student([WORDS, WORDS.lower()], toy_size(32), seed=0, max_pixels=12_544)


@pytest.fixture(scope="session")
def picture():
    "The pixel hash of a stored picture."
    from PIL import Image

    from octomed.data.images import store_image

    return store_image(Image.effect_noise((120, 100), 60).convert("RGB"), max_pixels=12_544)


@pytest.fixture
def fake(monkeypatch):
    "What a local server does. Its name in the environment is `FAKE`, and pauses are cut short."
    from misbehaving import KEY, serving

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("octomed.generate.engine_openai.PAUSE", 0.01)
    with serving() as (fake, url):
        monkeypatch.setenv("FAKE_BASE_URL", url)
        monkeypatch.setenv("FAKE_API_KEY", KEY)
        yield fake


@pytest.fixture
def own_places(tmp_path, monkeypatch):
    "A store and outputs of the test's own, which do not exist yet."
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("OCTOMED_OUTPUTS", str(tmp_path / "out"))
