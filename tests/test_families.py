"Three families of models, one code: prompts, pixels, training, answers; and the section that compares them."

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from octomed.clinic import students as S
from octomed.core.paths import OctomedError
from octomed.core.recipe import CATEGORIES, load_recipe
from octomed.data.images import image_path, intake, load_image, stored
from octomed.data.resize import family_of, image_grid, processor_arguments, visual_tokens
from octomed.distill.sampling import on_grid
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.engines import Request, Sampling
from octomed.generate.render import Pixels, chat_text, encode, render_rows, row
from octomed.train.loop import loss_sum
from octomed.train.objective import packed_loss_sum
from octomed.train.packing import packed_batch
from octomed.train.students import load_student, save_student

PIXELS, WIDE = (
    12_544,
    6 * 112 * 112,
)  # the clinic's limit, and one at which InternVL cuts tiles of 112 pixels
WORDS = "Please reason step - by - step , and put your final answer within \\boxed{ } . which is it ? one two three fever rash the option is user assistant : - ."
PHOTO = Image.effect_noise((300, 200), 60).convert("RGB").resize((300, 200))
DRAWING = Image.effect_noise((112, 112), 60).convert("RGB")
EXAMPLES = Path(__file__).parents[1] / "data" / "examples"
FAMILY = pytest.mark.parametrize("family", S.MARKERS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "family → (model, processor, folder in which both are saved)."

    def one(family):
        model, processor = S.build_student(
            [WORDS, WORDS.lower()], S.Size(64, 2, 2, 1, 64, 32, 2), 0, PIXELS, family
        )
        save_student(folder := tmp_path_factory.mktemp(family), model.eval(), processor, [])
        return model, processor, folder

    return {f: one(f) for f in S.MARKERS}


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


def some_rows(processor):
    names = intake(DRAWING, PIXELS), intake(PHOTO, PIXELS)
    stored_for = family_of(processor)
    for image in (DRAWING, PHOTO):
        intake(image, PIXELS, stored_for)
    asked = [
        ("which is it ?", names[:1], "<think>the fever</think>\n\n\\boxed{B}"),
        ("fever ?", (), "the rash"),
        ("which is it ? one two three", names, "\\boxed{A}"),
    ]
    return [
        row(processor, chat(text, *images), response, PIXELS) for text, images, response in asked
    ]


@FAMILY
@pytest.mark.parametrize("limit", [PIXELS, WIDE])
def test_fault_39_tokens_pixels_and_grid_are_the_familys_own(family, limit, built):
    _, processor, _ = built[family]
    name, grid = intake(PHOTO, limit, family_of(processor)), family_of(processor)
    kept, messages = load_image(name, limit, grid), chat("which is it ?", name, name)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    theirs = processor(
        text=[text], images=[kept, kept], return_tensors="pt", **processor_arguments(limit, grid)
    )
    ours = encode(processor, [chat_text(processor, messages, limit)], [[name, name]], limit)
    assert set(ours) - {"mm_token_type_ids"} == set(theirs) - {"mm_token_type_ids"}
    for key in ours:
        assert torch.equal(
            theirs[key].long() if key == "mm_token_type_ids" else theirs[key],
            ours[key].long() if key == "mm_token_type_ids" else ours[key],
        ), key
    told = processor(
        text=[text], images=[PHOTO, PHOTO], return_tensors="pt", **processor_arguments(limit, grid)
    )
    assert (
        torch.equal(told["input_ids"], ours["input_ids"])
        and told["pixel_values"].shape == ours["pixel_values"].shape
    ), "the image as it came has the same grid"
    trained = row(processor, messages, "\\boxed{A}", limit)
    assert trained.input_ids[: trained.prompt] == ours["input_ids"][0].tolist()
    assert ours["input_ids"][0].tolist().count(processor.image_token_id) == 2 * visual_tokens(
        200, 300, limit, grid
    )


def test_internvl_cuts_tiles_and_adds_the_view_of_the_whole(built):
    _, processor, _ = built["internvl"]
    family = family_of(processor)
    assert (
        family == "internvl-112"
        and image_grid(*load_image(intake(PHOTO, WIDE, family), WIDE, family).size[::-1], family)[0]
        == 7
    )
    patches, grid = Pixels(processor, WIDE)(intake(PHOTO, WIDE, family))
    assert patches.shape == (7, 3, 112, 112) and grid.tolist() == [[7, 8, 8]]


@FAMILY
def test_the_prompt_has_the_familys_own_markers(family, built):
    _, processor, _ = built[family]
    text = chat_text(processor, chat("which is it ?", intake(DRAWING, PIXELS)), PIXELS)
    n = visual_tokens(112, 112, PIXELS, family_of(processor))
    image = {"internvl": "<img>" + "<IMG_CONTEXT>" * n + "</img>\n"}.get(
        family, "<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>"
    )
    assert text == f"<|im_start|>user\n{image}which is it ?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.tokenize(text)[:3] == [
        "<|im_start|>",
        "user",
        "\n",
    ] and "<|unk|>" not in processor.tokenizer.tokenize(text)


