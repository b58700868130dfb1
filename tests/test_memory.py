"""Memory and arithmetic of a student.

They must be what a real model's configuration, PyTorch's own counter and its saved tensors say.
"""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from toys import shrink_configuration

from octomed.core.paths import OctomedError, root
from octomed.train.attention import use_packed_attention
from octomed.train.sizing import (
    LANGUAGE,
    MACHINES,
    PARTS,
    RESERVE,
    TOWER,
    Load,
    activation_bytes,
    check_fit,
    decoding_rate,
    estimate_drawing_hours,
    estimate_training_hours,
    forward_flops,
    layer_bytes,
    load_configuration,
    load_shape,
    measure_shape,
    memory_bytes,
    part_of,
    state_bytes,
    training_flops,
)

HUB_ID = "Qwen/Qwen2.5-VL-7B-Instruct"
TEXT_TOKENS = 48


@pytest.fixture(scope="module")
def small():
    """(model, shape): the paper's class at a size that is counted in no time.

    The text layers have an attention width of their own."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1, 3],
    }
    torch.manual_seed(0)
    c = shrink_configuration(load_configuration(HUB_ID), text, vision)
    model = Qwen2_5_VLForConditionalGeneration(c)
    return model, measure_shape(model)


def inputs(image=True):
    "One sample: an image of 24 × 32 patches, which windows of 8 × 8 divide, between two texts."
    import torch

    pads = 24 * 32 // 4 if image else 0
    ids = torch.tensor([[5] * 20 + [500] * pads + [7] * (TEXT_TOKENS - 20)])
    batch = {"input_ids": ids, "mm_token_type_ids": (ids == 500).int(), "use_cache": False}
    if image:
        batch["pixel_values"] = torch.randn(24 * 32, 1176)
        batch["image_grid_thw"] = torch.tensor([[1, 24, 32]])
    return batch


def load_of(batch):
    tokens, visual = batch["input_ids"].shape[1], int((batch["mm_token_type_ids"] == 1).sum())
    return Load(tokens=tokens, sample=tokens, visual=visual, image=visual, answered=tokens)


def train_only(model, trained):
    "Freeze all parts but these."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)


@pytest.mark.parametrize(
    "name, billions",
    [
        (HUB_ID, 8.29),
        ("Qwen/Qwen3-VL-8B-Instruct", 8.77),
        ("OpenGVLab/InternVL3_5-8B-HF", 8.53),
    ],
)
def test_parameters_of_the_papers_families_follow_from_their_configurations(name, billions):
    s = load_shape(name)
    assert round(s.total / 1e9, 2) == billions
    assert s.parameters["head"] == s.parameters["embeddings"] == s.vocabulary * s.hidden
    assert s.merge == 4
    assert sum(s.matrices.values()) < s.total and s.matrices["embeddings"] == 0


def test_a_hub_id_without_a_commit_is_refused():
    with pytest.raises(OctomedError, match="names no commit"):
        load_configuration("someone/else")


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("trained", [PARTS, LANGUAGE])
def test_flops_are_what_pytorch_counts(small, image, trained):
    from torch.utils.flop_counter import FlopCounterMode

    model, s = small
    model.set_attn_implementation("eager")
    train_only(model, trained)
    batch = inputs(image)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).logits.float().square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    model.zero_grad()
    # eager attention computes the whole square
    ours = training_flops(s, load_of(batch), trained, causal=1.0)
    assert forward.get_total_flops() == pytest.approx(ours["forward"], rel=0.01)
    assert backward.get_total_flops() == pytest.approx(ours["backward"], rel=0.01)


def saved_bytes(model, batch) -> int:
    """Bytes that a forward pass keeps for the backward one.

    Weights and inputs do not count, and each storage counts once."""
    import torch

    inputs = [value for value in batch.values() if torch.is_tensor(value)]
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers(), *inputs)
    }
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # the tensor is held, so that no address is used twice
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(**batch)
    del output
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("image, trained", [(False, PARTS), (True, PARTS), (True, LANGUAGE)])
def test_activations_are_what_autograd_keeps(small, image, trained):
    model, s = small
    use_packed_attention(model, "octomed_split")
    train_only(model, trained)
    batch = inputs(image)
    ours = activation_bytes(
        s, load_of(batch), checkpointing=False, trained=trained, compute=4, residual=4
    )
    assert saved_bytes(model, batch) == pytest.approx(ours, rel=0.15)


def test_states_are_what_an_optimizer_holds(small):
    import torch

    model, s = small
    for p in model.parameters():
        p.requires_grad_(True)
    opt = torch.optim.AdamW(model.parameters())
    model(**inputs()).logits.square().mean().backward()
    opt.step()
    held = state_bytes(s, "fp32 under bf16 autocast")

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    moments = itertools.chain.from_iterable(state.values() for state in opt.state.values())
    assert held["weights"] == size(model.parameters()) and held["gradients"] == size(gradients)
    assert held["optimizer"] == size(t for t in moments if t.ndim)
    opt.zero_grad()


def test_sharding_divides_states_and_a_frozen_tower_has_none():
    s, n = load_shape(HUB_ID), 8_292_166_656
    one, eight = (state_bytes(s, "fp32 under bf16 autocast", devices) for devices in (1, 8))
    assert one["weights"] == 4 * n and one["optimizer"] == 8 * n
    assert all(eight[k] == one[k] / 8 for k in ("weights", "gradients", "optimizer"))
    frozen = state_bytes(s, "bf16 throughout", trained=LANGUAGE)
    not_trained = sum(s.parameters[part] for part in (*TOWER, "projector"))
    assert frozen["weights"] == 2 * n and frozen["gradients"] == 2 * (n - not_trained)


def test_what_fits_is_the_sum_compared_with_the_device():
    s, row = load_shape(HUB_ID), Load(8192, 900, visual=2000, answered=5500)
    for r in check_fit(s, row):
        devices, room = MACHINES[r["machine"]]
        for checkpointing, key in ((True, "total_checkpointed"), (False, "total")):
            needed = memory_bytes(s, row, r["state"], devices=devices, checkpointing=checkpointing)
            assert r[key] * 1e9 == pytest.approx(needed["total"])
        assert (r["fits"] != "no") == (r["total_checkpointed"] * 1e9 <= room * (1 - RESERVE))
    fits = {(r["machine"], r["state"]): r["fits"] for r in check_fit(s, row)}
    # 16 bytes × 8.29 B are 133 GB already
    assert fits["1 × 141 GB", "fp32 under bf16 autocast"] == "no"
    assert fits["8 × 80 GB", "fp32 under bf16 autocast"] != "no"
    assert fits["1 × 141 GB", "bf16, 8-bit optimiser"] != "no"


def test_checkpointing_keeps_a_layers_input():
    s, row = load_shape(HUB_ID), Load(8192, 900)
    layer = layer_bytes(
        hidden=s.hidden,
        intermediate=s.intermediate,
        queries=s.queries,
        keys=s.keys,
        gated=True,
        compute=2,
        residual=4,
    )
    assert activation_bytes(s, row, True) == 8192 * (28 * 4 * 3584 + layer)
    assert activation_bytes(s, row, False) == 8192 * 28 * layer


def test_hours_by_hand():
    s = load_shape(HUB_ID)
    row, n = Load(1000, 0, answered=1000), s.matrices["language"] + s.matrices["head"]
    assert estimate_training_hours(s, row) == pytest.approx(6 * n * 1000 / (989e12 * 0.4) / 3600)
    assert forward_flops(s, replace(row, sample=200))["attention"] == 4 * 28 * 3584 * 200 * 1000 / 2
    rate = 256 * 3.35e12 * 0.5 / (2 * n + 256 * 500 * 2 * 2 * 28 * 512)
    assert decoding_rate(s, 500) == pytest.approx(rate)
    assert estimate_drawing_hours(s, row, responses=10_000, context=500) == pytest.approx(
        (2 * n * 1000 / (989e12 * 0.4) + 10_000 / rate) / 3600
    )


def test_the_gpu_script_runs_small_and_its_settings_compute_the_same(tmp_path):
    script, out = root() / "tests" / "gpu" / "full_sft.py", tmp_path / "results.json"
    command = [sys.executable, str(script), "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())
    ran = [s for s in results["settings"] if "failed" not in s]
    failed = [s for s in results["settings"] if "failed" in s]
    assert len(ran) == 4 and all("bitsandbytes" in s["failed"] for s in failed)
    assert results["card"]["versions"]["torch"]
    # attention, checkpoints, chunks and optimisers change no loss
    assert [s["first loss"] for s in ran] == pytest.approx([ran[0]["first loss"]] * 4, rel=1e-3)
    assert all(s["tokens a second"] > 0 and s["GFLOPs a token"] > 0 for s in ran)
    assert all(s["peak GB"] is None for s in ran)
    assert [len(s["frozen"]) for s in ran] == [0, 3, 0, 0]
    assert ran[1]["GFLOPs a token"] < ran[0]["GFLOPs a token"]
    assert ran[1]["estimated GB"] < ran[0]["estimated GB"]
