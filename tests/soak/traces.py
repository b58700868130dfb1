"""How fast the trace browser is with 10,000 questions of 16 samples each.

A page that holds all of them, in Chromium, and the widget in JupyterLab: the first view, after the
page's address or the cell was given, and every filter, from its change to the next picture on the
screen. The responses have 2 to 4 KB.

    python tests/soak/traces.py [FOLDER]
        some ten minutes; writes outputs/reference/soak/traces.json
        FOLDER: of an earlier run of the same code, whose samples and page are taken again
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

from octomed.core.files import write_json
from octomed.core.identity import make_card
from octomed.core.paths import root
from octomed.core.store import run_stage
from octomed.data.questions import Question
from octomed.data.sources import Source, identify_source, register
from octomed.distill.pools import questions as questions_stage
from octomed.distill.sampling import samples as samples_stage
from octomed.generate.engines import find_teacher_revision, make_sample, register_teacher
from octomed.generate.samples import Sampling
from octomed.run.trace_index import open_samples
from octomed.run.trace_page import write_trace_page

QUESTIONS, SAMPLES = 10_000, 16
FIRST_VIEW, FILTER = 2.0, 0.2  # seconds that are allowed
ROUNDS = 5
FOLDER = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="octomed-traces-"))
TEXT = (
    "the patient has a history of fever cough and pain the most likely finding on this image is "
    "consistent with an acute process so one would consider further tests before any treatment"
)


def say(rng: random.Random, words: int) -> str:
    "A text of so many words."
    return " ".join(rng.choices(TEXT.split(), k=words))


class Writer:
    "A teacher who writes long thoughts; five of eight answers are right."

    model, name = "soak/writer@1", "soak"

    def generate(self, requests, sampling):
        for request in requests:
            rng = random.Random(request.question)
            for index in request.indices:
                answer = rng.choice("AAAAABCD")
                thought = say(rng, rng.randint(350, 750))
                text = f"<think>{thought}.</think>\n\n<answer>{answer}</answer>"
                columns = {"text": text, "finish": "stop", "tokens": len(text.split())}
                yield make_sample(self, request, index, sampling=sampling, **columns)


def make_questions(**_) -> list[Question]:
    "Questions of 60 words with four options."
    rng, made_up = random.Random(0), []
    for i in range(QUESTIONS):
        question = Question(
            stem=f"Case {i}: {say(rng, 60)}?",
            options=tuple(f"{say(rng, 3)} {letter}" for letter in "abcd"),
            answer="A",
            source="soak",
            split="train",
            category="text_only",
        )
        made_up.append(question)
    return made_up


def draw() -> Path:
    "The folder of a stage with all samples, in a store of its own."
    os.environ["OCTOMED_STORE"] = str(FOLDER / "store")
    register(Source("soak", "train", "text_only", role="train", make=make_questions, revision="1"))
    register_teacher("soak/writer", Writer, revision="1")
    pool = questions_stage(
        sources=(("soak:train", None, identify_source("soak:train")),),
        against=(),
        seed=0,
        max_pixels=12_544,
    )
    row = ("soak/writer", find_teacher_revision("soak/writer"), "r1")
    stage = samples_stage(
        questions=pool,
        teachers={"text": row, "image": row},
        n=SAMPLES,
        sampling=Sampling(max_tokens=1000),
        max_pixels=12_544,
    )
    return run_stage(stage)


# what a person waits for: a change, then the next picture on the screen
FILTERS = """async ([selector, value]) => {
    const input = document.querySelector(selector);
    const start = performance.now();
    input.value = value;
    const kind = input.tagName === "SELECT" ? "change" : "input";
    input.dispatchEvent(new Event(kind, {bubbles: true}));
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    return (performance.now() - start) / 1000;
}"""
CHANGES = {
    "status wrong": ("[id$=-status]", "1"),
    "any status": ("[id$=-status]", "-1"),
    "pass count of 12 and more": ("[id$=-pass-low]", "12"),
    "any pass count": ("[id$=-pass-low]", ""),
    "600 tokens and more": ("[id$=-length-low]", "600"),
    "any length": ("[id$=-length-low]", ""),
    "search for a number": ("[id$=-text]", "case 77"),
    "search for a word of every stem": ("[id$=-text]", "fever"),
    "no search": ("[id$=-text]", ""),
}


def time_filters(tab) -> dict[str, float]:
    "The longest of some rounds of each filter, in seconds."
    longest = dict.fromkeys(CHANGES, 0.0)
    for _ in range(ROUNDS):
        for name, change in CHANGES.items():
            longest[name] = max(longest[name], tab.evaluate(FILTERS, list(change)))
    return {name: round(seconds, 3) for name, seconds in longest.items()}


def time_steps(tab) -> float:
    "The longest of some steps to the next question, in seconds."
    tab.locator(".ot-list").press("Home")
    tab.wait_for_timeout(1000)  # until the first question is shown
    longest = 0.0
    for _ in range(20):
        number = int(re.sub(r"\D", "", tab.inner_text(".ot-panel h3")))
        start = time.time()
        tab.keyboard.press("ArrowRight")
        tab.wait_for_function(
            "title => document.querySelector('.ot-panel h3')?.innerText === title",
            arg=f"Question {number + 1:,}",
        )
        longest = max(longest, time.time() - start)
    return round(longest, 3)


def wait_for_index(tab):
    "Until every question is among those that can be filtered."
    tab.wait_for_function(
        "() => !document.querySelector('.ot-count').innerText.includes('Reading')", timeout=600_000
    )


def write_page(stage: Path) -> dict:
    "Write the page that holds every question, unless it is there."
    page, row, start = FOLDER / "all.html", {}, time.time()
    if not page.exists():
        write_trace_page(open_samples(stage), page, None)
        row["written_in_s"] = round(time.time() - start, 1)
    return {**row, "mebibytes": round(page.stat().st_size / 2**20, 1)}


def measure_page(chromium) -> dict:
    "The page in a browser, opened some times anew."
    page, row, views = FOLDER / "all.html", {}, []
    for _ in range(ROUNDS):
        tab = chromium.new_page(viewport={"width": 1300, "height": 900})
        start = time.time()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_selector(".ot-card", timeout=120_000)
        views.append(round(time.time() - start, 2))
        wait_for_index(tab)
        row["all_filters_after_s"] = round(time.time() - start, 2)
        if len(views) < ROUNDS:
            tab.close()
    row["first_view_s"] = views
    row["filters_s"] = time_filters(tab)
    row["next_question_s"] = time_steps(tab)
    tab.close()
    return row


@contextmanager
def lab():
    "The address of a JupyterLab in a folder of its own."
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--port=8931", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(FOLDER / "config")}
    with open(FOLDER / "lab.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=FOLDER, stdout=log, stderr=log, env=environment)
        try:
            yield "http://127.0.0.1:8931"
        finally:
            process.terminate()
            process.wait(30)


def write_notebook(stage: Path):
    "A notebook that browses a stage."
    first = nbformat.v4.new_code_cell("from octomed.run.traces import browse\n'ready'")
    second = nbformat.v4.new_code_cell(f"browse({str(stage)!r})")
    notebook = nbformat.v4.new_notebook(cells=[first, second])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "python3"}
    nbformat.write(notebook, FOLDER / "browse.ipynb")


def measure_widget(chromium, stage: Path) -> dict:
    "The widget in JupyterLab, with its kernel."
    write_notebook(stage)
    with lab() as address:
        tab = chromium.new_page(viewport={"width": 1500, "height": 1000})
        for _ in range(60):
            try:
                tab.goto(f"{address}/lab/tree/browse.ipynb", timeout=60_000)
                break
            except PlaywrightError:  # the server is not up yet
                time.sleep(1)
        cells = tab.locator(".jp-Notebook .jp-CodeCell")
        cells.first.locator(".cm-content").click(timeout=120_000)
        tab.get_by_text("| Idle").wait_for(timeout=120_000)  # before, the key is ignored
        tab.keyboard.press("Shift+Enter")
        tab.locator(".jp-OutputArea-output").first.wait_for(timeout=300_000)
        start = time.time()
        tab.keyboard.press("Shift+Enter")
        tab.wait_for_selector(".ot-card", timeout=120_000)
        row = {"first_view_s": [round(time.time() - start, 2)]}
        wait_for_index(tab)
        row["all_filters_after_s"] = round(time.time() - start, 2)
        row["filters_s"] = time_filters(tab)
        row["next_question_s"] = time_steps(tab)
        tab.screenshot(path=str(FOLDER / "lab.png"))
        tab.close()
    return row


def is_fast(row: dict) -> bool:
    "Whether a view keeps to what is allowed."
    return max(row["first_view_s"]) <= FIRST_VIEW and max(row["filters_s"].values()) <= FILTER


@contextmanager
def browser():
    "A browser without a window."
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    with sync_playwright() as p:
        launched = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


def main():
    started = time.time()
    stage = draw()
    written = write_page(stage)
    with browser() as chromium:
        rows = {"page": written | measure_page(chromium), "chromium": chromium.version}
    with browser() as chromium:
        rows["widget"] = measure_widget(chromium, stage)
    good = is_fast(rows["page"]) and is_fast(rows["widget"])
    card = make_card(minutes=round((time.time() - started) / 60, 1))
    counts = {"questions": QUESTIONS, "samples": QUESTIONS * SAMPLES}
    allowed = {"first_view_s": FIRST_VIEW, "filter_s": FILTER, "load": os.getloadavg()}
    write_json(
        root() / "outputs" / "reference" / "soak" / "traces.json",
        {**counts, "allowed": allowed, **rows, "good": good, "card": card},
    )
    print(json.dumps(rows, indent=1), FOLDER)
    sys.exit(not good)


if __name__ == "__main__":
    main()
