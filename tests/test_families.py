"""Three families of models, one code: prompts, pixels, training and answers.

The second half tests the section that compares the families.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from toys import WORDS, chat, toy_size

from octomed.clinic.students import MARKERS, SIZES, build_student
from octomed.core.paths import OctomedError, shipped
from octomed.core.recipe import CATEGORIES, load_recipe
from octomed.data.images import find_stored, image_path, load_image, store_image
from octomed.data.resize import count_visual_tokens, find_family, image_grid, processor_arguments
from octomed.data.sources import load
from octomed.distill.sampling import load_missing_images
from octomed.evaluate.arms import declare_stages
from octomed.evaluate.results import Results, scope_recipe
from octomed.evaluate.tables import tabulate_scores
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.render import PixelCache, encode_prompts, render_row, render_rows, write_chat
from octomed.generate.samples import Request, Sampling
from octomed.paper import families as section
from octomed.paper import formatting
from octomed.run.section_page import start_section
from octomed.train.loop import sum_padded_loss
from octomed.train.objective import sum_packed_loss
from octomed.train.packing import collate_packed
from octomed.train.students import STUDENTS, load_student, save_student

PIXELS = 12_544  # the clinic's limit
WIDE = 6 * 112 * 112  # a limit at which InternVL cuts tiles of 112 pixels
PHOTO = Image.effect_noise((300, 200), 60).convert("RGB").resize((300, 200))
DRAWING = Image.effect_noise((112, 112), 60).convert("RGB")
EXAMPLES = Path(__file__).parents[1] / "data" / "examples"
GREEDY = Sampling(temperature=0, max_tokens=6)
FAMILY = pytest.mark.parametrize("family", MARKERS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "family → (model, processor, folder in which both are saved)."
    students = {}
    for family in MARKERS:
        model, processor = build_student(
            [WORDS, WORDS.lower()], toy_size(64), seed=0, max_pixels=PIXELS, family=family
        )
        folder = tmp_path_factory.mktemp(family)
        save_student(folder, model.eval(), processor, log=[])
        students[family] = model, processor, folder
    return students


def some_rows(processor):
    "Rows with one picture, with none, and with two."
    names = store_image(DRAWING, PIXELS), store_image(PHOTO, PIXELS)
    for image in (DRAWING, PHOTO):
        store_image(image, PIXELS, find_family(processor))
    asked = [
        ("which is it ?", names[:1], "<think>the fever</think>\n\n\\boxed{B}"),
        ("fever ?", (), "the rash"),
        ("which is it ? one two three", names, "\\boxed{A}"),
    ]
    return [
        render_row(processor, chat(text, *images), response, PIXELS)
        for text, images, response in asked
    ]


@FAMILY
@pytest.mark.parametrize("limit", [PIXELS, WIDE])
def test_fault_39_tokens_pixels_and_grid_are_the_familys_own(family, limit, built):
    _, processor, _ = built[family]
    grid = find_family(processor)
    name = store_image(PHOTO, limit, grid)
    messages = chat("which is it ?", name, name)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def encode_by_processor(image):
        options = processor_arguments(limit, grid)
        return processor(text=[text], images=[image, image], return_tensors="pt", **options)

    theirs = encode_by_processor(load_image(name, limit, grid))
    ours = encode_prompts(
        processor, [write_chat(processor, messages, limit)], [[name, name]], limit
    )
    assert set(ours) - {"mm_token_type_ids"} == set(theirs) - {"mm_token_type_ids"}
    for key in ours:
        if key == "mm_token_type_ids":
            assert torch.equal(theirs[key].long(), ours[key].long())
        else:
            assert torch.equal(theirs[key], ours[key]), key
    unresized = encode_by_processor(PHOTO)
    assert torch.equal(unresized["input_ids"], ours["input_ids"]), "the grid is another one"
    assert unresized["pixel_values"].shape == ours["pixel_values"].shape
    trained, ids = (
        render_row(processor, messages, "\\boxed{A}", limit),
        ours["input_ids"][0].tolist(),
    )
    assert trained.input_ids[: trained.prompt] == ids
    expected = count_visual_tokens(200, 300, limit, family=grid)
    assert ids.count(processor.image_token_id) == 2 * expected


def test_internvl_cuts_tiles_and_adds_the_view_of_the_whole(built):
    _, processor, _ = built["internvl"]
    family = find_family(processor)
    assert family == "internvl-112"
    name = store_image(PHOTO, WIDE, family)
    width, height = load_image(name, WIDE, family).size
    assert image_grid(height, width, family)[0] == 7
    patches, grid = PixelCache(processor, WIDE)(name)
    assert patches.shape == (7, 3, 112, 112) and grid.tolist() == [[7, 8, 8]]


@FAMILY
def test_the_prompt_has_the_familys_own_markers(family, built):
    _, processor, _ = built[family]
    text = write_chat(processor, chat("which is it ?", store_image(DRAWING, PIXELS)), PIXELS)
    n = count_visual_tokens(112, 112, PIXELS, family=find_family(processor))
    if family == "internvl":
        image = "<img>" + "<IMG_CONTEXT>" * n + "</img>\n"
    else:
        image = "<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>"
    assert text == f"<|im_start|>user\n{image}which is it ?<|im_end|>\n<|im_start|>assistant\n"
    tokens = processor.tokenizer.tokenize(text)
    assert tokens[:3] == ["<|im_start|>", "user", "\n"] and "<|unk|>" not in tokens


@FAMILY
def test_fault_27_a_padded_micro_batch_has_the_gradient_of_its_rows(family, built):
    model, processor, _ = built[family]
    rows, pixels = some_rows(processor), PixelCache(processor, PIXELS)

    def gradient(groups):
        model.zero_grad()
        for g in groups:
            sum_padded_loss(model, processor, g, pixels)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, single = gradient([rows]), gradient([[r] for r in rows])
    assert (whole - single).abs().max() < 1e-4 * single.abs().max()
    reached = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert any("vis" in name for name in reached)
    if family == "qwen3_vl":
        assert any("deepstack" in name for name in reached)


@FAMILY
def test_fault_29_no_image_token_is_trained_even_where_all_else_is(family, built):
    model, processor, _ = built[family]
    r = some_rows(processor)[0]
    images = r.input_ids.count(processor.image_token_id)
    assert images == count_visual_tokens(112, 112, PIXELS, family=find_family(processor))

    def trained_tokens(r):
        return sum_padded_loss(model, processor, [r], pixels=PixelCache(processor, PIXELS))[1]

    assert trained_tokens(r) == len(r.input_ids) - r.prompt
    assert trained_tokens(replace(r, prompt=0)) == len(r.input_ids) - 1 - images
    pairs = [(chat("which is it ?", *r.images), "\\boxed{A}")]
    _, funnel = render_rows(processor, pairs, PIXELS, cutoff=500)
    assert funnel["visual_tokens"] == images


@FAMILY
def test_fault_37_a_saved_student_reloads_and_answers_the_same(family, built):
    model, processor, folder = built[family]
    again, processor_again = load_student(folder)
    assert type(again) is type(model) and type(processor_again) is type(processor)
    assert find_family(processor_again) == find_family(processor)
    name = store_image(DRAWING, PIXELS)
    messages = chat("which is it ?", name)
    prompt = write_chat(processor, messages, PIXELS)
    assert write_chat(processor_again, messages, PIXELS) == prompt
    batch = encode_prompts(processor_again, [prompt], [[name]], max_pixels=PIXELS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again.eval()(**batch).logits)
    prompt_tokens = batch["input_ids"].shape[1]
    generated = model.generate(
        **batch, max_new_tokens=6, do_sample=False, temperature=None, top_p=None, top_k=None
    )
    response = processor.tokenizer.decode(generated[0, prompt_tokens:], skip_special_tokens=True)
    (sample,) = TransformersEngine(folder, "m", PIXELS).generate(
        [Request("q", messages, "p")], GREEDY
    )
    assert sample.text == response and sample.prompt_tokens == prompt_tokens


@FAMILY
def test_answers_do_not_depend_on_what_is_asked_at_the_same_time(family, built):
    _, _, folder = built[family]
    engine, name = TransformersEngine(folder, "m", PIXELS), store_image(DRAWING, PIXELS)
    requests = [
        Request("a", chat("which is it ?", name), "p"),
        Request("b", chat("one two three fever rash which is it ?"), "p"),
        Request("c", chat("fever ?", name, name), "p"),
    ]
    together = {sample.question: sample.text for sample in engine.generate(requests, GREEDY)}
    alone = {}
    for request in requests:
        (sample,) = engine.generate([request], GREEDY)
        alone[sample.question] = sample.text
    assert together == alone


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_fault_28_packed_equals_alone_where_there_is_m_rope(family, built):
    model, processor, _ = built[family]
    rows, pixels = some_rows(processor), PixelCache(processor, PIXELS)
    batch = collate_packed(model, processor, rows, pixels=pixels)
    alone = [collate_packed(model, processor, [r], pixels=pixels) for r in rows]
    assert torch.equal(batch["position_ids"], torch.cat([b["position_ids"] for b in alone], 2))

    def gradient(losses):
        model.zero_grad()
        total = sum(losses)
        total.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return total.item(), torch.cat(grads)

    loss, packed = gradient([sum_packed_loss(model, processor, rows, pixels=pixels)[0]])
    loss_alone, single = gradient(
        [sum_padded_loss(model, processor, [r], pixels=pixels)[0] for r in rows]
    )
    assert math.isclose(loss, loss_alone, rel_tol=1e-5)
    assert (packed - single).abs().max() < 1e-4 * single.abs().max()


def test_internvl_is_trained_padded(built):
    model, processor, _ = built["internvl"]
    with pytest.raises(OctomedError, match="train it padded"):
        collate_packed(model, processor, some_rows(processor), PixelCache(processor, PIXELS))


def test_a_picture_that_resizing_left_alone_serves_every_grid(built):
    drawing = Image.effect_noise((112, 112), 30).convert("RGB")
    name = store_image(drawing, PIXELS)
    assert load_image(name, PIXELS).tobytes() == drawing.tobytes()
    for family, size in (("qwen3_vl", (96, 96)), ("internvl-112", (112, 112))):
        assert not image_path(name, PIXELS, family).exists()
        assert load_image(name, PIXELS, family).size == size
        assert image_path(name, PIXELS, family).exists()
    resized = drawing.resize((96, 96), Image.Resampling.BICUBIC)
    assert load_image(name, PIXELS, "qwen3_vl").tobytes() == resized.tobytes()
    wide = store_image(Image.effect_noise((301, 200), 9).convert("RGB"), PIXELS)
    with pytest.raises(OctomedError, match="family=qwen3_vl"):
        find_stored(wide, PIXELS, "qwen3_vl")


def test_any_other_picture_is_taken_in_again_from_its_source(built, monkeypatch):
    monkeypatch.setenv("OCTOMED_DATA", str(EXAMPLES))
    questions = load("brain_tumor:train", max_pixels=PIXELS)
    names = itertools.chain.from_iterable(question.images for question in questions)
    missing = [name for name in names if not image_path(name, PIXELS, "qwen3_vl").exists()]
    load_missing_images(questions, PIXELS, built["qwen3_vl"][1])
    assert missing and all(load_image(name, PIXELS, "qwen3_vl") for name in missing)


def test_the_family_of_a_processor_is_known_or_it_is_refused(built):
    families = [find_family(built[family][1]) for family in MARKERS]
    assert families == ["qwen2_5_vl", "qwen3_vl", "internvl-112"]
    with pytest.raises(OctomedError, match="add its family"):
        find_family(object())
    with pytest.raises(OctomedError, match="no grid is known"):
        count_visual_tokens(10, 10, PIXELS, family="qwen3_vl-112")
    with pytest.raises(OctomedError, match="no small student of the family llava"):
        build_student([WORDS], SIZES["tiny"], seed=0, max_pixels=PIXELS, family="llava")


def test_the_three_students_are_of_comparable_size_and_registered():
    sizes = []
    for family in MARKERS:
        model, _ = build_student([WORDS], SIZES["tiny"], seed=0, max_pixels=PIXELS, family=family)
        sizes.append(model.num_parameters())
    assert max(sizes) < 1.5 * min(sizes)
    names = {"clinic/tiny", "clinic/tiny-qwen3", "clinic/tiny-internvl", "clinic/small"}
    assert names <= set(STUDENTS)
    common = load_recipe("smoke").common
    families = [name for name in section.FAMILIES if name != section.REASONING]
    bases = [STUDENTS[section.FAMILIES[name]](common) for name in families]
    assert len({base.key for base in bases}) == 3
    configurations = [json.loads((base.path / "config.json").read_text()) for base in bases]
    assert [each["model_type"] for each in configurations] == list(MARKERS)


# The section that compares the families


def declared(name):
    recipe = scope_recipe(load_recipe(name), "54_families")
    return recipe, section.choose_families(recipe), section.arms(recipe)


def test_course_has_every_base_and_smoke_those_that_no_other_section_has():
    course, bases, _ = declared("course")
    assert bases == [base for base in section.FAMILIES if is_at_hand(base)]
    assert declared("smoke")[1] == ["Qwen3-VL", "InternVL"]
    assert course.scalars("54_families")["seeds"] >= 2


def is_at_hand(base: str) -> bool:
    "Whether a base's weights are there."
    folder = shipped("students", section.FAMILIES[base].partition("/")[2])
    return (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["smoke", "course"])
def test_arms_differ_in_their_base_alone(name):
    recipe, bases, arms = declared(name)
    assert set(arms) == set(bases) | {section.name_base(base) for base in bases}
    assert len({replace(arms[base], student="") for base in bases}) == 1
    traces = set()
    for base in filter(is_at_hand, bases):
        after = declare_stages(arms[base], recipe.common)
        before = declare_stages(arms[section.name_base(base)], recipe.common)["student"]
        traces.add(after["accepted"].key)
        assert after["student"].params["base"].path == before.path
        assert before.path.name == section.FAMILIES[base].partition("/")[2]
    assert len(traces) == 1, "families learn from different traces"


def test_instruct_bases_answer_at_once_and_the_one_that_reasons_thinks():
    recipe = scope_recipe(load_recipe("course"), "54_families")
    own = {**recipe.scalars("54_families"), "families": ", ".join(section.FAMILIES)}
    recipe = recipe.with_scalars("54_families", **own)
    bases = section.choose_families(recipe)
    if not is_at_hand(section.REASONING):
        pytest.skip("the base that reasons already is not shipped: octomed base makes it")
    arms = section.arms(recipe)
    forms = {base: arms[section.name_base(base)].form for base in bases}
    assert forms.pop(section.REASONING) == "cot" and set(forms.values()) == {"direct"}
    assert {arms[base].form for base in bases} == {"cot"}


def test_in_the_course_qwen_is_the_student_of_42():
    recipe, _, arms = declared("course")
    student = declare_stages(arms["Qwen2.5-VL"], recipe.common)["student"]
    assert student == declare_stages(formatting.arms(recipe)["cot"], recipe.common)["student"]


def test_each_base_has_chance_students_of_its_own():
    recipe, bases, arms = declared("course")
    chance = section.chance(recipe)
    assert len(chance) == len(bases) * len(CATEGORIES)
    assert {arm.student for arm in chance.values()} == {arms[base].student for base in bases}
    assert all(arm.blind and arm.form == "cot" for arm in chance.values())
    of_42 = formatting.chance(recipe, CATEGORIES[0], forms=("cot",))
    (theirs,) = of_42.values()
    ours = next(arm for arm in chance.values() if arm.student == section.FAMILIES["Qwen2.5-VL"])
    stages = [declare_stages(arm, recipe.common)["student"] for arm in (ours, theirs)]
    assert stages[0] == stages[1]


def results(recipe, **runs_of_arms):
    "Results in which each run of an arm has these answers right, on every benchmark."

    def rows(right):
        return [
            {
                "question": str(n),
                "statuses": ["correct" if is_right else "wrong"],
                "letters": ["A"],
                "forced": [False],
                "tokens": [3],
                "options": 4,
            }
            for n, is_right in enumerate(right)
        ]

    by_arm = {}
    for arm, runs in runs_of_arms.items():
        by_arm[arm] = {b: [rows(run) for run in runs] for b in section.benchmarks(recipe)}
    return Results(replace(recipe.common, bootstrap=400), by_arm)


def test_a_claim_about_gains_is_a_difference_of_differences():
    recipe, n = declared("smoke")[0], 60

    def runs(*shares):
        "A run for each share of right answers."
        return [[i < n * share for i in range(n)] for share in shares]

    runs_of_arms = {
        "Qwen3-VL": runs(0.8, 0.7),
        section.name_base("Qwen3-VL"): runs(0.2, 0.2),
        section.REASONING: runs(0.8, 0.8),
        section.name_base(section.REASONING): runs(0.5, 0.5),
    }
    measured = results(recipe, **runs_of_arms)
    (claim,) = [
        claim
        for claim in section.claims()
        if (claim.a, claim.b, claim.benchmark) == ("Qwen3-VL", section.REASONING, CATEGORIES[0])
    ]
    gain = section.state_finding(claim, measured)
    assert claim.measure == "gain" and gain["difference"] == pytest.approx(0.25)
    assert gain["by_seed"] == pytest.approx([0.3, 0.2])
    assert gain["n"] == n and gain["outcome"] == "agrees"
    assert [line["passed"] for line in gain["gate"]] == [True] * 3 and gain["chance"] == 0.25
    level = section.state_finding(replace(claim, measure="accuracy"), measured)
    assert level["difference"] == pytest.approx(-0.05) and gain["interval"][0] > 0


def test_the_gate_of_a_gain_is_that_of_the_students_and_not_of_the_gains():
    "Both students are at the ceiling; a gain of 10 points is far below what guessing reaches."
    recipe, n = declared("smoke")[0], 60
    high, start = [True] * (n - 1) + [False], [i < 0.9 * n for i in range(n)]
    runs_of_arms = {
        "Qwen3-VL": [high],
        section.name_base("Qwen3-VL"): [start],
        section.REASONING: [high],
        section.name_base(section.REASONING): [high],
    }
    claim = next(claim for claim in section.claims() if claim.measure == "gain" and claim.paper)
    claim = replace(claim, a="Qwen3-VL", b=section.REASONING, kind="greater", margin=None)
    finding = section.state_finding(claim, results(recipe, **runs_of_arms))
    passed = {line["what"]: line["passed"] for line in finding["gate"]}
    assert passed == {"above chance": True, "unread": True, "below the ceiling": False}
    assert finding["outcome"] == "not tested" and finding["difference"] == pytest.approx(5 / 60)


def test_claims_of_the_paper_and_controls():
    claims, (text, reasoning, looks) = section.claims(), CATEGORIES
    paper = [claim for claim in claims if claim.paper]
    ours = [claim for claim in claims if not claim.paper]
    assert (len(paper), len(ours)) == (6, 4)
    greater = [claim for claim in paper if claim.kind == "greater"]
    bases = ("Qwen2.5-VL", "Qwen3-VL", section.REASONING)
    by_looking = {(claim.a, claim.b) for claim in greater if claim.benchmark == looks}
    assert by_looking == {(name, section.name_base(name)) for name in bases}
    gains = {claim.benchmark for claim in greater if claim.measure == "gain"}
    assert gains == {text, reasoning}
    assert all(claim.paper == "Fig. 9, in words alone" for claim in paper)
    assert {(claim.a, claim.b) for claim in ours} == {("InternVL", section.REASONING)}
    assert len({claim.text for claim in claims}) == len(claims)


def test_claims_about_bases_that_a_recipe_leaves_out_are_set_aside_and_named(capsys):
    page = start_section(
        "54_families", "smoke", None, **load_recipe("smoke").scalars("54_families")
    )
    page.show_claims(section.claims())
    page.arms = section.arms(page.recipe)
    aside = page.set_aside_claims()
    assert len(aside) + len(page.claims) == 10
    assert [(claim.a, claim.measure) for claim in page.claims] == [("Qwen3-VL", "accuracy")]
    printed = capsys.readouterr().out
    assert "9 claims are not judged" in printed and "InternVL (reasoning)" in printed
    assert "Qwen3-VL" not in printed


def test_the_figure_has_every_base_before_and_after():
    recipe, names = declared("smoke")[0], list(section.FAMILIES)
    after = {name: [[1, 0, 1, 1]] for name in names}
    before = {section.name_base(name): [[1, 0, 0, 0]] for name in names}
    measured = results(recipe, **after, **before)
    figure = section.figure({"rows": tabulate_scores(measured)})
    assert len(figure.axes) == len(CATEGORIES)
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert [float(line.get_xdata()[0]) for line in hollow] == [25.0] * len(names)
        rules = [line for line in axes.lines if list(line.get_xdata()) == [25.0, 25.0]]
        assert len(rules) == 2 * len(names), "chance is marked beside each base and student"
    gained = section.measure_gains(measured)
    assert len(gained) == len(names) * len(section.benchmarks(recipe))
    assert {round(gain["gain"], 6) for gain in gained} == {0.5}