@FAMILY
def test_fault_27_a_padded_micro_batch_has_the_gradient_of_its_rows(family, built):
    model, processor, _ = built[family]
    rows, pixels = some_rows(processor), Pixels(processor, PIXELS)

    def gradient(groups):
        model.zero_grad()
        for g in groups:
            loss_sum(model, processor, g, pixels)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, single = gradient([rows]), gradient([[r] for r in rows])
    assert (whole - single).abs().max() < 1e-4 * single.abs().max()
    seen = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("vis" in n for n in seen) and (
        family != "qwen3_vl" or any("deepstack" in n for n in seen)
    )


@FAMILY
def test_fault_29_no_image_token_is_trained_even_where_all_else_is(family, built):
    model, processor, _ = built[family]
    r = some_rows(processor)[0]
    images = r.input_ids.count(processor.image_token_id)
    assert images == visual_tokens(112, 112, PIXELS, family_of(processor))
    assert (
        loss_sum(model, processor, [r], Pixels(processor, PIXELS))[1] == len(r.input_ids) - r.prompt
    )
    assert (
        loss_sum(model, processor, [replace(r, prompt=0)], Pixels(processor, PIXELS))[1]
        == len(r.input_ids) - 1 - images
    )
    assert (
        render_rows(processor, [(chat("which is it ?", *r.images), "\\boxed{A}")], PIXELS, 500)[1][
            "visual_tokens"
        ]
        == images
    )


@FAMILY
def test_fault_37_a_saved_student_reloads_and_answers_the_same(family, built):
    model, processor, folder = built[family]
    again, itself = load_student(folder)
    assert (
        type(again) is type(model)
        and type(itself) is type(processor)
        and family_of(itself) == family_of(processor)
    )
    name = intake(DRAWING, PIXELS)
    prompts, images = (
        [chat_text(p, chat("which is it ?", name), PIXELS) for p in (processor, itself)],
        [[name]],
    )
    assert prompts[0] == prompts[1]
    batch = encode(itself, prompts[:1], images, PIXELS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again.eval()(**batch).logits)
    said = model.generate(
        **batch, max_new_tokens=6, do_sample=False, temperature=None, top_p=None, top_k=None
    )[0, batch["input_ids"].shape[1] :]
    (sample,) = TransformersEngine(folder, "m", PIXELS).generate(
        [Request("q", chat("which is it ?", name), "p")], Sampling(temperature=0, max_tokens=6)
    )
    assert (
        sample.text == processor.tokenizer.decode(said, skip_special_tokens=True)
        and sample.prompt_tokens == batch["input_ids"].shape[1]
    )


@FAMILY
def test_answers_do_not_depend_on_who_is_asked_beside(family, built):
    _, _, folder = built[family]
    engine, name = TransformersEngine(folder, "m", PIXELS), intake(DRAWING, PIXELS)
    asked = [
        Request("a", chat("which is it ?", name), "p"),
        Request("b", chat("one two three fever rash which is it ?"), "p"),
        Request("c", chat("fever ?", name, name), "p"),
    ]
    together = {
        s.question: s.text for s in engine.generate(asked, Sampling(temperature=0, max_tokens=6))
    }
    assert together == {
        s.question: s.text
        for r in asked
        for s in engine.generate([r], Sampling(temperature=0, max_tokens=6))
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_fault_28_packed_equals_alone_where_there_is_m_rope(family, built):
    model, processor, _ = built[family]
    rows, pixels = some_rows(processor), Pixels(processor, PIXELS)
    batch, alone = (
        packed_batch(model, processor, rows, pixels),
        [packed_batch(model, processor, [r], pixels) for r in rows],
    )
    assert torch.equal(batch["position_ids"], torch.cat([b["position_ids"] for b in alone], 2))

    def gradient(losses):
        model.zero_grad()
        total = sum(losses)
        total.backward()
        return total.item(), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )

    packed, single = (
        gradient([packed_loss_sum(model, processor, rows, pixels)[0]]),
        gradient([loss_sum(model, processor, [r], pixels)[0] for r in rows]),
    )
    assert (
        math.isclose(packed[0], single[0], rel_tol=1e-5)
        and (packed[1] - single[1]).abs().max() < 1e-4 * single[1].abs().max()
    )


