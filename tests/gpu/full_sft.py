"""How fast, and in how much memory, one card fine-tunes all of Qwen2.5-VL-7B on packed rows of 8,192 tokens.

The model has its real configuration (data/configs/) and random weights; rows are packed samples of text and images whose lengths are drawn as the paper's
traces are long (850 response tokens in the mean, half of them with an image of 324 visual tokens). For each of a short list of settings: tokens a second,
share of the chip's matmul rate as measured here and of its data sheet, peak memory, the loss of the first step (the same weights and rows, so settings that
compute the same thing agree), and failures with what they said. Nothing is tuned while it runs; the list is the declaration.

    python tests/gpu/full_sft.py                        one H100 or H200, under nine minutes; writes outputs/reference/gpu/full_sft.json
    python tests/gpu/full_sft.py --small --out FILE     the same code at a toy size on the CPU, in under a minute (pytest runs it)

No GPU was at hand when this was written: only the small version has been run."""

import argparse
import gc
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from octomed.core.files import write_json
from octomed.core.identity import card
from octomed.core.paths import OctomedError, root
from octomed.generate.render import Row
from octomed.train.attention import use_packed_attention
from octomed.train.objective import packed_loss_sum
from octomed.train.packing import pack
from octomed.train.sizing import (
    ASSUMED,
    LANGUAGE,
    PARTS,
    STATES,
    Load,
    configuration,
    memory,
    part_of,
    shape_of,
    train_flops,
)

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
WAYS = {"all": PARTS, "without tower and projector": LANGUAGE}


