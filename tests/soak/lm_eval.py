"""The real lm-evaluation-harness scores a small student on exported tasks as we do: greedy, the same questions.

    python tests/soak/lm_eval.py [FOLDER]      makes .venv-lm-eval; writes outputs/reference/soak/lm_eval.json

FOLDER: where its environment is, or is made.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PINS = ("lm_eval[hf]==0.4.13", "torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0")
BENCHES, LIMIT, TOKENS = (
    ("clinic_ward:test", "clinic_rounds:test"),
    100,
    24,
)  # text only; with images
FORM = "direct"  # a student of two minutes names texts of options: right ones, wrong ones, and some that were not offered
HOME = Path(__file__).resolve().parents[2]


def environment(folder: Path) -> Path:  # its python
    uv = str(Path(sys.executable).parent / "uv")
    if not (folder / "ready").exists():
        subprocess.run(
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True
        )
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *PINS],
            check=True,
        )
        (folder / "ready").write_text("\n".join(PINS))
    subprocess.run(
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--python",
            str(folder / "bin" / "python"),
            "-e",
            str(HOME),
        ],
        check=True,
    )  # the parser, as the export says
    return folder / "bin" / "python"


def main(folder: Path):
    import octomed.clinic.questions  # noqa: F401 - registers the sources
    import octomed.clinic.students  # noqa: F401 - registers the students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers

    begun, work = time.time(), Path(tempfile.mkdtemp(prefix="octomed-lm-eval-"))
    os.environ |= {"OCTOMED_OUTPUTS": str(work), "OCTOMED_STORE": str(work / "store")}
    from octomed.core.files import read_jsonl, write_json
    from octomed.core.identity import card
    from octomed.core.paths import root
    from octomed.core.recipe import Common
    from octomed.core.store import run
    from octomed.data.sources import identity_of
    from octomed.evaluate.arms import Arm, schedule_of, stages
    from octomed.evaluate.evaluate import evaluation
    from octomed.generate.engines import Sampling
    from octomed.run.export_lm_eval import lm_eval, task_name

    python = environment(folder)
    common = Common(pretrain_tokens=60_000, answer="text")
    student, greedy = (
        stages(
            Arm((("clinic_ward:train", 600),), form=FORM, k=0, schedule=schedule_of(common, 3.0)),
            common,
        )["student"],
        Sampling(0.0, 1.0, 1.0, TOKENS),
    )
    lm_eval(BENCHES, common, out := work / "tasks", form=FORM, limit=LIMIT, sampling=greedy)
    found, codes = [], []
    for b in BENCHES:  # one run each: the harness does not mix tasks with images and without
        words = [
            "-m",
            "lm_eval",
            "--model",
            "hf-multimodal",
            "--model_args",
            f"pretrained={run(student)},dtype=float32",
            "--include_path",
            ".",
            "--tasks",
            task_name(b, FORM),
            "--apply_chat_template",
            "--device",
            "cpu",
            "--batch_size",
            "16",
            "--output_path",
            task_name(b, "results"),
            "--log_samples",
        ]
        p = subprocess.run(
            [str(python), *words],
            cwd=out,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(work / "cache"),
            },
            capture_output=True,
            text=True,
        )
        codes.append(p.returncode)
        if p.returncode:
            print(p.stdout[-1500:], p.stderr[-4000:])
            continue
        s = evaluation(
            student=student,
            benchmark=b,
            limit=LIMIT,
            form=FORM,
            seeds=1,
            sampling=greedy,
            max_pixels=common.max_pixels,
            data=identity_of(b),
        )
        answers = read_jsonl(run(s) / "rows.jsonl")
        ours, letters = (
            {r["question"]: r["statuses"][0] for r in answers},
            [r["letters"][0] or "none" for r in answers],
        )
        name = task_name(b, FORM)
        told = json.loads(
            next((out / task_name(b, "results")).rglob("results_*.json")).read_text()
        )["results"][name]
        rows = read_jsonl(next((out / task_name(b, "results")).rglob(f"samples_{name}_*.jsonl")))

        def status(r):
            return next(
                (s for s in ("unparsed", "truncated") if r[s]),
                "correct" if r["accuracy"] else "wrong",
            )

        theirs = {r["doc"]["id"]: status(r) for r in rows}

        def count(of):
            return {
                s: list(of.values()).count(s) for s in ("correct", "wrong", "unparsed", "truncated")
            }

        found.append(
            {
                "benchmark": b,
                "questions": len(ours),
                "letters": {l: letters.count(l) for l in sorted(set(letters))},
                "ours": count(ours),
                "theirs": count(theirs),
                "accuracy_ours": sum(s == "correct" for s in ours.values()) / len(ours),
                "accuracy_theirs": told["accuracy,none"],
                "same_verdict": sum(theirs.get(q) == s for q, s in ours.items()),
            }
        )
    good = len(found) == len(BENCHES) and all(
        f["same_verdict"] == f["questions"] == LIMIT
        and abs(f["accuracy_ours"] - f["accuracy_theirs"]) < 1e-9
        and 0 < f["accuracy_ours"] < 1
        and len(f["letters"]) > 1
        for f in found
    )
    write_json(
        root() / "outputs" / "reference" / "soak" / "lm_eval.json",
        {
            "pins": PINS,
            "rc": codes,
            "tasks": found,
            "good": good,
            "card": card(minutes=round((time.time() - begun) / 60, 1)),
        },
    )
    print(json.dumps(found, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else HOME / ".venv-lm-eval").resolve())
