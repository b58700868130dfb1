"Whether memory and arithmetic are what a real model's configuration, PyTorch's own counter and its saved tensors say."

from dataclasses import replace

import pytest

from octomed.core.paths import OctomedError
from octomed.train.sizing import (
    LANGUAGE,
    MACHINES,
    PARTS,
    RESERVE,
    TOWER,
    Load,
    activations,
    configuration,
    decode_rate,
    draw_hours,
    forward_flops,
    layer_bytes,
    memory,
    shape,
    shape_of,
    states,
    train_flops,
    train_hours,
    verdicts,
)

TEXT_ONLY = 48


@pytest.fixture(scope="module")
def small():
    "(model, shape): the paper's class at a size that counts in no time; the text layers have an attention width of their own."
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    c = configuration("Qwen/Qwen2.5-VL-7B-Instruct")
    text, vision = c.text_config.to_dict(), c.vision_config.to_dict()
    text |= {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision |= {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1, 3],
    }
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=False,
            image_token_id=500,
            video_token_id=501,
            vision_start_token_id=502,
            vision_end_token_id=503,
        )
    )
    return model, shape_of(model)


def inputs(image=True):
    "One sample: an image of 24 × 32 patches, which windows of 8 × 8 divide, between two texts."
    import torch

    pads = 24 * 32 // 4 if image else 0
    ids = torch.tensor([[5] * 20 + [500] * pads + [7] * (TEXT_ONLY - 20)])
    batch = {"input_ids": ids, "mm_token_type_ids": (ids == 500).int(), "use_cache": False}
    return batch | (
        {"pixel_values": torch.randn(24 * 32, 1176), "image_grid_thw": torch.tensor([[1, 24, 32]])}
        if image
        else {}
    )


def load_of(batch):
    n, seen = batch["input_ids"].shape[1], int((batch["mm_token_type_ids"] == 1).sum())
    return Load(tokens=n, sample=n, visual=seen, image=seen, answered=n)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29),
        ("Qwen/Qwen3-VL-8B-Instruct", 8.77),
        ("OpenGVLab/InternVL3_5-8B-HF", 8.53),
    ],
)
def test_parameters_of_the_papers_families_follow_from_their_configurations(name, billions):
    s = shape(name)
    assert round(s.total / 1e9, 2) == billions
    assert (
        s.parameters["head"] == s.parameters["embeddings"] == s.vocabulary * s.hidden
        and s.merge == 4
    )
    assert sum(s.matrices.values()) < s.total and s.matrices["embeddings"] == 0


def test_a_hub_id_without_a_commit_is_refused():
    with pytest.raises(OctomedError, match="names no commit"):
        configuration("someone/else")


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("trained", [PARTS, LANGUAGE])
def test_flops_are_what_pytorch_counts(small, image, trained):
    from torch.utils.flop_counter import FlopCounterMode

    from octomed.train.sizing import part_of

    model, s = small
    model.set_attn_implementation("eager")
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in trained)
    batch = inputs(image)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).logits.float().square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    model.zero_grad()
    want = train_flops(
        s, load_of(batch), trained, causal=1.0
    )  # eager attention computes the whole square
    assert forward.get_total_flops() == pytest.approx(want["forward"], rel=0.01)
    assert backward.get_total_flops() == pytest.approx(want["backward"], rel=0.01)


def saved_bytes(model, batch) -> int:
    "Bytes that a forward pass keeps for the backward one, weights and inputs apart, each storage once."
    import torch

    own = {
        p.untyped_storage().data_ptr()
        for p in [
            *model.parameters(),
            *model.buffers(),
            *(b for b in batch.values() if hasattr(b, "untyped_storage")),
        ]
    }
    seen = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = (
                t.untyped_storage().nbytes(),
                t,
            )  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model(**batch).last_hidden_state
    return sum(n for n, _ in seen.values())


@pytest.mark.parametrize("image, trained", [(False, PARTS), (True, PARTS), (True, LANGUAGE)])
def test_activations_are_what_autograd_keeps(small, image, trained):
    from octomed.train.attention import use_packed_attention
    from octomed.train.sizing import part_of

    model, s = small
    use_packed_attention(model, "octomed_split")
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in trained)
    batch = inputs(image)
    assert saved_bytes(model, batch) == pytest.approx(
        activations(s, load_of(batch), False, trained, compute=4, residual=4), rel=0.15
    )


