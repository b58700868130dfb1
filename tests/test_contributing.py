"Every worked example of CONTRIBUTING.md runs."

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## (Add [^\n]+)\n.*?```python\n(.*?)```", TEXT, re.S | re.M))


def test_each_kind_of_addition_has_an_example():
    assert set(EXAMPLES) == {
        "Add a source",
        "Add an engine",
        "Add a template",
        "Add an arm",
        "Add a section",
    }


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_runs(title, tmp_path):
    places = {"OCTOMED_STORE": str(tmp_path / "store"), "OCTOMED_OUTPUTS": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[title]],
        cwd=tmp_path,
        env={**os.environ, **places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
