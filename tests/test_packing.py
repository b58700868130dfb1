"Packing: which rows go together, whether they stay apart, and whether loss and gradient are those of the padded batch."

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octomed.core.paths import OctomedError
from octomed.generate.render import Pixels, Row, collate, row
from octomed.train import packing
from octomed.train.attention import (
    ATTENTION,
    check_isolation,
    choose_attention,
    use_packed_attention,
)
from octomed.train.loop import loss_sum
from octomed.train.objective import linear_cross_entropy, packed_loss_sum
from octomed.train.packing import check_packed, pack, packed_batch, packed_groups

PIXELS = 12_544
CPU = ["sdpa", "octomed_split", "eager"]


def chat(text, *images):
    return [
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": i} for i in images),
                {"type": "text", "text": text},
            ],
        }
    ]


@pytest.fixture(scope="session")
def pictures():
    "Pixel hashes of pictures of three shapes."
    from PIL import Image

    from octomed.data.images import intake

    return [
        intake(Image.effect_noise(size, 60).convert("RGB"), max_pixels=PIXELS)
        for size in ((120, 100), (60, 170), (90, 90))
    ]


@pytest.fixture
def tiny(student):
    "A copy of the student, in training mode, with attention to be chosen."
    import copy

    model, processor = student
    return copy.deepcopy(model).train(), processor


def set_attention(model, name):
    if name in ATTENTION:
        assert use_packed_attention(model, name) == name
    else:
        model.set_attn_implementation(name)


def mixture(kind, processor, pictures):
    a, b, c = pictures
    text = [
        row(processor, chat("which is it ?"), "one " * n + "\\boxed{A}", PIXELS) for n in (1, 30, 7)
    ] + [Row(processor.tokenizer("fever rash one two")["input_ids"], 0, [])]
    image = [
        row(processor, chat("which is it ?", *i), "two " * n + "\\boxed{B}", PIXELS)
        for n, i in ((3, [a]), (11, [b, c]), (1, [c]))
    ]
    return {
        "text": text,
        "image": image,
        "mixture": [text[0], image[1], text[1], image[0], text[3], image[2]],
    }[kind]


def gradient(model, groups, loss):
    "Mean loss over the groups' tokens, and its gradient."
    model.zero_grad()
    parts = [loss(g) for g in groups]
    trained = sum(n for _, n in parts)
    sum(l for l, _ in parts).div(trained).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(l.item() for l, _ in parts) / trained, trained, grads


def distance(a, b):
    "The largest relative distance of two gradients: of the whole, and of each parameter beside a hundredth of the whole."
    assert a.keys() == b.keys()

    def whole(g):
        return torch.cat([x.flatten() for x in g.values()])

    size = float(whole(b).norm())
    return max(
        float((whole(a) - whole(b)).norm()) / size,
        *(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=size / 100)) for n in a),
    )


# Which rows go together


def first_fit_decreasing(lengths, budget):
    bins = []
    for l in sorted(lengths, reverse=True):
        for b in bins:
            if sum(b) + l <= budget:
                b.append(l)
                break
        else:
            bins.append([l])
    return sorted(sorted(b) for b in bins)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(5, 60), st.integers(0, 3))
def test_bins_are_those_of_plain_first_fit_decreasing(lengths, budget, seed):
    p = pack(lengths, budget, seed)
    fit = [l for l in lengths if l <= budget]
    assert sorted(sorted(lengths[i] for i in p[b]) for b in range(len(p))) == first_fit_decreasing(
        fit, budget
    )
    assert sorted([*p.rows, *p.over_long]) == list(range(len(lengths))) and p.over_long == [
        i for i, l in enumerate(lengths) if l > budget
    ]
    assert p.tokens == sum(fit) and (
        not fit or math.isclose(p.useful, sum(fit) / (len(p) * budget))
    )


def recipe_lengths(n, cutoff=8192, seed=0):
    drawn = np.random.default_rng(seed).lognormal(math.log(850) - 0.32, 0.8, n).astype(int) + 1
    return drawn[drawn <= cutoff]


