"""Where lines and bars are shown: in a notebook that a person looks at, and in one that is run."""

import nbclient
import nbformat
import pytest

from octomed.core.files import FRONT_ENDS

CELL = """from octomed.core.files import progress, tell
tell("made in 1 s")
sum(progress([1, 2, 3], desc="adding"))"""


@pytest.mark.parametrize(
    ("variable", "stream"),
    [("JPY_SESSION_NAME", "stdout"), ("VSCODE_PID", "stdout"), (None, "stderr")],
)
def test_a_bar_is_text_and_red_only_in_a_log(monkeypatch, variable, stream):
    for name in FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    *bars, value = notebook.cells[0].outputs
    assert value.data == {"text/plain": "6"}
    assert {bar.name for bar in bars} == {stream}
    text = "".join(bar.text for bar in bars)
    assert "made in 1 s\n" in text and "adding: 100%" in text