@dataclass(frozen=True)
class Setting:
    "One way to train. State dtypes and frozen parts are told with every number."

    state: str = "bf16 throughout"  # a name in octomed.train.sizing.STATES
    trained: str = "all"  # a name in WAYS
    attention: str = ""  # one of octomed.train.attention.ATTENTION; empty: what it chooses
    checkpointing: bool = True
    chunk: int = 1024  # tokens whose logits are held at once
    optimizer: str = "fused"  # AdamW: `fused`, `foreach`, `8-bit` (bitsandbytes), or `in backward`, a parameter at a time, which keeps no gradients
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
    c = configuration(MODEL)
    if not small:
        return c
    text = c.text_config.to_dict() | {
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
    vision = c.vision_config.to_dict() | {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    return type(c)(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )


def build(c, state: str, device: str):
    "The model with random weights, the same for the same state."
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(
            c, dtype=torch.float32 if STATES[state][0] == 4 else torch.bfloat16
        ).train()


def packed_rows(c, budget: int, rows: int, small: bool) -> list[list[Row]]:
    "The fullest packed rows of drawn samples. An image is named by its number."
    rng, side = np.random.default_rng(0), 8 if small else 36  # patches along an image: 504 pixels
    visual, mean = side * side // 4, 60 if small else 850
    samples = []
    for n in range(12 * rows * budget // (8 * mean)):
        image, said = n % 2, int(np.clip(rng.lognormal(np.log(mean) - 0.18, 0.6), 8, budget // 2))
        words = rng.integers(10, 400, 20 + 60 * (not small) + said).tolist()
        prompt = [
            c.vision_start_token_id,
            *[c.image_token_id] * visual,
            c.vision_end_token_id,
        ] * image + words[:-said]
        samples.append(Row(prompt + words[-said:], len(prompt), [str(n % 4)] * image))
    p = pack([len(s.input_ids) for s in samples], budget)
    full = sorted(
        (p[b] for b in range(len(p))), key=lambda b: -sum(len(samples[i].input_ids) for i in b)
    )[:rows]
    return [[samples[i] for i in b] for b in full]


def pixels_of(c, device: str, small: bool):
    "Random patches of four images; a stand-in for octomed.generate.render.Pixels."
    side, v = 8 if small else 36, c.vision_config
    made = torch.randn(
        4,
        side * side,
        3 * v.temporal_patch_size * v.patch_size**2,
        generator=torch.Generator().manual_seed(0),
    )
    return lambda image: (made[int(image)], torch.tensor([[1, side, side]]))


def optimizer_of(model, s: Setting):
    "An optimizer's step, to be called after the backward pass."
    given = [p for p in model.parameters() if p.requires_grad]
    if s.optimizer == "8-bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise OctomedError("bitsandbytes is not installed") from None
        opt = AdamW8bit(given, lr=1e-6)
    elif s.optimizer == "in backward":
        each = {p: torch.optim.AdamW([p], lr=1e-6, fused=p.is_cuda) for p in given}

        def at_once(p):
            each[p].step()
            each[p].zero_grad(set_to_none=True)

        for p in given:
            p.register_post_accumulate_grad_hook(at_once)
        return lambda: None
    else:
        opt = torch.optim.AdamW(given, lr=1e-6, **{s.optimizer: True})

    def step():
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


def wait(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, small: bool) -> dict:
    "TFLOP/s of bf16 products: a square one, and the student's largest."
    found = {}
    for m, k, n in (
        [(256, 256, 256)]
        if small
        else [(8192, 8192, 8192), (8192, 3584, 18944), (8192, 18944, 3584)]
    ):
        a, b = (
            torch.randn(m, k, device=device, dtype=torch.bfloat16),
            torch.randn(k, n, device=device, dtype=torch.bfloat16),
        )
        for _ in range(3):
            a @ b
        wait(device)
        start, times = time.perf_counter(), 20
        for _ in range(times):
            a @ b
        wait(device)
        found[f"{m} × {k} × {n}"] = 2 * m * k * n * times / (time.perf_counter() - start) / 1e12
    return found


def measured(c, s: Setting, rows, pixels, device: str, steps: int, rate: float) -> dict:
    "One setting's numbers."
    model = build(c, s.state, device)
    shape, trained = shape_of(model), WAYS[s.trained]
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in trained)
    attention = use_packed_attention(model, s.attention or None)
    if s.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if s.compiled:
        for m in model.modules():
            if type(m).__name__.endswith(("RMSNorm", "MLP")):
                m.compile(dynamic=True)
    step, processor, first, spent = (
        optimizer_of(model, s),
        SimpleNamespace(image_token_id=c.image_token_id),
        None,
        {"forward and backward": 0.0, "optimizer": 0.0},
    )
    lengths, tokens, work = [len(r.input_ids) for row in rows for r in row], 0, 0.0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for n in range(2 + steps):  # two to warm up
        row = rows[n % len(rows)]
        wait(device)
        start = time.perf_counter()
        loss, answered = packed_loss_sum(model, processor, row, pixels, s.chunk)
        (loss / answered).backward()
        wait(device)
        between = time.perf_counter()
        step()
        wait(device)
        end = time.perf_counter()
        first = first if n else loss.item() / answered
        if n < 2:
            continue
        spent["forward and backward"] += between - start
        spent["optimizer"] += end - between
        visual, size = (
            sum(r.input_ids.count(c.image_token_id) for r in row),
            [len(r.input_ids) for r in row],
        )
        load = Load(
            sum(size),
            sum(x * x for x in size) / sum(size),
            visual,
            image=(visual / max(1, sum(len(r.images) for r in row))),
            answered=answered,
        )
        work += sum(v for k, v in train_flops(shape, load, trained).items() if k != "again")
        tokens += sum(size)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    seconds, told = (
        spent["forward and backward"],
        memory(shape, load, s.state, 1, s.checkpointing, trained, s.chunk),
    )
    return {
        "attention used": attention,
        "weights": str(next(model.parameters()).dtype),
        "frozen": sorted(set(PARTS) - set(trained)),
        "parameters": shape.total,
        "samples a row": round(len(lengths) / len(rows), 1),
        "first loss": first,
        "tokens a second": tokens / seconds,
        "tokens a second, an optimizer step a row": tokens / sum(spent.values()),
        "TFLOP/s": work / seconds / 1e12,
        "share of the measured matmul rate": work / seconds / 1e12 / rate,
        "share of the data sheet's peak": work / seconds / ASSUMED["peak"]
        if device == "cuda"
        else None,
        "GFLOPs a token": work / tokens / 1e9,
        "optimizer seconds": spent["optimizer"] / steps,
        "peak GB": peak and peak / 1e9,
        "estimated GB": told["total"] / 1e9,
    }


def main(argv=None) -> dict:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--small", action="store_true")
    args.add_argument(
        "--out", default=str(root() / "outputs" / "reference" / "gpu" / "full_sft.json")
    )
    args.add_argument(
        "--minutes", type=float, default=8.0, help="no setting is begun after so many"
    )
    args.add_argument("--steps", type=int, default=6)
    a = args.parse_args(argv)
    device, started = "cuda" if torch.cuda.is_available() and not a.small else "cpu", time.time()
    if device == "cpu" and not a.small:
        raise SystemExit("no GPU is here: run it with --small")
    c = config(a.small)
    rows, pixels, rates = (
        packed_rows(c, 256 if a.small else 8192, 2, a.small),
        pixels_of(c, device, a.small),
        matmul_rate(device, a.small),
    )
    found = {
        "model": MODEL if not a.small else "its class at a toy size",
        "tokens of the rows": [sum(len(r.input_ids) for r in row) for row in rows],
        "matmul TFLOP/s": rates,
        "settings": [],
    }
    for s in SMALL if a.small else SETTINGS:
        if (time.time() - started) / 60 > a.minutes:
            found["settings"].append({**asdict(s), "failed": "not begun: the time was up"})
            continue
        try:
            numbers = measured(
                c, s, rows, pixels, device, 2 if a.small else a.steps, max(rates.values())
            )
        except (OctomedError, torch.OutOfMemoryError, RuntimeError) as e:
            numbers = {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"}
        gc.collect()
        device == "cuda" and torch.cuda.empty_cache()
        found["settings"].append({**asdict(s), **numbers})
        print(json.dumps(found["settings"][-1]), flush=True)
        write_json(
            Path(a.out), {**found, "card": card(minutes=round((time.time() - started) / 60, 2))}
        )  # after each, so that a kill keeps the others
    return found


if __name__ == "__main__":
    main()
