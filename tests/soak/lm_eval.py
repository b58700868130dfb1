"""The real lm-evaluation-harness scores a small student on exported tasks as we do.

Decoding is greedy and the questions are the same.

    python tests/soak/lm_eval.py [FOLDER]
        FOLDER holds the harness's environment, or it is made there (.venv-lm-eval by default);
        writes outputs/reference/soak/lm_eval.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PINS = ("lm_eval[hf]==0.4.13", "torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0")
BENCHMARKS = ("clinic_ward:test", "clinic_rounds:test")  # text only; with images
LIMIT = 100  # questions of each
TOKENS = 24  # of an answer
# a student of two minutes answers with texts of options in this form: right ones, wrong ones, and
# some that were not offered
FORM = "direct"
STATUSES = ("correct", "wrong", "unparsed", "truncated")
HOME = Path(__file__).resolve().parents[2]


def environment(folder: Path) -> Path:
    "The Python of the harness's environment, which is made if it is not there."
    uv, python = str(Path(sys.executable).parent / "uv"), str(folder / "bin" / "python")
    install = [uv, "pip", "install", "--quiet", "--python", python]
    if not (folder / "ready").exists():
        venv = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)]
        subprocess.run(venv, check=True)
        subprocess.run([*install, *PINS], check=True)
        (folder / "ready").write_text("\n".join(PINS))
    # our parser, as the export asks for
    subprocess.run([*install, "--no-deps", "-e", str(HOME)], check=True)
    return folder / "bin" / "python"


def run_harness(python: Path, tasks: Path, task: str, results: str, student: Path) -> int:
    "Score a student on one task by the harness; its exit code."
    words = [
        "-m",
        "lm_eval",
        "--model",
        "hf-multimodal",
        "--model_args",
        f"pretrained={student},dtype=float32",
        "--include_path",
        ".",
        "--tasks",
        task,
        "--apply_chat_template",
        "--device",
        "cpu",
        "--batch_size",
        "16",
        "--output_path",
        results,
        "--log_samples",
    ]
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tasks.parent / "cache"),
    }
    command = [str(python), *words]
    done = subprocess.run(command, cwd=tasks, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-1500:], done.stderr[-4000:])
    return done.returncode


def status_of(row: dict) -> str:
    "Our word for what the harness found in an answer."
    for status in ("unparsed", "truncated"):
        if row[status]:
            return status
    return "correct" if row["accuracy"] else "wrong"


def count_statuses(by_question: dict) -> dict:
    return {status: list(by_question.values()).count(status) for status in STATUSES}


def compare_scores(benchmark: str, answers: list[dict], folder: Path, task: str) -> dict:
    "Our rows of answers compared with what the harness left in a folder."
    from octomed.core.files import read_jsonl

    ours = {row["question"]: row["statuses"][0] for row in answers}
    letters = [row["letters"][0] or "none" for row in answers]
    reported = json.loads(next(folder.rglob("results_*.json")).read_text())["results"][task]
    rows = read_jsonl(next(folder.rglob(f"samples_{task}_*.jsonl")))
    theirs = {row["doc"]["id"]: status_of(row) for row in rows}
    return {
        "benchmark": benchmark,
        "questions": len(ours),
        "letters": {letter: letters.count(letter) for letter in sorted(set(letters))},
        "ours": count_statuses(ours),
        "theirs": count_statuses(theirs),
        "accuracy_ours": sum(status == "correct" for status in ours.values()) / len(ours),
        "accuracy_theirs": reported["accuracy,none"],
        "same_verdict": sum(theirs.get(q) == status for q, status in ours.items()),
    }


def is_same(task: dict) -> bool:
    "Whether both score a benchmark alike, and it has right, wrong and different answers."
    return (
        task["same_verdict"] == task["questions"] == LIMIT
        and abs(task["accuracy_ours"] - task["accuracy_theirs"]) < 1e-9
        and 0 < task["accuracy_ours"] < 1
        and len(task["letters"]) > 1
    )


def main(folder: Path):
    import octomed.clinic.questions  # registers the sources
    import octomed.clinic.students  # registers the students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers

    started, work = time.time(), Path(tempfile.mkdtemp(prefix="octomed-lm-eval-"))
    os.environ |= {"OCTOMED_OUTPUTS": str(work), "OCTOMED_STORE": str(work / "store")}
    from octomed.core.files import read_jsonl, write_json
    from octomed.core.identity import make_card
    from octomed.core.paths import root
    from octomed.core.recipe import Common
    from octomed.core.store import run_stage
    from octomed.data.sources import identify_source
    from octomed.evaluate.arms import Arm, declare_stages, schedule_of
    from octomed.evaluate.evaluate import evaluation
    from octomed.generate.samples import Sampling
    from octomed.run.export_lm_eval import export_tasks, task_name

    python = environment(folder)
    common = Common(answer="text")
    schedule = schedule_of(common, 3.0)
    arm = Arm((("clinic_ward:train", 600),), form=FORM, k=0, schedule=schedule)
    student = declare_stages(arm, common)["student"]
    greedy = Sampling(0.0, 1.0, 1.0, max_tokens=TOKENS)
    tasks = work / "tasks"
    export_tasks(BENCHMARKS, common, tasks, form=FORM, limit=LIMIT, sampling=greedy)
    compared, codes = [], []
    for benchmark in BENCHMARKS:  # one run each: the harness does not mix text and image tasks
        task, results = task_name(benchmark, FORM), task_name(benchmark, "results")
        code = run_harness(python, tasks, task=task, results=results, student=run_stage(student))
        codes.append(code)
        if code:
            continue
        evaluated = evaluation(
            student=student,
            benchmark=benchmark,
            limit=LIMIT,
            form=FORM,
            seeds=1,
            sampling=greedy,
            max_pixels=common.max_pixels,
            data=identify_source(benchmark),
        )
        answers = read_jsonl(run_stage(evaluated) / "rows.jsonl")
        compared.append(compare_scores(benchmark, answers, folder=tasks / results, task=task))
    good = len(compared) == len(BENCHMARKS) and all(map(is_same, compared))
    write_json(
        root() / "outputs" / "reference" / "soak" / "lm_eval.json",
        {
            "pins": PINS,
            "rc": codes,
            "tasks": compared,
            "good": good,
            "card": make_card(minutes=round((time.time() - started) / 60, 1)),
        },
    )
    print(json.dumps(compared, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else HOME / ".venv-lm-eval").resolve())