def test_states_are_what_an_optimizer_holds(small):
    import torch

    model, s = small
    for p in model.parameters():
        p.requires_grad_(True)
    opt = torch.optim.AdamW(model.parameters())
    model(**inputs()).logits.square().mean().backward()
    opt.step()
    held = states(s, "fp32 under bf16 autocast")

    def size(ts):
        return sum(t.numel() * t.element_size() for t in ts)

    assert held["weights"] == size(model.parameters()) and held["gradients"] == size(
        p.grad for p in model.parameters() if p.grad is not None
    )
    assert held["optimizer"] == size(t for st in opt.state.values() for t in st.values() if t.ndim)
    opt.zero_grad()


def test_sharding_divides_states_and_a_frozen_tower_has_none():
    s, n = shape("Qwen/Qwen2.5-VL-7B-Instruct"), 8_292_166_656
    one, eight = (states(s, "fp32 under bf16 autocast", d) for d in (1, 8))
    assert (
        one["weights"] == 4 * n
        and one["optimizer"] == 8 * n
        and all(eight[k] == one[k] / 8 for k in ("weights", "gradients", "optimizer"))
    )
    frozen = states(s, "bf16 throughout", 1, LANGUAGE)
    assert frozen["weights"] == 2 * n and frozen["gradients"] == 2 * (
        n - sum(s.parameters[p] for p in (*TOWER, "projector"))
    )


def test_the_verdict_is_the_sum_beside_the_room():
    s, row = shape("Qwen/Qwen2.5-VL-7B-Instruct"), Load(8192, 900, 2000, answered=5500)
    for r in verdicts(s, row):
        devices, room = MACHINES[r["machine"]]
        for kept, key in ((True, "total_checkpointed"), (False, "total")):
            assert r[key] * 1e9 == pytest.approx(memory(s, row, r["state"], devices, kept)["total"])
        assert (r["fits"] != "no") == (r["total_checkpointed"] * 1e9 <= room * (1 - RESERVE))
    fits = {(r["machine"], r["state"]): r["fits"] for r in verdicts(s, row)}
    assert (
        fits["1 × 141 GB", "fp32 under bf16 autocast"] == "no"
    )  # 16 bytes × 8.29 B are 133 GB already
    assert (
        fits["8 × 80 GB", "fp32 under bf16 autocast"] != "no"
        and fits["1 × 141 GB", "bf16, 8-bit optimiser"] != "no"
    )


def test_checkpointing_keeps_a_layers_input():
    s, row = shape("Qwen/Qwen2.5-VL-7B-Instruct"), Load(8192, 900)
    layer = layer_bytes(s.hidden, s.intermediate, s.queries, s.keys, True, 2, 4)
    assert (
        activations(s, row, True) == 8192 * (28 * 4 * 3584 + layer)
        and activations(s, row, False) == 8192 * 28 * layer
    )


def test_hours_by_hand():
    s = shape("Qwen/Qwen2.5-VL-7B-Instruct")
    row, n = Load(1000, 0, answered=1000), s.matrices["language"] + s.matrices["head"]
    assert train_hours(s, row) == pytest.approx(6 * n * 1000 / (989e12 * 0.4) / 3600)
    assert forward_flops(s, replace(row, sample=200))["attention"] == 4 * 28 * 3584 * 200 * 1000 / 2
    rate = 256 * 3.35e12 * 0.5 / (2 * n + 256 * 500 * 2 * 2 * 28 * 512)
    assert decode_rate(s, 500) == pytest.approx(rate)
    assert draw_hours(s, row, 10_000, 500) == pytest.approx(
        (2 * n * 1000 / (989e12 * 0.4) + 10_000 / rate) / 3600
    )


def test_the_gpu_script_runs_small_and_its_settings_compute_the_same(tmp_path):
    import json
    import subprocess
    import sys

    from octomed.core.paths import root

    done = subprocess.run(
        [
            sys.executable,
            str(root() / "tests" / "gpu" / "full_sft.py"),
            "--small",
            "--out",
            str(tmp_path / "r.json"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "r.json").read_text())
    ran, failed = (
        [s for s in found["settings"] if ("failed" in s) == bad] for bad in (False, True)
    )
    assert (
        len(ran) == 4
        and all("bitsandbytes" in s["failed"] for s in failed)
        and found["card"]["versions"]["torch"]
    )
    assert [s["first loss"] for s in ran] == pytest.approx(
        [ran[0]["first loss"]] * 4, rel=1e-3
    )  # attention, checkpoints, chunks and optimisers change no loss
    assert all(
        s["tokens a second"] > 0 and s["GFLOPs a token"] > 0 and s["peak GB"] is None for s in ran
    ) and [len(s["frozen"]) for s in ran] == [0, 3, 0, 0]
    assert (
        ran[1]["GFLOPs a token"] < ran[0]["GFLOPs a token"]
        and ran[1]["estimated GB"] < ran[0]["estimated GB"]
    )
