"""Packing: which rows go together, and whether they stay apart.

Loss and gradient must be those of the padded batch.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import chat

from octomed.core.paths import OctomedError
from octomed.generate.render import PixelCache, Row, collate, render_row
from octomed.train import attention, objective
from octomed.train.attention import (
    ATTENTION,
    check_isolation,
    choose_attention,
    has_varlen,
    use_packed_attention,
)
from octomed.train.launch import Execution
from octomed.train.loop import fit, sum_padded_loss
from octomed.train.objective import linear_cross_entropy, sum_packed_loss
from octomed.train.packing import check_packed, collate_packed, group_packed, pack
from octomed.train.schedule import Schedule

PIXELS = 12_544
CPU = ["sdpa", "octomed_split", "eager"]


@pytest.fixture(scope="session")
def pictures():
    "Pixel hashes of pictures of three shapes."
    from PIL import Image

    from octomed.data.images import store_image

    return [
        store_image(Image.effect_noise(size, 60).convert("RGB"), max_pixels=PIXELS)
        for size in ((120, 100), (60, 170), (90, 90))
    ]


@pytest.fixture
def tiny(student):
    "A copy of the student, in training mode, with attention to be chosen."
    model, processor = student
    return copy.deepcopy(model).train(), processor


def set_attention(model, name):
    if name in ATTENTION:
        assert use_packed_attention(model, name) == name
    else:
        model.set_attn_implementation(name)


def mixture(kind, processor, pictures):
    "Rows of `text`, of `image`, or a `mixture` of both."
    first, second, third = pictures
    text = [
        render_row(processor, chat("which is it ?"), "one " * n + "\\boxed{A}", PIXELS)
        for n in (1, 30, 7)
    ]
    text.append(Row(processor.tokenizer("fever rash one two")["input_ids"], 0, []))
    image = [
        render_row(processor, chat("which is it ?", *names), "two " * n + "\\boxed{B}", PIXELS)
        for n, names in ((3, [first]), (11, [second, third]), (1, [third]))
    ]
    if kind == "mixture":
        return [text[0], image[1], text[1], image[0], text[3], image[2]]
    return text if kind == "text" else image


def gradient(model, groups, loss):
    "Mean loss over the groups' tokens, how many they are, and the gradient."
    model.zero_grad()
    parts = [loss(group) for group in groups]
    trained = sum(n for _, n in parts)
    sum(part for part, _ in parts).div(trained).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(part.item() for part, _ in parts) / trained, trained, grads


def distance(ours, theirs):
    """The largest relative distance of two gradients.

    The gradient of a parameter is compared with a hundredth of the whole, if it is smaller."""
    assert ours.keys() == theirs.keys()

    def flat(grads):
        return torch.cat([grad.flatten() for grad in grads.values()])

    size = float(flat(theirs).norm())
    by_parameter = [
        float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=size / 100)) for n in ours
    ]
    return max(float((flat(ours) - flat(theirs)).norm()) / size, *by_parameter)


def without_text_positions(*args, **options):
    "A packed batch as it must not be: three rows of positions."
    batch = collate_packed(*args, **options)
    return {**batch, "position_ids": batch["position_ids"][1:]}


def without(batch, key):
    return {name: value for name, value in batch.items() if name != key}


# Which rows go together


def first_fit_decreasing(lengths, budget):
    "The usual rule, in plain code."
    bins = []
    for length in sorted(lengths, reverse=True):
        for held in bins:
            if sum(held) + length <= budget:
                held.append(length)
                break
        else:
            bins.append([length])
    return sorted(sorted(held) for held in bins)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(5, 60), st.integers(0, 3))
def test_bins_are_those_of_plain_first_fit_decreasing(lengths, budget, seed):
    packing = pack(lengths, budget, seed)
    fitting = [length for length in lengths if length <= budget]
    bins = sorted(sorted(lengths[i] for i in packing[b]) for b in range(len(packing)))
    assert bins == first_fit_decreasing(fitting, budget)
    assert sorted([*packing.rows, *packing.over_long]) == list(range(len(lengths)))
    assert packing.over_long == [i for i, length in enumerate(lengths) if length > budget]
    assert packing.tokens == sum(fitting)
    if fitting:
        assert math.isclose(packing.useful, sum(fitting) / (len(packing) * budget))


def recipe_lengths(n, cutoff=8192, seed=0):
    drawn = np.random.default_rng(seed).lognormal(math.log(850) - 0.32, 0.8, n).astype(int) + 1
    return drawn[drawn <= cutoff]


@pytest.mark.parametrize("budget", [8192, 16384])
def test_bins_are_full_and_the_seed_decides_their_order(budget):
    lengths = recipe_lengths(200_000)
    packing, again, other = (pack(lengths, budget, seed) for seed in (1, 1, 2))
    assert packing.useful >= 0.995
    assert np.array_equal(packing.rows, again.rows) and np.array_equal(packing.ends, again.ends)
    assert not np.array_equal(packing.rows, other.rows)
    assert max(np.add.reduceat(lengths[packing.rows], packing.ends[:-1])) <= budget
    rows_of_bins = np.add.reduceat(np.ones(len(packing.rows)), packing.ends[:-1])
    half = len(packing) // 2
    early, late = rows_of_bins[:half].mean(), rows_of_bins[half:].mean()
    assert abs(early - late) < 0.1 * early, "bins of short rows are next to each other"


def test_rows_without_a_token_are_refused_and_no_rows_give_no_bins():
    assert len(pack([], 8)) == 0 and pack([], 8).useful == 0
    assert len(pack([9], 8)) == 0 and pack([9], 8).over_long == [0]
    with pytest.raises(OctomedError, match="no token"):
        pack([3, 0], 8)


def test_fault_31_no_row_is_cut_and_over_long_ones_are_counted(tiny, pictures):
    _, processor = tiny
    rows = mixture("mixture", processor, pictures)
    longest = max(len(r.input_ids) for r in rows)
    packing = pack([len(r.input_ids) for r in rows], longest - 1)
    assert packing.over_long == [i for i, r in enumerate(rows) if len(r.input_ids) == longest]
    assert sorted(packing.rows) == [i for i in range(len(rows)) if i not in packing.over_long]
    with pytest.raises(OctomedError, match="cut-off"):
        group_packed(rows, longest - 1)
    groups = group_packed(rows, longest + 20)
    assert sorted(map(id, rows)) == sorted(map(id, itertools.chain.from_iterable(groups)))
    assert all(sum(len(r.input_ids) for r in group) <= longest + 20 for group in groups)
    assert 1 < len(groups) < len(rows)


# One row of tokens


def test_every_sample_keeps_the_positions_that_it_has_alone(tiny, pictures):
    model, processor = tiny
    rows, pixels = mixture("mixture", processor, pictures), PixelCache(processor, PIXELS)
    batch = collate_packed(model, processor, rows, pixels)
    assert "attention_mask" not in batch and batch["use_cache"] is False
    images = [pixels(name) for name in itertools.chain.from_iterable(r.images for r in rows)]
    assert batch["image_grid_thw"].tolist() == [grid[0].tolist() for _, grid in images]
    assert torch.equal(batch["pixel_values"], torch.cat([patches for patches, _ in images]))
    start = 0
    for r in rows:
        padded = collate(processor, [r.input_ids], [r.images], pixels)
        alone, _ = model.model.get_rope_index(
            padded["input_ids"],
            padded["mm_token_type_ids"],
            padded.get("image_grid_thw"),
            attention_mask=padded["attention_mask"],
        )
        part = slice(start, start + len(r.input_ids))
        start += len(r.input_ids)
        assert batch["input_ids"][0, part].tolist() == r.input_ids
        assert torch.equal(batch["position_ids"][1:, :, part], alone)
        assert batch["position_ids"][0, 0, part].tolist() == list(range(len(r.input_ids)))
        if r.images:
            assert not torch.equal(alone[0], alone[1]), "image positions are those of text"


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {**b, "attention_mask": torch.ones_like(b["input_ids"])},
        lambda b: {**b, "position_ids": b["position_ids"][1:]},
        lambda b: without(b, "position_ids"),
        lambda b: without(b, "use_cache"),
        lambda b: {**b, "use_cache": True},
        lambda b: without(b, "mm_token_type_ids"),
        lambda b: {**b, "position_ids": torch.arange(b["input_ids"].shape[1]).expand(4, 1, -1)},
        lambda b: {
            **b,
            "position_ids": torch.cat([b["position_ids"][:1], b["position_ids"][1:] + 1]),
        },
    ],
)
def test_a_batch_that_would_leak_is_refused(tiny, pictures, change):
    model, processor = tiny
    rows = mixture("mixture", processor, pictures)
    batch = collate_packed(model, processor, rows, PixelCache(processor, PIXELS))
    lengths = [len(r.input_ids) for r in rows]
    check_packed(batch, lengths)
    with pytest.raises(OctomedError, match="would leak"):
        check_packed(change(batch), lengths)


# Samples do not see each other


def second_logits(model, processor, rows, pixels, change=lambda b: b):
    "Logits of the second of two packed samples: with the first as it is, and with other tokens."
    first, second = rows
    vocabulary = model.config.text_config.vocab_size
    other_ids = [i + 1 if i > 7 and i + 1 < vocabulary else i for i in first.input_ids]
    logits = []
    for ids in (first.input_ids, other_ids):
        changed = Row(ids, first.prompt, first.images)
        batch = change(collate_packed(model, processor, [changed, second], pixels))
        with torch.no_grad():
            logits.append(model(**batch).logits[0, -len(second.input_ids) :])
    return logits


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_fault_28_another_first_sample_changes_nothing_in_the_second(tiny, pictures, kind, name):
    model, processor = tiny
    set_attention(model, name)
    as_is, other = second_logits(
        model, processor, mixture(kind, processor, pictures)[:2], PixelCache(processor, PIXELS)
    )
    assert torch.equal(as_is, other)


@pytest.mark.parametrize(
    "what, change",
    [
        ("three rows of positions", lambda b: {**b, "position_ids": b["position_ids"][1:]}),
        ("an attention mask", lambda b: {**b, "attention_mask": torch.ones_like(b["input_ids"])}),
        ("a cache", lambda b: {**b, "use_cache": True}),
    ],
)
def test_fault_28_any_other_combination_leaks(tiny, pictures, what, change):
    model, processor = tiny
    model.set_attn_implementation("sdpa")
    as_is, other = second_logits(
        model,
        processor,
        mixture("image", processor, pictures)[:2],
        PixelCache(processor, PIXELS),
        change,
    )
    assert (as_is - other).abs().max() > 1e-3 * as_is.abs().max(), (
        f"{what} did not leak: the test of isolation would not notice"
    )


@pytest.mark.parametrize("name", CPU)
def test_the_model_is_asked_before_the_run(tiny, name):
    model, processor = tiny
    set_attention(model, name)
    assert check_isolation(model, processor) < 1e-5


def test_a_model_whose_samples_see_each_other_is_refused(tiny, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(attention, "collate_packed", without_text_positions)
    with pytest.raises(OctomedError, match="see each other"):
        check_isolation(model, processor)


# Loss and gradient


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("kind", ["text", "image", "mixture"])
@pytest.mark.parametrize("bins", ["one", "several"])
def test_fault_28_packed_equals_unpacked_in_loss_and_gradient(tiny, pictures, kind, bins, name):
    model, processor = tiny
    pixels, rows = PixelCache(processor, PIXELS), mixture(kind, processor, pictures)
    alone = gradient(
        model, [[r] for r in rows], lambda g: sum_padded_loss(model, processor, g, pixels)
    )
    padded = gradient(model, [rows], lambda g: sum_padded_loss(model, processor, g, pixels))
    set_attention(model, name)
    longest = max(len(r.input_ids) for r in rows)
    groups = group_packed(rows, 10_000 if bins == "one" else longest + 25)
    assert (len(groups) == 1) == (bins == "one")
    packed = gradient(
        model, groups, lambda g: sum_packed_loss(model, processor, g, pixels, chunk=5)
    )
    for plain in (alone, padded):
        assert packed[1] == plain[1] and math.isclose(packed[0], plain[0], rel_tol=1e-5)
        assert distance(packed[2], plain[2]) < 1e-5


def test_fault_28_the_comparison_of_gradients_notices_a_leak(tiny, pictures, monkeypatch):
    model, processor = tiny
    pixels, rows = PixelCache(processor, PIXELS), mixture("mixture", processor, pictures)
    plain = gradient(model, [rows], lambda g: sum_padded_loss(model, processor, g, pixels))
    monkeypatch.setattr(objective, "collate_packed", without_text_positions)
    leaked = gradient(model, [rows], lambda g: sum_packed_loss(model, processor, g, pixels))
    assert distance(leaked[2], plain[2]) > 1e-3 and abs(leaked[0] - plain[0]) > 1e-5 * plain[0]


def test_gradient_checkpointing_changes_nothing(tiny, pictures):
    model, processor = tiny
    pixels, rows = PixelCache(processor, PIXELS), mixture("mixture", processor, pictures)
    use_packed_attention(model)
    plain = gradient(model, [rows], lambda g: sum_packed_loss(model, processor, g, pixels))
    model.gradient_checkpointing_enable()
    again = gradient(model, [rows], lambda g: sum_packed_loss(model, processor, g, pixels))
    assert distance(again[2], plain[2]) < 1e-6 and math.isclose(again[0], plain[0], rel_tol=1e-6)


def test_fault_28_a_packed_run_is_the_padded_run(tiny, pictures):
    model, processor = tiny
    rows = mixture("mixture", processor, pictures)

    def log_of(how):
        return fit(
            copy.deepcopy(model),
            processor,
            rows,
            schedule=Schedule(batch=4, lr=1e-3),
            seed=0,
            steps=5,
            max_pixels=PIXELS,
            how=how,
        )

    padded = log_of(Execution(pack=False, micro_tokens=150))
    for how in (Execution(pack=True, micro_tokens=150), Execution(pack=True)):
        for a, b in zip(padded, log_of(how), strict=True):
            assert a["tokens"] == b["tokens"]
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
            assert math.isclose(a["norm"], b["norm"], rel_tol=1e-3)
    assert padded[-1]["loss"] < padded[0]["loss"]


# Which attention


def test_attention_is_chosen_by_device_and_dtype(monkeypatch):
    import transformers.utils

    for device, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cuda", torch.float32),
    ):
        assert choose_attention(device, dtype) == "octomed_split"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert choose_attention("cuda", torch.bfloat16) == (
        "octomed_flash" if has_varlen() else "octomed_split"
    )
    monkeypatch.setattr(attention, "has_varlen", lambda: False)
    assert choose_attention("cuda", torch.bfloat16) == "octomed_split"
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert choose_attention("cuda", torch.bfloat16) == "flash_attention_2"


def test_an_unknown_attention_is_refused(tiny):
    with pytest.raises(OctomedError, match="choose from flash_attention_2"):
        use_packed_attention(tiny[0], "sdpo")


def test_padded_batches_and_generation_stay_what_they_were(tiny, pictures):
    model, processor = tiny
    model.eval()
    pixels, rows = PixelCache(processor, PIXELS), mixture("mixture", processor, pictures)
    prompts = [r.input_ids[: r.prompt] or r.input_ids for r in rows]
    batches = [
        collate(processor, prompts, [r.images for r in rows], pixels, left=True),
        collate(processor, prompts[1:2], [rows[1].images], pixels, left=True),
    ]
    losses, logits, texts = [], [], []
    for name in ("sdpa", "octomed_split"):
        use_packed_attention(model, name)
        with torch.no_grad():
            logits.append([model(**b).logits[:, -1] for b in batches])
        losses.append(sum_padded_loss(model, processor, rows, pixels)[0].item())
        texts.append(
            [model.generate(**b, max_new_tokens=6, do_sample=False).tolist() for b in batches]
        )
    assert math.isclose(*losses, rel_tol=1e-6) and texts[0] == texts[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*logits, strict=True))


def test_the_attention_in_use_is_not_saved_with_the_student(tiny, tmp_path):
    model, _ = tiny
    use_packed_attention(model, "octomed_split")
    model.save_pretrained(tmp_path)
    assert "octomed" not in (tmp_path / "config.json").read_text()


def reference_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    "What the documentation of PyTorch's variable-length attention says, a sample at a time."
    ends, outputs = cu_seq_q.tolist(), []
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
    assert max_q == max(b - a for a, b in itertools.pairwise(ends))
    assert ends[0] == 0 and ends[-1] == len(query)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    for a, b in itertools.pairwise(ends):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.skipif(
    not has_varlen(),
    reason="this PyTorch has no variable-length attention with grouped heads",
)
def test_variable_length_kernel_is_asked_for_the_same_thing(tiny, pictures, monkeypatch):
    import torch.nn.attention.varlen as varlen

    model, processor = tiny
    windows = []

    def watched(*args, **options):
        windows.append(options["window_size"])
        return reference_varlen(*args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    pixels, rows = PixelCache(processor, PIXELS), mixture("mixture", processor, pictures)
    plain = gradient(model, [rows], lambda g: sum_padded_loss(model, processor, g, pixels))
    use_packed_attention(model, "octomed_flash")
    packed = gradient(model, [rows], lambda g: sum_packed_loss(model, processor, g, pixels))
    layers, blocks = model.config.text_config.num_hidden_layers, model.config.vision_config.depth
    assert windows.count((-1, 0)) == layers, "the language model does not go through it"
    assert windows.count((-1, -1)) == blocks, "the vision tower does not go through it"
    assert math.isclose(packed[0], plain[0], rel_tol=1e-5) and distance(packed[2], plain[2]) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [n for n in ATTENTION if n != "sdpa"])
def test_fault_28_attention_of_a_gpu_equals_block_masks(tiny, pictures, name):
    from transformers.utils import is_flash_attn_2_available

    if name == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attention is not installed")
    model, processor = tiny
    model.cuda()
    pixels, rows = PixelCache(processor, PIXELS), mixture("mixture", processor, pictures)
    use_packed_attention(model, "sdpa")
    plain = gradient(model, [rows], lambda g: sum_packed_loss(model, processor, g, pixels))
    use_packed_attention(model, name)
    check_isolation(model, processor)
    packed = gradient(model, [rows], lambda g: sum_packed_loss(model, processor, g, pixels))
    assert math.isclose(packed[0], plain[0], rel_tol=1e-2) and distance(packed[2], plain[2]) < 5e-2


# The loss without its logits


@pytest.mark.parametrize("tokens, chunk", [(1, 4), (7, 3), (8, 4), (33, 1), (5, 100)])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",)])
def test_fault_32_chunked_loss_equals_the_eager_one(tokens, chunk, frozen):
    torch.manual_seed(tokens)
    hidden, weight, target = (
        torch.randn(tokens, 16),
        torch.randn(90, 16),
        torch.randint(90, (tokens,)),
    )
    inputs = {"hidden": hidden, "weight": weight}
    wanted = [x.requires_grad_() for name, x in inputs.items() if name not in frozen]
    eager = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, target, chunk)
    assert math.isclose(eager.item(), ours.item(), rel_tol=1e-5)
    gradients = (torch.autograd.grad(loss / 3, wanted) for loss in (eager, ours))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()


def test_fault_32_logits_are_never_whole(monkeypatch):
    sizes, linear = [], torch.nn.functional.linear

    def watched(hidden, *args):
        sizes.append(len(hidden))
        return linear(hidden, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.randint(50, (100,)), chunk=16).backward()
    assert max(sizes) == 16 and sum(sizes) == 100


def test_fault_32_half_precision_sums_its_weight_gradient_in_full():
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(2048, 16), torch.randn(90, 16), torch.randint(90, (2048,))

    def gradient(dtype, chunk):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        return torch.autograd.grad(linear_cross_entropy(h, w, target, chunk), w)[0].float()

    exact, whole, parts = (
        gradient(torch.float32, 2048),
        gradient(torch.bfloat16, 2048),
        gradient(torch.bfloat16, 8),
    )
    assert (parts - exact).norm() < 1.2 * (whole - exact).norm()


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"),
    reason="this PyTorch has no linear_cross_entropy",
)
def test_fault_32_equals_the_one_of_pytorch():
    hidden, weight, target = (
        torch.randn(20, 8, requires_grad=True),
        torch.randn(30, 8, requires_grad=True),
        torch.randint(30, (20,)),
    )
    theirs = torch.nn.functional.linear_cross_entropy(hidden, weight, target, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, target, 6)
    assert math.isclose(theirs.item(), ours.item(), rel_tol=1e-5)
    gradients = (torch.autograd.grad(loss, (hidden, weight)) for loss in (theirs, ours))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
