"""What other tools read.

LLaMA-Factory's files, a data set for the hub, tasks of lm-evaluation-harness, and
accelerate's configurations."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import octomed.clinic.questions
import octomed.clinic.teachers  # noqa: F401 - the two imports register sources and teachers
from octomed.clinic.students import blank
from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError, root
from octomed.core.recipe import Common
from octomed.core.store import run_stage
from octomed.data.questions import Question
from octomed.data.sources import load
from octomed.distill.pools import take_subset
from octomed.evaluate.arms import Arm, declare_stages, schedule_of
from octomed.generate.answers import judge
from octomed.generate.prompts import load_template
from octomed.generate.render import load_rows, render_row
from octomed.generate.samples import Sampling
from octomed.run import export_llamafactory as factory_module
from octomed.run import exports as exports_module
from octomed.run.export_hub import check_push, export_dataset, export_student, hub_row
from octomed.run.export_llamafactory import export_llamafactory, factory_settings, frozen_parts
from octomed.run.export_lm_eval import export_tasks, task_name, task_row
from octomed.run.export_samples import (
    collect_pairs,
    export_preferences,
    export_samples,
    find_drawn,
    judge_drawn,
    trl_row,
)
from octomed.run.exports import collect_traces
from octomed.train.students import load_student, register_student

BENCHES = (
    "clinic_ward:test",
    "clinic_rounds:test",
)  # small pools, to be quick: they are taught here too
COMMON = Common(student="tests/blank", samples=2, answer="text", batch=8)
ARM = Arm(((BENCHES[0], 4), (BENCHES[1], 4)), k=2, schedule=schedule_of(COMMON, 2.0))
register_student(
    "tests/blank",
    lambda common: blank(
        size="tiny", texts=["which of these is it ?"], seed=0, max_pixels=common.max_pixels
    ),
)


@pytest.fixture(scope="module")
def processor():
    return load_student(run_stage(declare_stages(ARM, COMMON)["student"].params["base"]))[1]


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    out = tmp_path_factory.mktemp("x") / "factory"
    return out, export_llamafactory(ARM, COMMON, out)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    out = tmp_path_factory.mktemp("x") / "tasks"
    return out, export_tasks(BENCHES, COMMON, out, limit=5)


def test_traces_are_the_rows_that_the_student_reads(processor):
    rendered = load_rows(run_stage(declare_stages(ARM, COMMON)["rendered"]))
    assert [
        render_row(processor, x.messages, x.response, COMMON.max_pixels)
        for x in collect_traces(ARM, COMMON)[0]
    ] == [replace(r, question="") for r in rendered]


def test_fault_31_over_long_traces_are_dropped_whole_before_others_cut_them(processor):
    sizes = sorted(
        len(r.input_ids) for r in load_rows(run_stage(declare_stages(ARM, COMMON)["rendered"]))
    )
    short = replace(ARM, schedule=replace(ARM.schedule, cutoff=sizes[len(sizes) // 2]))
    kept, funnel = collect_traces(short, COMMON)
    assert funnel == {
        "in": len(sizes),
        "control_tokens": 0,
        "escaped": 0,
        "over_long": sum(n > short.schedule.cutoff for n in sizes),
        "kept": len(kept),
    }
    assert 0 < len(kept) < len(sizes)
    with pytest.raises(OctomedError, match="cut-off of 3 tokens"):
        collect_traces(replace(ARM, schedule=replace(ARM.schedule, cutoff=3)), COMMON)


def test_known_answers_are_exported_too():
    kept, _ = collect_traces(replace(ARM, form="direct", k=0), COMMON)
    assert len(kept) == 8
    assert all(
        x.model is None and x.response == f"\\boxed{{{x.question.answer_text}}}" for x in kept
    )


def test_factory_rows_have_a_placeholder_for_each_image_and_the_image(factory):
    out, counts = factory
    rows = read_jsonl(out / "traces.jsonl")
    assert len(rows) == counts["kept"] == counts["in"]
    assert any(r["images"] for r in rows)
    for r in rows:
        assert [m["role"] for m in r["messages"]] == ["user", "assistant"]
        assert r["messages"][0]["content"].count("<image>") == len(r["images"])
        assert r["messages"][1]["content"].startswith("<think>")
        assert all((out / i).is_file() for i in r["images"])
    info = json.loads((out / "dataset_info.json").read_text())["octomed"]
    assert info["formatting"] == "sharegpt"
    assert (out / info["file_name"]).is_file()


def test_factory_images_are_the_stored_ones_and_its_own_resize_changes_nothing(factory):
    from PIL import Image

    from octomed.data.images import image_path

    out, counts = factory
    pictures = list((out / "images").glob("*.png"))
    args = yaml.safe_load((out / "train.yaml").read_text())
    assert len(pictures) == counts["images"] > 0
    for f in pictures:
        assert f.read_bytes() == image_path(f.stem, COMMON.max_pixels).read_bytes()
        with Image.open(f) as im:
            assert args["image_min_pixels"] <= im.width * im.height <= args["image_max_pixels"]
            assert im.width % 28 == im.height % 28 == 0


def test_factory_settings_are_the_schedules_and_leave_nothing_to_a_default_that_differs(factory):
    args = yaml.safe_load((factory[0] / "train.yaml").read_text())
    assert (
        args["cutoff_len"],
        args["num_train_epochs"],
        args["learning_rate"],
        args["warmup_ratio"],
    ) == (2048, 2.0, COMMON.lr, COMMON.warmup)
    assert (
        args["template"],
        args["default_system"],
        args["finetuning_type"],
        args["lr_scheduler_type"],
        args["bf16"],
    ) == ("qwen2_vl", "", "full", "cosine", True)
    assert not any(
        args[k]
        for k in ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
    )
    assert args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] == COMMON.batch
    assert (factory[0] / args["model_name_or_path"] / "config.json").is_file()


def test_batch_is_devices_by_accumulation_and_more_devices_shard():
    paper = replace(ARM, schedule=replace(ARM.schedule, batch=128, cutoff=8192))
    args = factory_settings(
        paper,
        COMMON,
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "You are a helpful assistant.",
        devices=8,
        per_device=2,
    )
    assert (args["gradient_accumulation_steps"], args["deepspeed"], args["cutoff_len"]) == (
        8,
        "zero3.json",
        8192,
    )
    with pytest.raises(OctomedError, match="no multiple of 3"):
        factory_settings(ARM, COMMON, "m", "", devices=3)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"compute_of": ARM}, "no epochs of its own"),
        ({"schedule": replace(ARM.schedule, optimizer="muon")}, "adamw"),
        ({"schedule": replace(ARM.schedule, freeze=("model.visual.blocks.0",))}, "cannot freeze"),
    ],
)
def test_runs_that_it_cannot_make_are_refused(changed, says):
    with pytest.raises(OctomedError, match=says):
        factory_settings(replace(ARM, **changed), COMMON, "m", "")


def test_freeze_flags_say_what_our_prefixes_freeze(student):
    model, _ = student
    for freeze in (
        (),
        ("model.visual",),
        ("model.visual.merger",),
        ("model.language_model", "lm_head"),
        ("model.visual.patch_embed", "model.visual.blocks"),
    ):
        flags, names = frozen_parts(freeze), [n for n, _ in model.named_parameters()]
        part = {
            "freeze_vision_tower": [
                n for n in names if n.startswith("model.visual") and "merger" not in n
            ],
            "freeze_multi_modal_projector": [n for n in names if "merger" in n],
            "freeze_language_model": [n for n in names if not n.startswith("model.visual")],
        }
        assert flags == {
            k: bool(freeze) and all(n.startswith(freeze) for n in ns) for k, ns in part.items()
        }


def test_f12_a_placeholder_in_a_text_is_escaped_in_every_export(tmp_path, monkeypatch):
    kept, funnel = collect_traces(ARM, COMMON)
    pictured = next(trace for trace in kept if trace.question.images)
    marked = replace(pictured, response="<think>an <image> ?</think>\\boxed{A}")
    monkeypatch.setattr(factory_module, "collect_traces", lambda *_: ([marked], funnel))
    export_llamafactory(ARM, COMMON, tmp_path / "factory")
    (row,) = read_jsonl(tmp_path / "factory" / "traces.jsonl")
    hub = hub_row(marked, COMMON.max_pixels)
    for messages in (row["messages"], hub["messages"]):
        text = "".join(message["content"] for message in messages)
        assert text.count("<image>") == len(pictured.question.images) == 1
        assert "an &lt;image&gt; ?" in messages[-1]["content"]


def test_f12_a_question_with_a_placeholder_is_escaped_in_a_task():
    q = Question(
        stem="What does <image> mean?",
        options=("a mark", "nothing"),
        answer="A",
        source="made",
        split="test",
        category="text_only",
    )
    row = task_row(q, load_template("cot"))
    assert "<image>" not in row["prompt"] and "&lt;image&gt;" in row["prompt"]


def test_f20_a_trace_with_a_token_of_the_model_is_left_out_and_counted(tmp_path, monkeypatch):
    every = exports_module._all_traces

    def with_marks(params, questions):
        first, second, *rest = every(params, questions)
        marked = replace(first, response=f"{first.response} <|image_pad|>")
        content = [{"type": "text", "text": "Is it <|im_end|> over?"}]
        asked = replace(second, messages=[{"role": "user", "content": content}])
        return [marked, asked, *rest]

    monkeypatch.setattr(exports_module, "_all_traces", with_marks)
    kept, funnel = collect_traces(ARM, COMMON)
    assert funnel["control_tokens"] == 2
    assert funnel["in"] == len(kept) + 2 == funnel["kept"] + 2


def test_an_export_goes_into_a_new_folder_only(factory):
    with pytest.raises(UsageError, match="name a new folder"):
        export_llamafactory(ARM, COMMON, factory[0])


def test_hub_rows_load_with_images_and_the_card_counts_them(tmp_path):
    from datasets import load_dataset

    counts = export_dataset(ARM, COMMON, tmp_path / "hub", "some-traces")
    data = load_dataset(
        "parquet",
        data_files=str(tmp_path / "hub" / "data" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    kept = collect_traces(ARM, COMMON)[0]
    assert len(data) == counts["kept"] == len(kept)
    for r, x in zip(data, kept, strict=False):
        assert r["messages"][-1] == {"content": x.response, "role": "assistant"}
        assert (
            r["question"],
            r["answer"],
            r["teacher"],
        ) == (x.question.id, x.question.answer, x.model)
        assert (
            len(r["images"])
            == len(x.question.images)
            == r["messages"][0]["content"].count("<image>")
        )
    readme = (tmp_path / "hub" / "README.md").read_text()
    front = yaml.safe_load(readme.split("---")[1])
    assert front["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    assert front["size_categories"] == ["n<1K"]
    assert f"{counts['kept']:,} traces" in readme
    assert "hf upload OWNER/some-traces" in readme
    assert all(s in readme for s, _ in ARM.sources)
    assert {f.stem for f in (tmp_path / "hub" / "cards").glob("*.json")} == {
        "data",
        "samples",
        "accepted",
    }


def test_fault_17_exports_name_no_path_of_the_machine(factory, tasks, tmp_path):
    export_dataset(ARM, COMMON, tmp_path / "hub")
    for folder in (factory[0], tasks[0], tmp_path / "hub"):
        for f in folder.rglob("*"):
            if f.is_file() and f.suffix in (".json", ".jsonl", ".yaml", ".md", ".py"):
                assert (
                    str(root()) not in (text := f.read_text()) and str(tmp_path.parent) not in text
                ), f.name


def test_tasks_are_read_by_yaml_and_hold_the_evaluations_questions(tasks):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    out, done = tasks
    for spec in BENCHES:
        name, qs = task_name(spec, "cot"), take_subset(load(spec, max_pixels=COMMON.max_pixels), 5)
        task = yaml.load((out / f"{name}.yaml").read_text(), Loader)
        rows = read_jsonl(out / f"{name}.jsonl")
        assert [r["id"] for r in rows] == [q.id for q in qs]
        assert task["dataset_kwargs"]["file"] == f"{name}.jsonl"
        assert task["generation_kwargs"] == {
            "until": [],
            "max_gen_toks": COMMON.max_tokens,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
        }
        assert ("doc_to_image" in task) == any(q.images for q in qs)
        assert all(r["prompt"].count("<image>") == len(r["images"]) for r in rows)
    assert sum(d["images"] for d in done) == len(list((out / "images").glob("*.png"))) > 0


def test_a_task_judges_as_evaluation_does_with_nothing_but_the_parser(tasks):
    out, done = tasks
    row = read_jsonl(out / f"{done[0]['task']}.jsonl")[0]
    responses = [
        f"<think>so</think>\n\n\\boxed{{{t}}}"
        for t in (row["answer"], row["options"][0], row["options"][1], "none")
    ] + ["<think>cut"]
    code = """
