"""Every section in a real JupyterLab: opened by clicks, Run All Cells, and nothing fails.

A clone of the last commit, a store of its own, and Chromium without a window. The notebook is
opened in the file browser, `Run > Run All Cells` is chosen in the menu, and the table of contents
is opened beside it. What came out is read from the notebook that JupyterLab saved.

    python tests/soak/jupyterlab.py [FOLDER [SECTION ...]]
        half an hour or more for all sections, at the size of smoke, which is the notebooks' own;
        all of them together write outputs/reference/soak/jupyterlab.json
        FOLDER: where the clone, its store, the pictures and what was measured are kept, so the
        same command goes on after a stop. OCTOMED_DATA may name real datasets

With Debian's chromium, or Playwright's own: `playwright install chromium`.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from traces import browser

from octomed.core.files import write_json
from octomed.core.identity import make_card
from octomed.core.paths import root

FOLDER = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="octomed-lab-")).resolve()
CLONE = FOLDER / "clone"
SECTIONS = [path.stem for path in sorted((root() / "nbs" / "paper").glob("[0-9]*.ipynb"))]
LIMIT = 3600  # seconds of a section
WAIT = 300_000  # milliseconds that JupyterLab may take to show something
BAR = re.compile(r"\d+%\|")
TALL = 16_000  # pixels of a picture that shows a whole notebook
WIDGET = "application/vnd.jupyter.widget-view+json"
BROKEN = "Error displaying widget|Loading widget|model not found"
PLACES = (  # a reader has not set them
    "OCTOMED_OUTPUTS",
    "OCTOMED_STORE",
    "OCTOMED_NOTEBOOKS",
    "JUPYTER_CONFIG_DIR",
)


def make_clone():
    "A clone of the last commit, unless there is one."
    if not CLONE.exists():
        subprocess.run(["git", "clone", "--quiet", str(root()), str(CLONE)], check=True)


def find_free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def wait_for_server(address: str, process: subprocess.Popen):
    "Until the server answers."
    for _ in range(1200):
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"JupyterLab does not start: see {FOLDER / 'lab.log'}")


@contextmanager
def lab():
    "The address of a JupyterLab that was started in the clone, as README says."
    port = find_free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token="]
    environment = {name: text for name, text in os.environ.items() if name not in PLACES}
    environment |= {
        "JUPYTER_CONFIG_DIR": str(FOLDER / "config"),
        "PYTHONPATH": str(CLONE),  # the environment of another checkout may serve this one
        "OMP_NUM_THREADS": "1",
    }
    with open(FOLDER / "lab.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=CLONE, stdout=log, stderr=log, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for_server(address, process)
            yield address
        finally:
            process.terminate()
            process.wait(600)


def open_by_clicks(tab, section: str):
    "From the first page of JupyterLab to a notebook whose kernel is ready."
    for entry in ("nbs", "paper", f"{section}.ipynb"):
        tab.locator(".jp-DirListing-item", has_text=entry).filter(
            has=tab.get_by_text(entry, exact=True)
        ).dblclick(timeout=WAIT)
    tab.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=WAIT)
    tab.get_by_text("| Idle").wait_for(timeout=WAIT)


def choose(tab, menu: str, entry: str):
    "An entry of a menu."
    tab.locator(".lm-MenuBar-itemLabel", has_text=menu).first.click()
    tab.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def list_headings(tab) -> list[str]:
    "What the table of contents shows."
    tab.locator(".lm-TabBar-tab[data-id=table-of-contents]").click()
    tab.locator(".jp-tocItem-heading").first.wait_for(timeout=WAIT)
    return tab.locator(".jp-tocItem-heading").all_inner_texts()


def read_saved(section: str) -> list[dict]:
    "The code cells of a notebook as JupyterLab saved it; those without code are left out."
    path = CLONE / "nbs" / "paper" / f"{section}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"])]


def list_outputs(cells: list[dict], kind: str) -> list[dict]:
    "The outputs of a kind, of all cells."
    return [output for cell in cells for output in cell["outputs"] if output["output_type"] == kind]


def wait_until_run(tab, section: str) -> list[dict]:
    "The saved code cells once all of them have run, or one has failed. Raises after `LIMIT`."
    started, pictured = time.time(), False
    while time.time() - started < LIMIT:
        tab.wait_for_timeout(3000)
        bars = tab.locator(".jp-OutputArea-output", has_text=BAR)
        if not pictured and bars.count():
            bars.first.scroll_into_view_if_needed()
            tab.screenshot(path=str(FOLDER / f"{section}-bar.png"))
            pictured = True
        choose(tab, "File", "Save Notebook")
        tab.wait_for_timeout(500)
        try:
            cells = read_saved(section)
        except ValueError:  # it is being written
            continue
        if list_outputs(cells, "error"):
            return cells
        is_idle = tab.get_by_text("| Idle").count() > 0
        if is_idle and all(cell["execution_count"] for cell in cells):
            return cells
    raise SystemExit(f"{section} is not done after {LIMIT} s: see {FOLDER}")


def describe_outputs(cells: list[dict]) -> dict:
    "What the saved outputs say: failures, progress bars, widgets."
    errors = [
        f"{cell['id']}: {output['ename']}: {output['evalue'][:200]}"
        for cell in cells
        for output in list_outputs([cell], "error")
    ]
    streams = list_outputs(cells, "stream")
    red = ["".join(output["text"]) for output in streams if output["name"] == "stderr"]
    written = [BAR.findall("".join(output["text"])) for output in streams]
    shown = list_outputs(cells, "display_data") + list_outputs(cells, "execute_result")
    return {
        "cells": len(cells),
        "run": sum(cell["execution_count"] is not None for cell in cells),
        "errors": errors,
        "cells_with_a_bar": sum(map(bool, written)),
        "red_lines": sum(len(text.splitlines()) for text in red),
        "widgets": sum(WIDGET in output["data"] for output in shown),
        "figures": sum("image/png" in output["data"] for output in shown),
        "warnings": sum("Warning" in text for text in red),
    }


def picture(tab, section: str):
    "A picture of the first screen, and of the whole notebook."
    tab.screenshot(path=str(FOLDER / f"{section}.png"))
    size = tab.viewport_size
    tab.set_viewport_size({"width": size["width"], "height": TALL})
    tab.wait_for_timeout(3000)
    tab.screenshot(path=str(FOLDER / f"{section}-whole.png"))
    tab.set_viewport_size(size)


def measure(chromium, address: str, section: str) -> dict:
    "A section, run as a reader runs it."
    tab = chromium.new_page(viewport={"width": 1500, "height": 1000})
    failures = []
    tab.on("pageerror", lambda error: failures.append(str(error)[:200]))
    tab.goto(f"{address}/lab?reset", timeout=WAIT)
    start = time.time()
    open_by_clicks(tab, section)
    opened, start = time.time() - start, time.time()
    headings = list_headings(tab)
    tab.locator(".jp-Notebook").first.click(position={"x": 300, "y": 5})
    choose(tab, "Run", "Run All Cells")
    cells = wait_until_run(tab, section)
    row = {
        "open_s": round(opened, 1),
        "run_s": round(time.time() - start, 1),
        **describe_outputs(cells),
        "headings": len(headings),
        "broken_widgets": tab.get_by_text(re.compile(BROKEN)).count(),
        "page_errors": failures,
        "load": round(os.getloadavg()[0], 1),  # of the machine, other work beside it counted in
        "chromium": chromium.version,
    }
    picture(tab, section)
    choose(tab, "Kernel", "Shut Down Kernel")
    tab.wait_for_timeout(2000)
    tab.close()
    print(section, json.dumps(row), flush=True)
    return row


def list_strays() -> list[str]:
    "What the runs have left in the clone where git would see it, besides the notebooks' outputs."
    command = ["git", "status", "--porcelain"]
    lines = subprocess.run(command, cwd=CLONE, check=True, capture_output=True, text=True).stdout
    ran = {f" M nbs/paper/{section}.ipynb" for section in SECTIONS}
    return [line for line in lines.splitlines() if line not in ran]


def is_good(row: dict) -> bool:
    "Whether every cell ran, nothing failed, and the table of contents shows headings."
    broken = row["errors"] or row["broken_widgets"]  # what JupyterLab's own script raised is kept
    return not broken and row["run"] == row["cells"] and row["headings"] > 3


def measure_all(chosen: list[str]) -> dict[str, dict]:
    "The rows of the chosen sections; those that FOLDER holds already are not measured again."
    file = FOLDER / "rows.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [section for section in chosen if section not in rows]
    if missing:
        with lab() as address, browser() as chromium:
            for section in missing:
                rows[section] = measure(chromium, address, section)
                write_json(file, rows)
    return {section: rows[section] for section in chosen}


def write_result(rows: dict[str, dict], strays: list[str], good: bool):
    "What was measured of all sections, kept in the repository."
    minutes = sum(row["open_s"] + row["run_s"] for row in rows.values()) / 60
    result = {
        "recipe": "smoke",
        "datasets_at_hand": bool(os.environ.get("OCTOMED_DATA")),
        "sections": rows,
        "left_in_the_tree": strays,
        "good": good,
        "card": make_card(minutes=round(minutes, 1)),
    }
    write_json(root() / "outputs" / "reference" / "soak" / "jupyterlab.json", result)


def main():
    chosen = sys.argv[2:] or SECTIONS
    make_clone()
    rows = measure_all(chosen)
    strays = list_strays()
    good = all(map(is_good, rows.values())) and not strays
    if chosen == SECTIONS:
        write_result(rows, strays, good)
    print(f"left in the tree: {strays}; good: {good}; pictures are in {FOLDER}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
