"""The library's pages: what the cells of its notebooks show, stored in the notebooks.

python tests/pages.py write [NOTEBOOK …]   runs notebooks and stores what their cells show
python tests/pages.py check [NOTEBOOK …]   runs notebooks and compares; a difference is a failure

A notebook is named as ROOM/NAME.ipynb under `nbs/`; by default all of the library are taken. A cell
tagged `varies` shows something that cannot be the same twice: its output is stored, not compared.
A cell that exports shows nothing.
Sections of the paper are not run here: they show the reference run of the course, which
`make reference` stores in them.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
ROOMS = ("core", "data", "generate", "distill", "train", "evaluate", "run", "clinic", "bench")
LARGEST = 1 << 20  # bytes of a notebook with its outputs


def all_notebooks() -> list[str]:
    "The library's notebooks, in import order."
    found = ["00_front_door.ipynb", "01_main.ipynb"]
    for room in ROOMS:
        found += [f"{room}/{path.name}" for path in sorted((NBS / room).glob("*.ipynb"))]
    return found


def as_text(part) -> str:
    return part if isinstance(part, str) else "".join(part)


def plain_output(output: dict) -> dict | None:
    "An output with what a reader sees, without what depends on the machine; None for the rest."
    kind = output["output_type"]
    if kind == "stream":
        if output["name"] == "stderr":
            return None
        return {"output_type": "stream", "name": "stdout", "text": as_text(output["text"])}
    if kind == "error":
        return None
    kept = ("text/plain", "text/html", "text/markdown", "image/png", "image/svg+xml")
    data = {k: as_text(v) for k, v in output["data"].items() if k in kept}
    if "text/html" in data:
        # pandas scopes its style sheet by a random name
        data["text/html"] = re.sub(r"<style.*?</style>\n?", "", data["text/html"], flags=re.S)
    if "image/png" in data or "image/svg+xml" in data:
        data["text/plain"] = "<Figure>"
    plain = {"output_type": kind, "metadata": {}, "data": data}
    if kind == "execute_result":
        plain["execution_count"] = None
    return plain


def shown_text(outputs: list[dict]) -> str:
    "The text that a cell shows: printed lines and values; a picture counts as its presence."
    parts = []
    for output in outputs:
        if output["output_type"] == "stream":
            parts.append(as_text(output["text"]))
        elif output["output_type"] in ("execute_result", "display_data"):
            parts.append(text_of(output["data"]))
    return "\n".join(parts).strip()


def text_of(data: dict) -> str:
    return as_text(data.get("text/plain") or data.get("text/markdown") or "<no text>")


def merge_streams(outputs: list[dict]) -> list[dict]:
    "Printed lines that follow each other as one output."
    merged: list[dict] = []
    for output in outputs:
        if merged and output["output_type"] == merged[-1]["output_type"] == "stream":
            merged[-1]["text"] += output["text"]
        else:
            merged.append(output)
    return merged


def run_notebook(name: str) -> tuple[dict, str | None]:
    "(cell id → outputs, the error if a cell failed) of a notebook, run from top to bottom."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    os.chdir((NBS / name).parent)
    sys.path.insert(0, str(ROOT))
    notebook = read_nb(NBS / name)
    notebook.cells = [cell for cell in notebook.cells if "eval: false" not in as_text(cell.source)]
    shell = CaptureShell(mpl_format="png")
    error = None
    try:
        shell.run_all(notebook, exc_stop=True)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or as_text(cell.source).startswith("#| export"):
            continue
        outputs = [plain_output(dict(output)) for output in cell.get("outputs", [])]
        shown[cell["id"]] = merge_streams([output for output in outputs if output])
    return shown, error


def read(name: str) -> dict:
    return json.loads((NBS / name).read_text(encoding="utf-8"))


def write(name: str, outputs: dict):
    "Store the outputs in a notebook."
    notebook = read(name)
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["execution_count"] = None
        shown = outputs.get(cell["id"], [])
        cell["outputs"] = [as_lines(output) for output in shown]
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if len(text.encode()) > LARGEST:
        raise SystemExit(f"{name} would be over 1 MB: show less, or smaller figures")
    (NBS / name).write_text(text, encoding="utf-8")


def as_lines(output: dict) -> dict:
    "An output with its texts as lists of lines, as notebooks are stored."
    if "text" in output:
        return {**output, "text": output["text"].splitlines(True)}
    data = {
        kind: text if kind == "image/png" else text.splitlines(True)
        for kind, text in output["data"].items()
    }
    return {**output, "data": data}


def differences(name: str, outputs: dict) -> list[str]:
    "Cells whose text is not what is stored, a paragraph each."
    found = []
    for cell in read(name)["cells"]:
        if cell["cell_type"] != "code" or "varies" in cell["metadata"].get("tags", []):
            continue
        stored = shown_text(cell.get("outputs", []))
        now = shown_text(outputs.get(cell["id"], []))
        if stored != now:
            found.append(
                f"{name} {cell['id']}\n  stored: {stored[:300]!r}\n  now:    {now[:300]!r}"
            )
    return found


def work(name: str, command: str) -> tuple[str, float, list[str]]:
    "(name, seconds, what is wrong) of a notebook, in a process of its own."
    start = time.time()
    outputs, error = run_notebook(name)
    if error:
        return name, time.time() - start, [f"{name} failed:\n{error}"]
    if command == "write":
        write(name, outputs)
        return name, time.time() - start, []
    return name, time.time() - start, differences(name, outputs)


def prepare(folder: str):
    "The environment of the runs: a store of their own, no real data, one thread each."
    os.environ.pop("OCTOMED_DATA", None)
    places = {"OCTOMED_STORE": f"{folder}/store", "OCTOMED_OUTPUTS": f"{folder}/outputs"}
    fixed = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "IN_TEST": "1"}
    os.environ.update(places | fixed | paths)


def main(command: str, names: list[str]) -> int:
    wrong = []
    with tempfile.TemporaryDirectory(prefix="octomed-pages-") as folder:
        prepare(folder)
        context = get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
            jobs = [pool.submit(work, name, command) for name in names]
            for job in jobs:
                name, seconds, problems = job.result()
                print(f"{'ok' if not problems else 'WRONG':6} {seconds:5.1f} s  {name}", flush=True)
                wrong += problems
    print("\n".join(wrong) or f"{len(names)} notebooks show what is stored")
    if wrong and command == "check":
        print("run `python tests/pages.py write` and look at what changed")
    return int(bool(wrong))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("command", choices=("write", "check"))
    arguments.add_argument("notebooks", nargs="*")
    given = arguments.parse_args()
    sys.exit(main(given.command, given.notebooks or all_notebooks()))