import json, sys
sys.path.insert(0, ".")
import utils
doc = json.loads(sys.argv[1])
print(json.dumps([utils.scores(doc, [text]) for text in json.loads(sys.argv[2])]))
assert not {"torch", "datasets", "transformers"} & set(sys.modules)
"""
    p = subprocess.run(
        [sys.executable, "-c", code, json.dumps(row), json.dumps(responses)],
        cwd=out,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for text, scores in zip(responses, json.loads(p.stdout), strict=True):
        v = judge(text, row["options"], row["answer"], True, tuple(row["forms"]))
        assert scores == {
            "accuracy": float(v.status == "correct"),
            "unparsed": float(v.status == "unparsed"),
            "truncated": float(v.status == "truncated"),
        }


def test_greedy_tasks_have_no_temperature(tmp_path):
    export_tasks(
        BENCHES[:1], COMMON, tmp_path / "t", limit=1, sampling=Sampling(0.0, 1.0, max_tokens=7)
    )
    text = (tmp_path / "t" / f"{task_name(BENCHES[0], 'cot')}.yaml").read_text()
    assert "temperature" not in text
    assert "max_gen_toks: 7" in text


@pytest.mark.parametrize(
    "name, kind, processes", [("fsdp2", "FSDP", 8), ("zero3", "DEEPSPEED", 8), ("single", "NO", 1)]
)
def test_accelerate_reads_its_configurations(name, kind, processes):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(root() / "nbs" / "recipes" / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (
        kind,
        processes,
        "bf16",
    )


def test_accelerate_launch_takes_its_configurations(monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.setattr(
        "accelerate.commands.launch.is_deepspeed_available", lambda: True, raising=False
    )

    def args(name):
        return _validate_launch_command(
            launch_command_parser().parse_args(
                [
                    "--config_file",
                    str(root() / "nbs" / "recipes" / "accelerate" / f"{name}.yaml"),
                    "train.py",
                ]
            )
        )[0]

    fsdp, zero = args("fsdp2"), args("zero3")
    assert (fsdp.use_fsdp, fsdp.fsdp_version, fsdp.fsdp_state_dict_type) == (
        True,
        2,
        "SHARDED_STATE_DICT",
    )
    assert (zero.use_deepspeed, zero.zero_stage) == (True, 3)


def test_fsdp_wraps_the_layers_that_the_model_names(student):
    from octomed.train.objective import objective_class

    conf = yaml.safe_load((root() / "nbs" / "recipes" / "accelerate" / "fsdp2.yaml").read_text())[
        "fsdp_config"
    ]
    assert conf["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert "fsdp_transformer_layer_cls_to_wrap" not in conf
    assert {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"} <= set(
        objective_class()(student[0], False)._no_split_modules
    )


def test_commands_write_exports_and_refuse_a_folder_that_is_there(tmp_path, capsys):
    from octomed.run.cli import main

    common = ["--limit", "2", "--out"]
    assert main(["export", "lm-eval", BENCHES[0], *common, str(tmp_path / "t")]) == 0
    assert len(read_jsonl(tmp_path / "t" / f"{task_name(BENCHES[0], 'cot')}.jsonl")) == 2
    assert (
        main(
            [
                "export",
                "llamafactory",
                "clinic_ward:train",
                "--student",
                "tests/blank",
                "--epochs",
                "2",
                "--devices",
                "2",
                *common,
                str(tmp_path / "f"),
            ]
        )
        == 0
    )
    args = yaml.safe_load((tmp_path / "f" / "train.yaml").read_text())
    assert (args["num_train_epochs"], args["gradient_accumulation_steps"], args["deepspeed"]) == (
        2.0,
        4,
        "zero3.json",
    )
    assert (tmp_path / "f" / "zero3.json").is_file()
    assert (
        main(
            [
                "export",
                "hub",
                "clinic_ward:train",
                "--student",
                "tests/blank",
                "--name",
                "mine",
                *common,
                str(tmp_path / "h"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert main(["export", "hub", "clinic_ward:train", *common, str(tmp_path / "h")]) == 2
    assert capsys.readouterr().err == "octomed: h is there and not empty: name a new folder\n"


def test_a_benchmark_is_not_exported_as_training_data(tmp_path, capsys):
    from octomed.run.cli import main

    assert main(["export", "hub", "medqa:test", "--out", str(tmp_path / "b")]) == 2
    assert "which is a benchmark: choose a training split" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_student_goes_with_its_card_and_loads(tmp_path):
    counts = export_student(ARM, COMMON, tmp_path / "s", "mine")
    model, _ = load_student(tmp_path / "s")
    kept = load_student(run_stage(declare_stages(ARM, COMMON)["student"]))[0].state_dict()
    assert all((p == kept[n]).all() for n, p in model.state_dict().items())
    readme = (tmp_path / "s" / "README.md").read_text()
    front = yaml.safe_load(readme.split("---")[1])
    assert (front["pipeline_tag"], "base_model" in front) == ("image-text-to-text", False)
    assert f"| steps | {counts['steps']} |" in readme
    assert "hf upload OWNER/mine . --repo-type model" in readme
    assert all(s in readme for s, _ in ARM.sources)
    assert "## Contamination" in readme
    assert {f.stem for f in (tmp_path / "s" / "cards").glob("*")} == {
        "data",
        "samples",
        "accepted",
        "student",
    }
    with pytest.raises(OctomedError, match="trains nothing"):
        export_student(
            replace(ARM, schedule=replace(ARM.schedule, epochs=0)), COMMON, tmp_path / "n"
        )


def test_the_card_says_which_benchmarks_were_compared_with_the_questions(tmp_path):
    arm = replace(ARM, against=(("clinic_ward:train", "text"),), sources=(("clinic_ward:test", 4),))
    export_dataset(arm, COMMON, tmp_path / "h")
    assert (
        "compared with these questions before anything was drawn: clinic_ward:train by text."
        in (tmp_path / "h" / "README.md").read_text()
    )


def test_the_cards_report_what_is_still_shared_with_the_benchmarks(tmp_path):
    common = replace(
        COMMON, benchmarks=(*BENCHES, "nejm:test")
    )  # the export's questions are taken from the first two
    for make in (export_dataset, export_student):
        make(ARM, common, out := tmp_path / make.__name__)
        readme = (out / "README.md").read_text()
        kept = {x.question.id: x.question for x in collect_traces(ARM, common)[0]}.values()
        ward, rounds, nejm = json.loads((out / "card.json").read_text())["contamination"]
        assert (ward["stem"], rounds["stem"]) == tuple(
            sum(q.source == b.split(":")[0] for q in kept) for b in BENCHES
        )
        assert rounds["image"] == rounds["stem"] > 0 == ward["image"]
        assert nejm == {"benchmark": "nejm:test"}
        assert "| nejm:test | not at hand |" in readme
        assert f"| {BENCHES[0]} | {ward['items']:,} | " in readme
        assert readme.count("made by this project") == 2  # the licence of each source


def test_a_card_names_what_taught_the_student_before(tmp_path):
    export_dataset(
        replace(ARM, sources=ARM.sources[:1], base=replace(ARM, sources=ARM.sources[1:])),
        COMMON,
        tmp_path / "h",
    )
    readme = (tmp_path / "h" / "README.md").read_text()
    assert f"| {BENCHES[1]} | 0 |" in readme
    assert "taught the student that this one started from" in readme


class Hub:
    "A hub that only notes what it is sent."

    sent, fails = [], ""

    def __init__(self, token):
        self.token = token

    def create_repo(self, name, **kw):
        self.sent.append(("create", name, kw, self.token))

    def upload_folder(self, **kw):
        if self.fails:
            raise ValueError(f"403 Forbidden for {self.token}: {self.fails}")
        self.sent.append(
            (
                "upload",
                kw["repo_id"],
                kw["repo_type"],
                sorted(f.name for f in Path(kw["folder_path"]).iterdir()),
            )
        )
        return type("Commit", (), {"commit_url": f"https://hub/{kw['repo_id']}/commit/1"})


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "sent", [])
    monkeypatch.setattr(Hub, "fails", "")
    monkeypatch.setenv("HF_TOKEN", "hf_canary_5081")
    return Hub


def test_fault_17_an_export_is_pushed_on_request_and_the_token_is_seen_nowhere(
    tmp_path, capsys, fake_hub
):
    from octomed.run.cli import main

    ask = ["export", "hub", "clinic_ward:train", "--student", "tests/blank", "--limit", "2"]
    assert main([*ask, "--out", str(tmp_path / "a")]) == 0
    assert not fake_hub.sent
    assert "nothing was sent" in capsys.readouterr().err
    assert main([*ask, "--out", str(tmp_path / "b"), "--push", "me/traces"]) == 0
    assert fake_hub.sent == [
        (
            "create",
            "me/traces",
            {"repo_type": "dataset", "private": True, "exist_ok": True},
            "hf_canary_5081",
        ),
        ("upload", "me/traces", "dataset", ["README.md", "card.json", "cards", "data"]),
    ]
    shown = capsys.readouterr()
    assert "sent to https://hub/me/traces/commit/1, private" in shown.err
    assert "canary" not in shown.out + shown.err
    fake_hub.fails = "no rights"
    assert main([*ask, "--out", str(tmp_path / "c"), "--push", "me/traces"]) == 1
    shown = capsys.readouterr()
    assert "the hub did not take me/traces (403 Forbidden for [HF_TOKEN]: no rights)" in shown.err
    assert "Traceback" not in shown.err
    assert "canary" not in shown.out + shown.err
    assert not any(
        "canary" in f.read_text(errors="replace") for f in tmp_path.rglob("*") if f.is_file()
    )


@pytest.mark.parametrize(
    "name, token, says", [("me", "t0ken-1", "write OWNER/NAME"), ("me/x", "", "set HF_TOKEN")]
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, fake_hub, name, token, says
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError, match=says):
        check_push(ARM, name)
    assert not fake_hub.sent


def test_what_may_not_be_passed_on_is_not_pushed(fake_hub):
    with pytest.raises(OctomedError, match="nejm:test may not be passed on"):
        check_push(replace(ARM, base=replace(ARM, sources=(("nejm:test", 4),))), "me/x")


@pytest.fixture(scope="module")
def drawn_arm():
    arm = replace(ARM, k=8)
    common = replace(COMMON, samples=8)
    run_stage(declare_stages(arm, common)["accepted"])  # as `octomed distill` does
    return arm, common


def forbid_teachers(monkeypatch):
    "Any request to a teacher from here on is an error."

    def refuse(*args, **named):
        raise AssertionError("an export asked a teacher")

    monkeypatch.setattr("octomed.distill.sampling.load_teacher", refuse)


@pytest.mark.parametrize("form, reader", [("jsonl", "json"), ("parquet", "parquet")])
def test_all_samples_are_exported_with_their_verdicts(
    drawn_arm, tmp_path, monkeypatch, form, reader
):
    from datasets import load_dataset

    forbid_teachers(monkeypatch)
    counts = export_samples(*drawn_arm, tmp_path / "all", form=form)
    file = str(tmp_path / "all" / f"samples.{form}")
    table = load_dataset(reader, data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == counts["samples"] == 8 * counts["questions"]
    assert {row["status"] for row in table} >= {"correct", "wrong"}
    for row in table:
        assert row["answer_text"] == row["options"]["ABCDEFGH".index(row["answer"])]
        if row["status"] in ("correct", "wrong"):
            assert (row["letter"] == row["answer"]) == (row["status"] == "correct")
        assert (row["temperature"], row["top_p"]) == (1.0, 0.95)
        assert row["max_tokens"] == COMMON.max_tokens
        assert all((tmp_path / "all" / image).is_file() for image in row["images"])
    assert any(row["images"] for row in table)


def test_samples_that_were_not_drawn_are_not_drawn_by_an_export(drawn_arm, tmp_path, monkeypatch):
    forbid_teachers(monkeypatch)
    arm, common = drawn_arm
    for write in (export_samples, export_preferences):
        with pytest.raises(OctomedError, match="run `octomed distill clinic_ward:test"):
            write(arm, replace(common, samples=7), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_i_th_right_sample_is_paired_with_the_i_th_wrong_one(drawn_arm, monkeypatch):
    forbid_teachers(monkeypatch)
    arm, common = drawn_arm
    pairs, counts = collect_pairs(arm, common)
    _, judged = judge_drawn(find_drawn(arm, common))
    expected = []
    for id, samples in judged.items():
        right = [s.index for s, v in samples if v.status == "correct"]
        wrong = [s.index for s, v in samples if v.status == "wrong"]
        expected += [(id, *both) for both in zip(right, wrong, strict=False)]
    assert [(r.question.id, r.index, w.index) for r, w in pairs] == expected
    assert counts["pairs"] == len(expected)
    assert counts["with_both"] < counts["questions"]
    for right, wrong in pairs:
        letters, gold = right.question.letters, right.question.answer
        assert judge(right.response, letters, think_first=True).letter == gold
        assert judge(wrong.response, letters, think_first=True).letter not in (gold, None)
    limited, _ = collect_pairs(arm, common, most=1)
    assert len(limited) == len({id for id, *_ in expected})


def test_preferences_have_the_shape_that_trl_reads(drawn_arm, tmp_path):
    from datasets import load_dataset

    counts = export_preferences(*drawn_arm, tmp_path / "trl", form="trl")
    file = str(tmp_path / "trl" / "pairs.parquet")
    table = load_dataset(
        "parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == counts["pairs"]
    for row in table:
        assert [m["role"] for m in row["prompt"]] == ["user"]
        parts = row["prompt"][0]["content"]
        assert sum(part["type"] == "image" for part in parts) == len(row["images"])
        assert all(image.size for image in row["images"])
        for name in ("chosen", "rejected"):
            (reply,) = row[name]
            assert reply["role"] == "assistant"
            assert reply["content"][0]["text"].startswith("<think>")
        assert row["chosen"] != row["rejected"]


def test_preferences_of_text_alone_have_no_column_of_images(tmp_path):
    from datasets import Dataset

    arm = replace(ARM, sources=((BENCHES[0], 6),), k=8)
    common = replace(COMMON, samples=8)
    run_stage(declare_stages(arm, common)["samples"])
    if any(q.images for q in judge_drawn(find_drawn(arm, common))[0].values()):
        pytest.skip("this pool has images")
    export_preferences(arm, common, tmp_path / "trl", form="trl")
    table = Dataset.from_parquet(
        str(tmp_path / "trl" / "pairs.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert set(table.column_names) == {"prompt", "chosen", "rejected", "question"}
    assert isinstance(table[0]["prompt"][0]["content"], str)


def test_preferences_are_a_ranking_in_llamafactory(drawn_arm, tmp_path):
    counts = export_preferences(*drawn_arm, tmp_path / "there", form="llamafactory")
    info = json.loads((tmp_path / "there" / "dataset_info.json").read_text())["octomed"]
    assert info["ranking"] is True
    rows = read_jsonl(tmp_path / "there" / info["file_name"])
    assert len(rows) == counts["pairs"]
    for row in rows:
        assert set(row) == set(info["columns"].values())
        assert len(row["messages"]) % 2 == 1  # it ends with the user
        assert row["messages"][-1]["content"].count("<image>") == len(row["images"])
        assert row["chosen"]["role"] == row["rejected"]["role"] == "assistant"
        assert all((tmp_path / "there" / image).is_file() for image in row["images"])


def test_placeholders_in_a_pair_are_escaped_in_both_formats():
    q = Question("Is <image> a mark?", ("yes", "no"), "A", "s", "train", "medical_text")
    messages = [{"role": "user", "content": [{"type": "text", "text": q.stem}]}]
    right = exports_module.Trace(q, messages, "<think>an <image></think>", index=0, model="m")
    row = trl_row(right, replace(right, response="<video>"))
    assert "&lt;image&gt;" in row["prompt"][0]["content"]
    assert row["chosen"][0]["content"] == "<think>an &lt;image&gt;</think>"
    assert row["rejected"][0]["content"] == "&lt;video&gt;"
    typed = trl_row(right, right, max_pixels=1)
    assert typed["chosen"][0]["content"][0]["text"] == row["chosen"][0]["content"]


def test_pairs_that_cannot_be_made_are_told_with_counts(tmp_path, monkeypatch):
    arm = replace(ARM, sources=((BENCHES[0], 1),), k=1)
    common = replace(COMMON, samples=1)
    run_stage(declare_stages(arm, common)["samples"])
    with pytest.raises(OctomedError, match=r"of 1 questions, \d have no correct sample"):
        export_preferences(arm, common, tmp_path / "pairs")
    with pytest.raises(UsageError, match="choose from trl, llamafactory"):
        export_preferences(arm, common, tmp_path / "pairs", form="csv")
