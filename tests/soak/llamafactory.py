"""The real LLaMA-Factory reads an export of ours and trains a few steps on a CPU.

It must make the same tokens of it as we do, also of the pairs of `octomed export preferences`.

    python tests/soak/llamafactory.py
        in the environment of `octomed bench trainers`;
        writes outputs/reference/soak/llamafactory.json
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

# runs in LLaMA-Factory's environment: what its own functions make of every row
READ = """
import json
import sys

import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

args = yaml.safe_load(open("train.yaml"))
args.update(bf16=False, use_cpu=True)
model_args, data_args, training_args, *_ = get_train_args(args)
module = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
data = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)


def pixels_of(images):
    if not images:
        return {}
    inputs = template.mm_plugin.get_mm_inputs(
        images, [], [], [len(images)], [0], [0], [[]], module["processor"]
    )
    if not inputs:
        return {}
    pixels = inputs["pixel_values"]
    return {
        "grid": inputs["image_grid_thw"].tolist(),
        "sum": float(pixels.double().sum()),
        "shape": list(pixels.shape),
    }


rows = []
for row in data["train_dataset"]:
    ids = {"input_ids": row["input_ids"], "labels": row["labels"]}
    rows.append({**ids, **pixels_of(row["images"] or [])})
json.dump(rows, open(sys.argv[1], "w"))
"""


# the same for pairs: what it makes of the better and of the worse response
READ_PAIRS = """
import json
import sys

import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