@pytest.mark.parametrize("budget", [8192, 16384])
def test_bins_are_full_and_the_seed_decides_their_order(budget):
    lengths = recipe_lengths(200_000)
    p, again, other = pack(lengths, budget, 1), pack(lengths, budget, 1), pack(lengths, budget, 2)
    assert p.useful >= 0.995
    assert (
        np.array_equal(p.rows, again.rows)
        and np.array_equal(p.ends, again.ends)
        and not np.array_equal(p.rows, other.rows)
    )
    assert max(np.add.reduceat(lengths[p.rows], p.ends[:-1])) <= budget
    halves = np.add.reduceat(np.ones(len(p.rows)), p.ends[:-1])
    early, late = halves[: len(p) // 2].mean(), halves[len(p) // 2 :].mean()
    assert abs(early - late) < 0.1 * early, "bins of short rows stand together"


def test_rows_without_a_token_are_refused_and_no_rows_give_no_bins():
    assert len(pack([], 8)) == 0 and pack([], 8).useful == 0
    assert len(pack([9], 8)) == 0 and pack([9], 8).over_long == [0]
    with pytest.raises(OctomedError, match="no token"):
        pack([3, 0], 8)


def test_fault_31_no_row_is_cut_and_over_long_ones_are_counted(tiny, pictures):
    _, processor = tiny
    rows = mixture("mixture", processor, pictures)
    longest = max(len(r.input_ids) for r in rows)
    p = pack([len(r.input_ids) for r in rows], longest - 1)
    assert p.over_long == [i for i, r in enumerate(rows) if len(r.input_ids) == longest]
    assert sorted(p.rows) == [i for i in range(len(rows)) if i not in p.over_long]
    with pytest.raises(OctomedError, match="cut-off"):
        packed_groups(rows, longest - 1)
    groups = packed_groups(rows, longest + 20)
    assert sorted(map(id, rows)) == sorted(id(r) for g in groups for r in g) and all(
        sum(len(r.input_ids) for r in g) <= longest + 20 for g in groups
    )
    assert 1 < len(groups) < len(rows)


# One row of tokens


def test_every_sample_keeps_the_positions_that_it_has_alone(tiny, pictures):
    model, processor = tiny
    rows, pixels = mixture("mixture", processor, pictures), Pixels(processor, PIXELS)
    batch, at = packed_batch(model, processor, rows, pixels), 0
    assert "attention_mask" not in batch and batch["use_cache"] is False
    assert batch["image_grid_thw"].tolist() == [
        pixels(h)[1][0].tolist() for r in rows for h in r.images
    ]
    assert torch.equal(
        batch["pixel_values"], torch.cat([pixels(h)[0] for r in rows for h in r.images])
    )
    for r in rows:
        one = collate(processor, [r.input_ids], [r.images], pixels)
        alone, _ = model.model.get_rope_index(
            one["input_ids"],
            one["mm_token_type_ids"],
            one.get("image_grid_thw"),
            attention_mask=one["attention_mask"],
        )
        part = slice(at, at := at + len(r.input_ids))
        assert batch["input_ids"][0, part].tolist() == r.input_ids
        assert torch.equal(batch["position_ids"][1:, :, part], alone)
        assert batch["position_ids"][0, 0, part].tolist() == list(range(len(r.input_ids)))
        assert r.images == [] or not torch.equal(alone[0], alone[1]), (
            "image positions are those of text"
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {**b, "attention_mask": torch.ones_like(b["input_ids"])},
        lambda b: {**b, "position_ids": b["position_ids"][1:]},
        lambda b: {k: v for k, v in b.items() if k != "position_ids"},
        lambda b: {k: v for k, v in b.items() if k != "use_cache"},
        lambda b: {**b, "use_cache": True},
        lambda b: {k: v for k, v in b.items() if k != "mm_token_type_ids"},
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
    batch, lengths = (
        packed_batch(model, processor, rows, Pixels(processor, PIXELS)),
        [len(r.input_ids) for r in rows],
    )
    check_packed(batch, lengths)
    with pytest.raises(OctomedError, match="would leak"):
        check_packed(change(batch), lengths)


# Samples do not see each other


def second_logits(model, processor, rows, pixels, change=lambda b: b):
    "Logits of the second of two packed samples, with the first one as it is and with other tokens in it."
    out = []
    for step in (0, 1):
        first = Row(
            [
                (i + step) if i > 7 and i + 1 < model.config.text_config.vocab_size else i
                for i in rows[0].input_ids
            ],
            rows[0].prompt,
            rows[0].images,
        )
        batch = change(packed_batch(model, processor, [first, rows[1]], pixels))
        with torch.no_grad():
            out.append(model(**batch).logits[0, -len(rows[1].input_ids) :])
    return out


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_fault_28_another_first_sample_changes_nothing_in_the_second(tiny, pictures, kind, name):
    model, processor = tiny
    set_attention(model, name)
    as_is, other = second_logits(
        model, processor, mixture(kind, processor, pictures)[:2], Pixels(processor, PIXELS)
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
        Pixels(processor, PIXELS),
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
    right = packing.packed_batch
    monkeypatch.setattr(
        packing,
        "packed_batch",
        lambda *a: {**(b := right(*a)), "position_ids": b["position_ids"][1:]},
    )
    with pytest.raises(OctomedError, match="see each other"):
        check_isolation(model, processor)


# Loss and gradient


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("kind", ["text", "image", "mixture"])
@pytest.mark.parametrize("bins", ["one", "several"])
def test_fault_28_packed_equals_unpacked_in_loss_and_gradient(tiny, pictures, kind, bins, name):
    model, processor = tiny
    pixels, rows = Pixels(processor, PIXELS), mixture(kind, processor, pictures)
    alone = gradient(model, [[r] for r in rows], lambda g: loss_sum(model, processor, g, pixels))
    padded = gradient(model, [rows], lambda g: loss_sum(model, processor, g, pixels))
    set_attention(model, name)
    groups = packed_groups(
        rows, 10_000 if bins == "one" else max(len(r.input_ids) for r in rows) + 25
    )
    assert (len(groups) == 1) == (bins == "one")
    packed = gradient(
        model, groups, lambda g: packed_loss_sum(model, processor, g, pixels, chunk=5)
    )
    for plain in (alone, padded):
        assert packed[1] == plain[1] and math.isclose(packed[0], plain[0], rel_tol=1e-5)
        assert distance(packed[2], plain[2]) < 1e-5


def test_fault_28_the_comparison_of_gradients_notices_a_leak(tiny, pictures, monkeypatch):
    model, processor = tiny
    pixels, rows = Pixels(processor, PIXELS), mixture("mixture", processor, pictures)
    plain = gradient(model, [rows], lambda g: loss_sum(model, processor, g, pixels))
    right = packing.packed_batch
    monkeypatch.setattr(
        packing,
        "packed_batch",
        lambda *a: {**(b := right(*a)), "position_ids": b["position_ids"][1:]},
    )
    leaked = gradient(model, [rows], lambda g: packed_loss_sum(model, processor, g, pixels))
    assert distance(leaked[2], plain[2]) > 1e-3 and abs(leaked[0] - plain[0]) > 1e-5 * plain[0]


def test_gradient_checkpointing_changes_nothing(tiny, pictures):
    model, processor = tiny
    pixels, rows = Pixels(processor, PIXELS), mixture("mixture", processor, pictures)
    use_packed_attention(model)
    plain = gradient(model, [rows], lambda g: packed_loss_sum(model, processor, g, pixels))
    model.gradient_checkpointing_enable()
    again = gradient(model, [rows], lambda g: packed_loss_sum(model, processor, g, pixels))
    assert distance(again[2], plain[2]) < 1e-6 and math.isclose(again[0], plain[0], rel_tol=1e-6)


def test_fault_28_a_packed_run_is_the_padded_run(tiny, pictures):
    import copy

    from octomed.train.launch import Execution
    from octomed.train.loop import fit
    from octomed.train.schedule import Schedule

    model, processor = tiny
    rows, runs = mixture("mixture", processor, pictures), []
    for how in (
        Execution(pack=False, micro_tokens=150),
        Execution(pack=True, micro_tokens=150),
        Execution(pack=True),
    ):
        runs.append(
            fit(
                copy.deepcopy(model),
                processor,
                rows,
                Schedule(batch=4, lr=1e-3),
                0,
                5,
                PIXELS,
                how=how,
            )
        )
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=False):
            assert (
                a["tokens"] == b["tokens"]
                and math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
                and math.isclose(a["norm"], b["norm"], rel_tol=1e-3)
            )
    assert runs[0][-1]["loss"] < runs[0][0]["loss"]


# Which attention


def test_attention_is_chosen_by_device_and_dtype(monkeypatch):
    import transformers.utils

    assert (
        choose_attention("cpu", torch.float32)
        == choose_attention("cpu", torch.bfloat16)
        == choose_attention("cuda", torch.float32)
        == "octomed_split"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert choose_attention("cuda", torch.bfloat16) == (
        "octomed_flash" if packing.has_varlen() else "octomed_split"
    )
    monkeypatch.setattr(packing, "has_varlen", lambda: False)
    assert choose_attention("cuda", torch.bfloat16) == "octomed_split"
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert choose_attention("cuda", torch.bfloat16) == "flash_attention_2"


def test_an_unknown_attention_is_refused(tiny):
    with pytest.raises(OctomedError, match="choose from flash_attention_2"):
        use_packed_attention(tiny[0], "sdpo")


def test_padded_batches_and_generation_stay_what_they_were(tiny, pictures):
    model, processor = tiny
    model.eval()
    pixels, rows = Pixels(processor, PIXELS), mixture("mixture", processor, pictures)
    prompts = [r.input_ids[: r.prompt] or r.input_ids for r in rows]
    results = []
    for name in ("sdpa", "octomed_split"):
        use_packed_attention(model, name)
        batches = [
            collate(processor, prompts, [r.images for r in rows], pixels, left=True),
            collate(processor, prompts[1:2], [rows[1].images], pixels, left=True),
        ]
        with torch.no_grad():
            logits = [model(**b).logits[:, -1] for b in batches]
        results.append(
            (
                loss_sum(model, processor, rows, pixels)[0].item(),
                logits,
                [model.generate(**b, max_new_tokens=6, do_sample=False).tolist() for b in batches],
            )
        )
    (loss, logits, texts), (loss2, logits2, texts2) = results
    assert (
        math.isclose(loss, loss2, rel_tol=1e-6)
        and texts == texts2
        and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(logits, logits2, strict=False))
    )


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
    "What PyTorch's variable-length attention says it does, a sample at a time."
    ends, out = cu_seq_q.tolist(), []
    assert (
        torch.equal(cu_seq_q, cu_seq_k)
        and cu_seq_q.dtype == torch.int32
        and max_q == max(b - a for a, b in itertools.pairwise(ends))
    )
    assert (
        ends[0] == 0 and ends[-1] == len(query) and enable_gqa == (query.shape[1] != key.shape[1])
    )
    for a, b in itertools.pairwise(ends):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    return torch.cat(out)


@pytest.mark.skipif(
    not packing.has_varlen(),
    reason="this PyTorch has no variable-length attention with grouped heads",
)
def test_variable_length_kernel_is_asked_for_the_same_thing(tiny, pictures, monkeypatch):
    import torch.nn.attention.varlen as varlen

    model, processor = tiny
    calls = []
    monkeypatch.setattr(
        varlen,
        "varlen_attn",
        lambda *a, **k: calls.append(k["window_size"]) or reference_varlen(*a, **k),
    )
    pixels, rows = Pixels(processor, PIXELS), mixture("mixture", processor, pictures)
    plain = gradient(model, [rows], lambda g: loss_sum(model, processor, g, pixels))
    use_packed_attention(model, "octomed_flash")
    packed = gradient(model, [rows], lambda g: packing.packed_loss_sum(model, processor, g, pixels))
    layers, blocks = model.config.text_config.num_hidden_layers, model.config.vision_config.depth
    assert calls.count((-1, 0)) == layers and calls.count((-1, -1)) == blocks, (
        "language model and vision tower both go through it"
    )
    assert math.isclose(packed[0], plain[0], rel_tol=1e-5) and distance(packed[2], plain[2]) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [n for n in ATTENTION if n != "sdpa"])
def test_fault_28_attention_of_a_gpu_equals_block_masks(tiny, pictures, name):
    from transformers.utils import is_flash_attn_2_available

    if name == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attention is not installed")
    model, processor = tiny
    model.cuda()
    pixels, rows = Pixels(processor, PIXELS), mixture("mixture", processor, pictures)
    use_packed_attention(model, "sdpa")
    plain = gradient(model, [rows], lambda g: packed_loss_sum(model, processor, g, pixels))
    use_packed_attention(model, name)
    check_isolation(model, processor)
    packed = gradient(model, [rows], lambda g: packed_loss_sum(model, processor, g, pixels))
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
    of = {"hidden": hidden, "weight": weight}
    wanted = [x.requires_grad_() for n, x in of.items() if n not in frozen]
    eager = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    ours = linear_cross_entropy(hidden, weight, target, chunk)
    assert math.isclose(eager.item(), ours.item(), rel_tol=1e-5)
    for a, b in zip(
        torch.autograd.grad(eager / 3, wanted), torch.autograd.grad(ours / 3, wanted), strict=False
    ):
        assert (a - b).norm() < 1e-5 * a.norm()


def test_fault_32_logits_are_never_whole(monkeypatch):
    seen, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a, **k: seen.append(len(a[0])) or linear(*a, **k)
    )
    hidden, weight = torch.randn(100, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.randint(50, (100,)), chunk=16).backward()
    assert max(seen) == 16 and sum(seen) == 100


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
    for a, b in zip(
        torch.autograd.grad(theirs, (hidden, weight)),
        torch.autograd.grad(ours, (hidden, weight)),
        strict=False,
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