def test_internvl_is_trained_padded(built):
    model, processor, _ = built["internvl"]
    with pytest.raises(OctomedError, match="train it padded"):
        packed_batch(model, processor, some_rows(processor), Pixels(processor, PIXELS))


def test_a_picture_that_resizing_left_alone_serves_every_grid(built):
    name = intake(draw := Image.effect_noise((112, 112), 30).convert("RGB"), PIXELS)
    assert load_image(name, PIXELS).tobytes() == draw.tobytes()
    for family, size in (("qwen3_vl", (96, 96)), ("internvl-112", (112, 112))):
        assert (
            not image_path(name, PIXELS, family).exists()
            and load_image(name, PIXELS, family).size == size
            and image_path(name, PIXELS, family).exists()
        )
    assert (
        load_image(name, PIXELS, "qwen3_vl").tobytes()
        == draw.resize((96, 96), Image.Resampling.BICUBIC).tobytes()
    )
    with pytest.raises(OctomedError, match="family=qwen3_vl"):
        stored(intake(Image.effect_noise((301, 200), 9).convert("RGB"), PIXELS), PIXELS, "qwen3_vl")


def test_any_other_picture_is_taken_in_again_from_its_source(built, monkeypatch):
    from octomed.data.sources import load

    monkeypatch.setenv("OCTOMED_DATA", str(EXAMPLES))
    qs = load("brain_tumor:train", max_pixels=PIXELS)
    lacking = [i for q in qs for i in q.images if not image_path(i, PIXELS, "qwen3_vl").exists()]
    on_grid(qs, PIXELS, built["qwen3_vl"][1])
    assert lacking and all(load_image(i, PIXELS, "qwen3_vl") for i in lacking)


def test_a_processor_says_its_family_or_is_refused(built):
    assert [family_of(built[f][1]) for f in S.MARKERS] == ["qwen2_5_vl", "qwen3_vl", "internvl-112"]
    with pytest.raises(OctomedError, match="add its family"):
        family_of(object())
    with pytest.raises(OctomedError, match="no grid is known"):
        visual_tokens(10, 10, PIXELS, "qwen3_vl-112")
    with pytest.raises(OctomedError, match="no small student of the family llava"):
        S.build_student([WORDS], S.SIZES["tiny"], 0, PIXELS, "llava")


def test_the_three_students_are_of_comparable_size_and_registered():
    from octomed.train.students import STUDENTS

    sizes = {
        f: S.build_student([WORDS], S.SIZES["tiny"], 0, PIXELS, f)[0].num_parameters()
        for f in S.MARKERS
    }
    assert max(sizes.values()) < 1.5 * min(sizes.values())
    assert {
        "clinic/tiny",
        "clinic/tiny-qwen3",
        "clinic/tiny-internvl",
        "clinic/small-qwen3",
    } <= set(STUDENTS)
    declared = [STUDENTS[n](load_recipe("smoke").common) for n in F.FAMILIES.values()]
    assert len({s.key for s in declared}) == 3 and [s.params["family"] for s in declared] == list(
        S.MARKERS
    )


# --- the section ---------------------------------------------------------------------------------------------------------

from octomed.evaluate.arms import Results, stages
from octomed.paper import families as F


def declared(name):
    recipe = F.scope(load_recipe(name))
    return recipe, F.bases(recipe), F.arms(recipe)


def test_course_has_every_family_and_smoke_the_two_further_ones():
    assert set(declared("course")[1]) == {*F.FAMILIES, F.REASONING} and set(
        declared("smoke")[1]
    ) == {"Qwen3-VL", "InternVL", F.REASONING}
    assert declared("course")[0].of("54_families")["seeds"] >= 2