args = yaml.safe_load(open("train.yaml"))
args.update(bf16=False, use_cpu=True, stage="rm", dataset_dir=sys.argv[1])
args.update(media_dir=sys.argv[1], output_dir="pairs", disable_shuffling=True)
model_args, data_args, training_args, *_ = get_train_args(args)
module = load_tokenizer(model_args)
template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
data = get_dataset(template, model_args, data_args, training_args, stage="rm", **module)
names = [f"{kind}_{what}" for kind in ("chosen", "rejected") for what in ("input_ids", "labels")]
rows = [
    {**{name: row[name] for name in names}, "images": len(row["images"] or [])}
    for row in data["train_dataset"]
]
json.dump(rows, open(sys.argv[2], "w"))
"""


def processor_of_arm(arm, common):
    "The processor with which the rows of an arm are rendered."
    from transformers import AutoProcessor

    from octomed.core.store import Stage, run_stage
    from octomed.evaluate.arms import declare_stages

    base = declare_stages(arm, common)["rendered"].params["base"]
    return AutoProcessor.from_pretrained(run_stage(base) if isinstance(base, Stage) else base)


def compare_rows(theirs: list[dict], arm, common) -> dict:
    "Their rows compared with ours: ids, labels, pixels."
    from octomed.generate.render import PixelCache, render_row
    from octomed.run.exports import collect_traces

    processor = processor_of_arm(arm, common)
    pixels = PixelCache(processor, common.max_pixels)
    newline = processor.tokenizer("\n")["input_ids"]
    kept = collect_traces(arm, common)[0]
    assert len(kept) == len(theirs), f"they have {len(theirs)} rows and we {len(kept)}"
    ours = [
        render_row(processor, trace.messages, trace.response, common.max_pixels) for trace in kept
    ]
    counts = {
        "rows": len(ours),
        "same_ids": 0,
        "same_but_a_line_break_after_the_end": 0,
        "same_mask": 0,
        "with_images": 0,
        "same_grid": 0,
        "largest_pixel_sum_difference": 0.0,
    }
    for our, their in zip(ours, theirs, strict=True):
        labels = [-100] * our.prompt + our.input_ids[our.prompt :]
        same_with_break = their["input_ids"] == our.input_ids + newline
        same_with_break = same_with_break and their["labels"] == labels + newline
        counts["same_ids"] += their["input_ids"] == our.input_ids
        counts["same_but_a_line_break_after_the_end"] += same_with_break
        counts["same_mask"] += their["labels"][: len(labels)] == labels
        if our.images:
            same_grid, difference = compare_images(their, [pixels(name) for name in our.images])
            counts["with_images"] += 1
            counts["same_grid"] += same_grid
            counts["largest_pixel_sum_difference"] = max(
                counts["largest_pixel_sum_difference"], difference
            )
    return {**counts, "first": describe_row(ours[0], theirs[0], processor.tokenizer)}


def compare_pairs(theirs: list[dict], arm, common) -> dict:
    "Their pairs compared with ours: the tokens and masks of both responses, the images."
    from octomed.generate.render import render_row
    from octomed.run.export_samples import collect_pairs

    processor = processor_of_arm(arm, common)
    newline = processor.tokenizer("\n")["input_ids"]
    pairs = collect_pairs(arm, common)[0]
    assert len(pairs) == len(theirs), f"they have {len(theirs)} pairs and we {len(pairs)}"
    counts = {"pairs": len(pairs), "same": 0, "with_images": 0, "same_images": 0}
    for pair, their in zip(pairs, theirs, strict=True):
        same = []
        for kind, trace in zip(("chosen", "rejected"), pair, strict=True):
            our = render_row(processor, trace.messages, trace.response, common.max_pixels)
            labels = [-100] * our.prompt + our.input_ids[our.prompt :]
            ends = [[], newline]
            same.append(
                (their[f"{kind}_input_ids"], their[f"{kind}_labels"])
                in [(our.input_ids + end, labels + end) for end in ends]
            )
        counts["same"] += all(same)
        counts["with_images"] += bool(our.images)
        counts["same_images"] += their["images"] == len(our.images)
    return counts


def compare_images(their: dict, images: list[tuple]) -> tuple[bool, float]:
    "(whether grid and shape of a row's images are the same, difference of the pixels' sums)."
    import torch

    patches, grids = torch.cat([p for p, _ in images]), torch.cat([grid for _, grid in images])
    same = their["grid"] == grids.tolist() and their["shape"] == list(patches.shape)
    total = float(sum(p.double().sum() for p, _ in images))
    return same, abs(their["sum"] - total)


def describe_row(our, their: dict, tokenizer) -> dict:
    "Lengths and last tokens of a row of ours and of theirs."
    return {
        "ours": len(our.input_ids),
        "theirs": len(their["input_ids"]),
        "trained_ours": len(our.input_ids) - our.prompt,
        "trained_theirs": sum(label != -100 for label in their["labels"]),
        "end_of_ours": tokenizer.convert_ids_to_tokens(our.input_ids[-3:]),
        "end_of_theirs": tokenizer.convert_ids_to_tokens(their["input_ids"][-3:]),
    }


def export(work: Path):
    "Export a small arm: (the arm, its common parameters, counts of its rows, the folder)."
    import octomed.clinic.questions  # registers the sources
    import octomed.clinic.students  # registers the students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers
    from octomed.core.recipe import Common
    from octomed.evaluate.arms import Arm, schedule_of
    from octomed.run.export_llamafactory import export_llamafactory

    common = Common(
        train=("clinic_ward:train", "clinic_rounds:train"),
        samples=2,
        answer="text",
        batch=4,
    )
    sources = (("clinic_ward:train", 8), ("clinic_rounds:train", 8))
    arm = Arm(sources, schedule=schedule_of(common, 1.0))
    out = work / "export"
    return arm, common, export_llamafactory(arm, common, out), out


def export_ranking(arm, common, out: Path):
    "Export pairs of an arm's samples: (the arm, its common parameters)."
    from dataclasses import replace

    from octomed.core.store import run_stage
    from octomed.evaluate.arms import declare_stages
    from octomed.run.export_samples import export_preferences

    arm, common = replace(arm, k=8), replace(common, samples=8)
    run_stage(declare_stages(arm, common)["accepted"])
    export_preferences(arm, common, out, form="llamafactory")
    return arm, common


def main():
    import yaml

    python = FACTORY.python()
    started, work = time.time(), Path(tempfile.mkdtemp(prefix="octomed-llamafactory-"))
    os.environ |= {"OCTOMED_OUTPUTS": str(work), "OCTOMED_STORE": str(work / "store")}
    from octomed.core.files import read_jsonl, write_json
    from octomed.core.identity import make_card
    from octomed.core.paths import root

    arm, common, counts, out = export(work)
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cache"),
    }

    def run_theirs(*words) -> int:
        command = [str(python), *words]
        done = subprocess.run(command, cwd=out, env=env, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-1500:], done.stderr[-3000:])
        return done.returncode

    read, compared = run_theirs("-c", READ, "rows.json"), {}
    if not read:
        compared = compare_rows(json.loads((out / "rows.json").read_text()), arm, common)
    pairs = export_ranking(arm, common, work / "pairs")
    ranked, compared_pairs = run_theirs("-c", READ_PAIRS, str(work / "pairs"), "pairs.json"), {}
    if not ranked:
        compared_pairs = compare_pairs(json.loads((out / "pairs.json").read_text()), *pairs)
    for_cpu = {  # what a CPU needs, and nothing else
        "bf16": False,
        "use_cpu": True,
        "max_steps": STEPS,
        "save_strategy": "no",
    }
    settings = yaml.safe_load((out / "train.yaml").read_text()) | for_cpu
    (out / "cpu.yaml").write_text(yaml.safe_dump(settings))
    trained = run_theirs("-m", "llamafactory.cli", "train", "cpu.yaml")
    log = read_jsonl(out / "saves" / "trainer_log.jsonl") if not trained else []
    losses = [record["loss"] for record in log if record.get("loss") is not None]
    succeeded = not read and not trained and len(losses) == STEPS
    good = succeeded and is_same(compared, rows=counts["kept"]) and not ranked
    good = good and 0 < compared_pairs["pairs"] == compared_pairs["same"]
    good = good and compared_pairs["pairs"] == compared_pairs["same_images"]
    write_json(
        root() / "outputs" / "reference" / "soak" / "llamafactory.json",
        {
            "pins": FACTORY.requirements,
            "counts": counts,
            "rc_read": read,
            "rc_train": trained,
            "losses": losses,
            "compared": compared,
            "rc_pairs": ranked,
            "pairs": compared_pairs,
            "good": good,
            "card": make_card(minutes=round((time.time() - started) / 60, 1)),
        },
    )
    shown = {"rc": [read, trained, ranked], "losses": losses, "pairs": compared_pairs}
    print(json.dumps({**shown, **compared}, indent=1))
    sys.exit(not good)


def is_same(compared: dict, rows: int) -> bool:
    "Whether all rows are the same, up to a line break after the end."
    same = compared["same_ids"] + compared["same_but_a_line_break_after_the_end"]
    return (
        compared["rows"] == rows == compared["same_mask"]
        and same == rows
        and compared["same_grid"] == compared["with_images"] > 0
        and compared["largest_pixel_sum_difference"] < 1e-2
    )


if __name__ == "__main__":
    main()
