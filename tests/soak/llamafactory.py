"""The real LLaMA-Factory reads an export of ours, tokenises it as we do, and trains a few steps on a CPU.

python tests/soak/llamafactory.py      in the environment of `octomed bench trainers`; writes outputs/reference/soak/llamafactory.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from octomed.bench.trainers import TRAINERS

FACTORY = next(t for t in TRAINERS if t.name == "LLaMA-Factory")
STEPS = 3

# runs in LLaMA-Factory's environment: what it makes of every row, by its own functions
READ = """
import json, sys, yaml
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
args = yaml.safe_load(open("train.yaml")); args.update(bf16=False, use_cpu=True)
model_args, data_args, training_args, *_ = get_train_args(args)
module = load_tokenizer(model_args); template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
def grid(images):
    got = template.mm_plugin.get_mm_inputs(images, [], [], [len(images)], [0], [0], [[]], module["processor"]) if images else {}
    return {} if not got else {"grid": got["image_grid_thw"].tolist(), "sum": float(got["pixel_values"].double().sum()), "shape": list(got["pixel_values"].shape)}
json.dump([{"input_ids": r["input_ids"], "labels": r["labels"], **grid(r["images"] or [])} for r in rows], open(sys.argv[1], "w"))
"""


def compared(theirs: list[dict], arm, common) -> dict:
    "Their rows beside ours: ids, labels, pixels."
    import torch
    from transformers import AutoProcessor

    from octomed.evaluate.arms import stages
    from octomed.generate.render import Pixels, row
    from octomed.run.exports import _base, traces

    processor = AutoProcessor.from_pretrained(_base(stages(arm, common)["rendered"]))
    pixels, found = (
        Pixels(processor, common.max_pixels),
        {
            "rows": 0,
            "same_ids": 0,
            "same_but_a_line_break_after_the_end": 0,
            "same_mask": 0,
            "with_images": 0,
            "same_grid": 0,
            "largest_pixel_sum_difference": 0.0,
        },
    )
    newline = processor.tokenizer("\n")["input_ids"]
    kept = traces(arm, common)[0]
    assert len(kept) == len(theirs), f"they have {len(theirs)} rows and we {len(kept)}"
    for x, t in zip(kept, theirs, strict=False):
        ours = row(processor, x.messages, x.response, common.max_pixels)
        labels = [-100] * ours.prompt + ours.input_ids[ours.prompt :]
        found["rows"] += 1
        found["same_ids"] += t["input_ids"] == ours.input_ids
        found["same_but_a_line_break_after_the_end"] += (
            t["input_ids"] == ours.input_ids + newline and t["labels"] == labels + newline
        )
        found["same_mask"] += t["labels"][: len(labels)] == labels
        if ours.images:
            got = [pixels(h) for h in ours.images]
            found["with_images"] += 1
            found["same_grid"] += t["grid"] == torch.cat([g for _, g in got]).tolist() and t[
                "shape"
            ] == list(torch.cat([p for p, _ in got]).shape)
            found["largest_pixel_sum_difference"] = max(
                found["largest_pixel_sum_difference"],
                abs(t["sum"] - float(sum(p.double().sum() for p, _ in got))),
            )
    x, t = kept[0], theirs[0]
    ours = row(processor, x.messages, x.response, common.max_pixels)
    return {
        **found,
        "first": {
            "ours": len(ours.input_ids),
            "theirs": len(t["input_ids"]),
            "trained_ours": len(ours.input_ids) - ours.prompt,
            "trained_theirs": sum(l != -100 for l in t["labels"]),
            "end_of_ours": processor.tokenizer.convert_ids_to_tokens(ours.input_ids[-3:]),
            "end_of_theirs": processor.tokenizer.convert_ids_to_tokens(t["input_ids"][-3:]),
        },
    }


def main():
    import yaml

    import octomed.clinic.questions  # noqa: F401 - registers the sources
    import octomed.clinic.students  # noqa: F401 - registers the students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers

    python = FACTORY.python()
    begun, work = time.time(), Path(tempfile.mkdtemp(prefix="octomed-llamafactory-"))
    os.environ |= {"OCTOMED_OUTPUTS": str(work), "OCTOMED_STORE": str(work / "store")}
    from octomed.core.files import write_json
    from octomed.core.identity import card
    from octomed.core.paths import root
    from octomed.core.recipe import Common
    from octomed.evaluate.arms import Arm, schedule_of
    from octomed.run.export_llamafactory import llamafactory

    common = Common(
        train=("clinic_ward:train", "clinic_rounds:train"),
        samples=2,
        pretrain_tokens=2000,
        answer="text",
        batch=4,
    )
    arm = Arm(
        (("clinic_ward:train", 8), ("clinic_rounds:train", 8)), schedule=schedule_of(common, 1.0)
    )
    counts = llamafactory(arm, common, out := work / "export")
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cache"),
    }

    def theirs(*words):
        p = subprocess.run([str(python), *words], cwd=out, env=env, capture_output=True, text=True)
        if p.returncode:
            print(p.stdout[-1500:], p.stderr[-3000:])
        return p.returncode

    read = theirs("-c", READ, "rows.json")
    found = compared(json.loads((out / "rows.json").read_text()), arm, common) if not read else {}
    args = yaml.safe_load((out / "train.yaml").read_text()) | {
        "bf16": False,
        "use_cpu": True,
        "max_steps": STEPS,
        "save_strategy": "no",
    }  # what a CPU needs, and nothing else
    (out / "cpu.yaml").write_text(yaml.safe_dump(args))
    trained = theirs("-m", "llamafactory.cli", "train", "cpu.yaml")
    log = (
        [json.loads(l) for l in (out / "saves" / "trainer_log.jsonl").read_text().splitlines()]
        if not trained
        else []
    )
    losses = [l["loss"] for l in log if l.get("loss") is not None]
    n = counts["kept"]
    good = (
        not read
        and not trained
        and len(losses) == STEPS
        and found["rows"] == n == found["same_mask"]
        and found["same_ids"] + found["same_but_a_line_break_after_the_end"] == n
        and found["same_grid"] == found["with_images"] > 0
        and found["largest_pixel_sum_difference"] < 1e-2
    )
    write_json(
        root() / "outputs" / "reference" / "soak" / "llamafactory.json",
        {
            "pins": FACTORY.requirements,
            "counts": counts,
            "rc_read": read,
            "rc_train": trained,
            "losses": losses,
            "compared": found,
            "good": good,
            "card": card(minutes=round((time.time() - begun) / 60, 1)),
        },
    )
    print(json.dumps({"rc": [read, trained], "losses": losses, **found}, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    main()