@pytest.mark.parametrize("name", ["smoke", "course"])
def test_arms_differ_in_their_base_alone(name):
    recipe, bases, arms = declared(name)
    assert set(arms) == set(bases) | {F.before(b) for b in bases}
    after = [arms[b] for b in bases]
    assert len({replace(a, base=None, student="") for a in after}) == 1 and len(
        {stages(a, recipe.common)["student"].key for a in arms.values()}
    ) == len(arms)
    assert len({stages(a, recipe.common)["accepted"].key for a in after}) == 1, (
        "every family learns from the same traces"
    )
    for b, base in bases.items():
        assert (
            stages(arms[F.before(b)], recipe.common)["student"]
            == stages(base, recipe.common)["student"]
            == stages(arms[b], recipe.common)["student"].params["base"]
        )
        assert (
            arms[F.before(b)].form == base.form
            and arms[b].form == "cot"
            and all(n < 0 for _, n in base.sources)
        )


def test_the_two_kinds_of_bases_differ_in_what_they_imitate_and_read_equal_tokens():
    recipe, bases, _ = declared("course")
    reasons, answers = bases[F.REASONING], bases["InternVL"]
    assert answers == replace(reasons, form="direct", compute_of=reasons)
    a, b = stages(answers, recipe.common), stages(reasons, recipe.common)
    assert (
        a["accepted"] == b["accepted"]
        and a["student"].params["match"] == b["rendered"]
        and a["student"].params["base"] == b["student"].params["base"]
    )


def results(recipe, **right):
    def rows(good):
        return [
            {
                "question": str(n),
                "statuses": ["correct" if r else "wrong"],
                "letters": ["A"],
                "forced": [False],
                "tokens": [3],
                "options": 4,
            }
            for n, r in enumerate(good)
        ]

    return Results(
        replace(recipe.common, bootstrap=400),
        {
            arm: {b: [rows(run) for run in runs] for b in F.benchmarks(recipe)}
            for arm, runs in right.items()
        },
    )


def test_a_claim_about_gains_is_a_difference_of_differences():
    recipe, n = declared("smoke")[0], 60

    def share(*shares):
        return [[i < n * s for i in range(n)] for s in shares]

    r = results(
        recipe,
        **{
            "Qwen3-VL": share(0.8, 0.7),
            F.before("Qwen3-VL"): share(0.2, 0.2),
            F.REASONING: share(0.8, 0.8),
            F.before(F.REASONING): share(0.5, 0.5),
        },
    )
    text = CATEGORIES[0]
    (claim,) = [
        c for c in F.claims() if c.a == "Qwen3-VL" and c.b == F.REASONING and c.benchmark == text
    ]
    found = F.judged(claim, r)
    assert (
        claim.measure == "gain"
        and found["difference"] == pytest.approx(0.25)
        and found["by_seed"] == pytest.approx([0.3, 0.2])
        and found["n"] == n
        and found["verdict"] == "agrees"
    )
    level = F.judged(replace(claim, measure="accuracy"), r)
    assert level["difference"] == pytest.approx(-0.05) and found["interval"][0] > 0


def test_claims_of_the_paper_and_controls():
    claims, (text, reasoning, looks) = F.claims(), CATEGORIES
    paper = [c for c in claims if c.paper]
    assert {(c.a, c.b) for c in paper if c.benchmark == looks and c.kind == "greater"} == {
        (a, F.before(a)) for a in ("Qwen2.5-VL", "Qwen3-VL", F.REASONING)
    }
    assert {c.benchmark for c in paper if c.measure == "gain" and c.kind == "greater"} == {
        text,
        reasoning,
    } and all(c.paper == "Fig. 9, in words alone" for c in paper)
    assert {(c.a, c.b) for c in claims if not c.paper} == {
        ("InternVL", F.before("InternVL")),
        ("InternVL", F.REASONING),
    } and len({c.text for c in claims}) == len(claims)


def test_the_figure_has_every_base_before_and_after():
    from octomed.evaluate.tables import table

    recipe = declared("smoke")[0]
    arms = [*declared("course")[1]]
    r = results(
        recipe, **{a: [[1, 0, 1, 1]] for a in arms}, **{F.before(a): [[1, 0, 0, 0]] for a in arms}
    )
    rows = [x for x in table(r) if x["benchmark"] != "Overall"]
    fig = F.figure({"rows": rows})
    assert {t.get_text() for t in fig.axes[0].get_yticklabels()} == set(arms)
    gained = F.gains(r)
    assert len(gained) == len(arms) * len(F.benchmarks(recipe)) and {
        round(g["gain"], 6) for g in gained
    } == {0.5}
