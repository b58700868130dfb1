"""How fast, and in how much memory, one card fine-tunes all of Qwen2.5-VL-7B.

The model has its real configuration (data/configs/) and random weights. It reads packed rows of
8,192 tokens. Their samples are text and images, with lengths as the paper's traces have them: 850
response tokens on average, and half of them with an image of 324 visual tokens.

The settings are listed below and are not tuned while the script runs. For each it reports:

- tokens a second, and the share of the chip's matmul rate as measured here and by its data sheet;
- peak memory;
- the loss of the first step. Weights and rows are the same for all, so settings that compute the
  same thing must agree;
- the error message, if it failed.

    python tests/gpu/full_sft.py
        needs one H100 or H200 and less than nine minutes;
        writes outputs/reference/gpu/full_sft.json
    python tests/gpu/full_sft.py --small --out FILE
        the same code at a toy size on the CPU, in less than a minute (pytest runs it)

No GPU was available when this was written: only the small version has been run.
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toys import shrink_configuration

from octomed.core.files import write_json
from octomed.core.identity import make_card
from octomed.core.paths import OctomedError, root
from octomed.generate.render import Row
from octomed.train.attention import use_packed_attention
from octomed.train.objective import sum_packed_loss
from octomed.train.packing import pack
from octomed.train.sizing import (
    ASSUMED,
    LANGUAGE,
    PARTS,
    STATES,
    Load,
    load_configuration,
    measure_shape,
    memory_bytes,
    part_of,
    training_flops,
)

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
WAYS = {"all": PARTS, "without tower and projector": LANGUAGE}


@dataclass(frozen=True)
class Setting:
    "One way to train. The number formats and the frozen parts are reported with every number."

    state: str = "bf16 throughout"  # a name in octomed.train.sizing.STATES
    trained: str = "all"  # a name in WAYS
    attention: str = ""  # one of octomed.train.attention.ATTENTION; empty: what it chooses
    checkpointing: bool = True
    chunk: int = 1024  # tokens whose logits are held at once
    # AdamW: `fused`, `foreach`, `8-bit` (bitsandbytes), or `in backward`, which updates a
    # parameter as soon as its gradient is known and keeps no gradients
    optimizer: str = "fused"
    compiled: bool = False  # norms and MLPs through torch.compile


SETTINGS = [
    Setting(trained="without tower and projector"),
    Setting(),
    Setting(trained="without tower and projector", compiled=True),
    Setting(compiled=True, chunk=4096),
    Setting(trained="without tower and projector", checkpointing=False, compiled=True),
    Setting(optimizer="in backward"),
    Setting(attention="octomed_split"),
    Setting(optimizer="foreach"),
    Setting(state="bf16, 8-bit optimiser", optimizer="8-bit"),
    Setting(
        state="fp32 under bf16 autocast",
        trained="without tower and projector",
        optimizer="in backward",
    ),
]
SMALL = [
    Setting(),
    Setting(trained="without tower and projector", chunk=64),
    Setting(checkpointing=False, attention="octomed_split", optimizer="foreach"),
    Setting(optimizer="in backward"),
    Setting(optimizer="8-bit"),
]


def config(small: bool):
    "The real configuration, or one of its class with toy sizes."
    c = load_configuration(MODEL)
    if not small:
        return c
    text = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    return shrink_configuration(c, text, vision)


def build(c, state: str, device: str):
    "The model with random weights, the same for the same state."
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(
            c, dtype=torch.float32 if STATES[state][0] == 4 else torch.bfloat16
        ).train()


def packed_rows(c, budget: int, rows: int, small: bool) -> list[list[Row]]:
    "The fullest packed rows of random samples. An image is named by its number."
    rng, samples = np.random.default_rng(0), []
    mean = 60 if small else 850
    side = side_of(small)
    image_ids = [c.image_token_id] * (side * side // 4)
    image_prompt = [c.vision_start_token_id, *image_ids, c.vision_end_token_id]
    for n in range(12 * rows * budget // (8 * mean)):
        response = int(np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6), 8, budget // 2))
        words = rng.integers(10, 400, (20 if small else 80) + response).tolist()
        has_image = n % 2 == 1
        prompt = (image_prompt if has_image else []) + words[:-response]
        images = [str(n % 4)] if has_image else []
        samples.append(Row(prompt + words[-response:], len(prompt), images))

    def tokens(numbers):
        return sum(len(samples[i].input_ids) for i in numbers)

    packing = pack([len(s.input_ids) for s in samples], budget)
    fullest = sorted((packing[b] for b in range(len(packing))), key=tokens, reverse=True)[:rows]
    return [[samples[i] for i in numbers] for numbers in fullest]


def side_of(small: bool) -> int:
    "Patches along an image: 36 of them are 504 pixels."
    return 8 if small else 36


def pixels_of(c, device: str, small: bool):
    "Random patches of four images, in place of octomed.generate.render.Pixels."
    side, vision = side_of(small), c.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4, side * side, width, generator=generator)
    return lambda image: (patches[int(image)], torch.tensor([[1, side, side]]))


def optimizer_of(model, s: Setting):
    "An optimizer's step, to be called after the backward pass."
    trained = [p for p in model.parameters() if p.requires_grad]
    if s.optimizer == "8-bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise OctomedError("bitsandbytes is not installed") from None
        opt = AdamW8bit(trained, lr=1e-6)
    elif s.optimizer == "in backward":
        each = {p: torch.optim.AdamW([p], lr=1e-6, fused=p.is_cuda) for p in trained}

        def at_once(p):
            each[p].step()
            each[p].zero_grad(set_to_none=True)

        for p in trained:
            p.register_post_accumulate_grad_hook(at_once)
        return lambda: None
    else:
        opt = torch.optim.AdamW(trained, lr=1e-6, **{s.optimizer: True})

    def step():
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


def wait(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, small: bool) -> dict:
    "TFLOP/s of bf16 products: a square one, and the student's largest."
    sizes = [(8192, 8192, 8192), (8192, 3584, 18944), (8192, 18944, 3584)]
    rates = {}
    for m, k, n in [(256, 256, 256)] if small else sizes:
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        for _ in range(3):
            a @ b
        wait(device)
        start, times = time.perf_counter(), 20
        for _ in range(times):
            a @ b
        wait(device)
        rates[f"{m} × {k} × {n}"] = 2 * m * k * n * times / (time.perf_counter() - start) / 1e12
    return rates


def prepared(c, s: Setting, device: str):
    "The model of a setting, and the attention that it uses."
    model = build(c, s.state, device)
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in WAYS[s.trained])
    attention = use_packed_attention(model, s.attention or None)
    if s.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if s.compiled:
        for module in model.modules():
            if type(module).__name__.endswith(("RMSNorm", "MLP")):
                module.compile(dynamic=True)
    return model, attention


def load_of(c, row: list[Row], answered: int) -> Load:
    "What a packed row asks of the student."
    sizes = [len(r.input_ids) for r in row]
    visual = sum(r.input_ids.count(c.image_token_id) for r in row)
    images = sum(len(r.images) for r in row)
    return Load(
        tokens=sum(sizes),
        sample=sum(size * size for size in sizes) / sum(sizes),
        visual=visual,
        image=visual / max(1, images),
        answered=answered,
    )


@dataclass
class Totals:
    "What the measured steps of a setting add up to."

    backward: float = 0.0  # seconds of forward and backward passes
    optimizer: float = 0.0  # seconds of optimizer steps
    tokens: int = 0
    flops: float = 0.0
    first_loss: float | None = None  # of the very first step
    load: Load | None = None  # of the last step


def run_steps(c, s: Setting, model, rows, pixels, device: str, steps: int) -> Totals:
    "Train for some steps; the first two only warm up."
    shape, step = measure_shape(model), optimizer_of(model, s)
    processor, totals = SimpleNamespace(image_token_id=c.image_token_id), Totals()
    for n in range(2 + steps):
        row = rows[n % len(rows)]
        wait(device)
        start = time.perf_counter()
        loss, answered = sum_packed_loss(model, processor, row, pixels=pixels, chunk=s.chunk)
        (loss / answered).backward()
        wait(device)
        between = time.perf_counter()
        step()
        wait(device)
        end = time.perf_counter()
        if n == 0:
            totals.first_loss = loss.item() / answered
        if n < 2:
            continue
        load = load_of(c, row, answered)
        flops = training_flops(shape, load, WAYS[s.trained])
        totals.backward += between - start
        totals.optimizer += end - between
        totals.tokens += load.tokens
        totals.flops += flops["forward"] + flops["backward"]
        totals.load = load
    return totals


def measure(c, s: Setting, rows, pixels, device: str, steps: int, rate: float) -> dict:
    "One setting's numbers; `rate` is the measured matmul rate in TFLOP/s."
    model, attention = prepared(c, s, device)
    shape, trained = measure_shape(model), WAYS[s.trained]
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    totals = run_steps(c, s, model=model, rows=rows, pixels=pixels, device=device, steps=steps)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    estimated = memory_bytes(
        shape,
        totals.load,
        s.state,
        devices=1,
        checkpointing=s.checkpointing,
        trained=trained,
        chunk=s.chunk,
    )
    flops_a_second = totals.flops / totals.backward
    return {
        "attention used": attention,
        "weights": str(next(model.parameters()).dtype),
        "frozen": sorted(set(PARTS) - set(trained)),
        "parameters": shape.total,
        "samples a row": round(sum(map(len, rows)) / len(rows), 1),
        "first loss": totals.first_loss,
        "tokens a second": totals.tokens / totals.backward,
        "tokens a second, an optimizer step a row": totals.tokens
        / (totals.backward + totals.optimizer),
        "TFLOP/s": flops_a_second / 1e12,
        "share of the measured matmul rate": flops_a_second / 1e12 / rate,
        "share of the data sheet's peak": flops_a_second / ASSUMED["peak"] if on_gpu else None,
        "GFLOPs a token": totals.flops / totals.tokens / 1e9,
        "optimizer seconds": totals.optimizer / steps,
        "peak GB": peak and peak / 1e9,
        "estimated GB": estimated["total"] / 1e9,
    }


def options(argv=None):
    "The options of the command line."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = root() / "outputs" / "reference" / "gpu" / "full_sft.json"
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", default=str(out))
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="no setting is begun after so many"
    )
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    chosen = options(argv)
    small = chosen.small
    device, started = "cuda" if torch.cuda.is_available() and not small else "cpu", time.time()
    if device == "cpu" and not small:
        raise SystemExit("no GPU is here: run it with --small")

    def minutes():
        return (time.time() - started) / 60

    c = config(small)
    rows = packed_rows(c, budget=256 if small else 8192, rows=2, small=small)
    pixels, rates = pixels_of(c, device, small), matmul_rate(device, small)
    results = {
        "model": MODEL if not small else "its class at a toy size",
        "tokens of the rows": [sum(len(r.input_ids) for r in row) for row in rows],
        "matmul TFLOP/s": rates,
        "settings": [],
    }
    steps, rate = 2 if small else chosen.steps, max(rates.values())
    for s in SMALL if small else SETTINGS:
        if minutes() > chosen.minutes:
            results["settings"].append({**asdict(s), "failed": "not begun: the time was up"})
            continue
        try:
            numbers = measure(c, s, rows=rows, pixels=pixels, device=device, steps=steps, rate=rate)
        except (OctomedError, torch.OutOfMemoryError, RuntimeError) as error:
            message = str(error).splitlines()[0][:200]
            numbers = {"failed": f"{type(error).__name__}: {message}"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        results["settings"].append({**asdict(s), **numbers})
        print(json.dumps(results["settings"][-1]), flush=True)
        # written after each setting, so that a kill keeps the others
        write_json(Path(chosen.out), {**results, "card": make_card(minutes=round(minutes(), 2))})
    return results


if __name__ == "__main__":
    main()
