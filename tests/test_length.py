"A length that is asked for: budgets, the traces that have them, and the section that compares."

import json
from dataclasses import replace

import numpy as np
import pytest
from declarations import RECIPES, check_claims, declared
from hypothesis import given, settings
from hypothesis import strategies as st

from octomed.clinic.questions import load_questions
from octomed.core.paths import UsageError
from octomed.core.recipe import Common, load_recipe
from octomed.core.store import run_stage
from octomed.distill.sampling import make_requests
from octomed.evaluate.arms import Arm, declare_evaluation, declare_stages
from octomed.evaluate.results import Results
from octomed.generate.budgets import (
    find_nearest,
    give_budgets,
    name_form,
    pick_by_budget,
    read_budgets,
)
from octomed.generate.prompts import load_template
from octomed.generate.render import load_processor, load_rows
from octomed.generate.samples import Sampling
from octomed.paper import length
from octomed.train.reinforce import Drawer, PolicyPlan

LINES = length.LINES
WARD = "clinic_ward:test"
SEEN = {  # how the clinic's tokenizer sees the words of a budget
    "one line": "one<|unk|>",
    "two lines": "two<|unk|>",
    "a long text": "a long text",
}


@pytest.mark.parametrize(
    "text", ["", "one line", "one line = ", "= 36", "a = 0", "a = -3", "a = b"]
)
def test_what_is_no_budget_is_one_sentence(text):
    with pytest.raises(UsageError, match="write its words"):
        read_budgets(text)


def test_budgets_come_by_their_length_and_each_has_words_of_its_own():
    assert read_budgets(" b = 20 ,a=3") == (("a", 3), ("b", 20))
    with pytest.raises(UsageError, match="same words"):
        read_budgets("a = 3, a = 4")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_each_budget_has_the_nearest_of_its_own_traces(lengths):
    rows = [{"question": "q", "response": n} for n in lengths]
    picked = pick_by_budget(rows, LINES, count_tokens=lambda n: n)
    assert {words for _, words in picked} == {find_nearest(n, LINES) for n in lengths}
    for row, words in picked:
        tokens = dict(LINES)[words]
        own = [n for n in lengths if find_nearest(n, LINES) == words]
        distance = abs(np.log(row["response"] / tokens))
        assert distance == pytest.approx(min(abs(np.log(n / tokens)) for n in own))


def test_half_and_twice_are_equally_far():
    assert find_nearest(50, LINES) == "one line" and find_nearest(52, LINES) == "two lines"


def test_a_template_names_the_length_it_asks_for():
    plain, asked = load_template("cot"), load_template("cot_budget@two lines")
    q = load_questions("clinic_ward", "dev", limit=1)[0]
    assert "in about two lines," in asked.fill(q) and "{budget}" not in asked.fill(q)
    assert plain.revision != asked.revision != load_template("cot_budget@one line").revision
    assert name_form("cot", "") == "cot" and name_form("cot", "two lines") == asked.name
    with pytest.raises(UsageError, match="leave out @two lines"):
        load_template("cot@two lines")


@pytest.fixture(scope="module")
def teaching():
    "The recipe smoke, the two students that read the same traces, and what each reads."
    recipe, arms = declared(length, "smoke")
    return recipe, arms["asked for one line"], arms["not asked"]


def test_both_students_read_the_same_traces_and_one_is_told_their_length(teaching, own_places):
    recipe, told, silent = teaching
    folders = [run_stage(declare_stages(arm, recipe.common)["rendered"]) for arm in (told, silent)]
    first, second = (load_rows(folder) for folder in folders)
    tokenizer = load_processor(declare_stages(told, recipe.common)["rendered"].params["base"].path)
    tokenizer = tokenizer.tokenizer

    def decode(rows, part):
        return [tokenizer.decode(row.input_ids[part(row)]) for row in rows]

    def is_response(row):
        return slice(row.prompt, None)

    def is_prompt(row):
        return slice(row.prompt)

    assert decode(first, is_response) == decode(second, is_response)
    for row, prompt, silent_prompt in zip(
        first, decode(first, is_prompt), decode(second, is_prompt), strict=True
    ):
        tokens = len(row.input_ids) - row.prompt - 1  # without the end of the turn
        words = SEEN[find_nearest(tokens, LINES)]
        assert f" in<|unk|> {words}," in prompt, "the clinic does not know the word about"
        assert silent_prompt == prompt.replace(f" in<|unk|> {words}", "")
    asked = {row.question for row in first}
    assert len(first) > len(asked), "some question has traces of two lengths"


def test_an_arm_is_asked_for_its_length_and_another_is_cut_at_it(teaching):
    recipe, *_ = teaching
    arms = length.arms(recipe)
    common = replace(recipe.common, max_tokens=128, answer_tokens=8)
    asked = declare_evaluation(arms["asked for two lines"], WARD, common).params
    cut = declare_evaluation(arms["cut at two lines"], WARD, common).params
    free = declare_evaluation(arms["not asked"], WARD, common).params
    assert asked["form"] == "cot_budget@two lines" and free["form"] == cut["form"] == "cot"
    assert (asked["sampling"].max_tokens, cut["sampling"].max_tokens) == (128, 72 - 8)
    assert free["sampling"].max_tokens == 128 and cut["sampling"].answer_tokens == 8


@RECIPES
def test_eleven_rows_come_from_four_students(name):
    recipe, arms = declared(length, name)
    students = {declare_stages(arm, recipe.common)["student"] for arm in arms.values()}
    assert len(arms) == 11 and len(students) == 4
    paid = arms["rewarded for one line"]
    assert paid.policy.reward == "length" and paid.policy.budgets == LINES
    asked = arms["asked for one line"]
    assert paid.base == replace(asked, length=replace(asked.length, asked=""))
    control = arms["rewarded for the answer alone, two lines"]
    assert control.policy == replace(paid.policy, reward="verdict")
    assert replace(control, policy=None) == replace(arms["rewarded for two lines"], policy=None)


@RECIPES
def test_claims_compare_arms_that_exist(name):
    recipe, arms = declared(length, name)
    budgets = read_budgets(recipe.scalars("62_length")["budgets"])
    claims = length.claims(budgets, recipe.common.reading)
    check_claims(claims, arms, length.benchmarks(recipe))
    assert len(claims) == 7 and not any(claim.paper for claim in claims)
    (trend,) = (claim for claim in claims if claim.kind == "trend")
    assert [place for _, place in trend.along] == sorted(place for _, place in trend.along)


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_other_budgets_have_claims_of_their_own(name):
    recipe = load_recipe(name)
    budgets = read_budgets(recipe.scalars("62_length")["budgets"])
    arms = length.arms(recipe)
    check_claims(length.claims(budgets), arms, [WARD])
    assert len(arms) == 2 + 3 * len(budgets)
    longest = max(tokens for _, tokens in budgets)
    assert longest < recipe.common.max_tokens


def test_the_teacher_has_three_lengths_in_turn():
    teacher = length.AnyLength()
    asked = make_requests(load_questions("clinic_ward", "train", limit=30), "r1", 6)
    drawn = list(teacher.generate(asked, Sampling(max_tokens=128)))
    assert len({(s.question, s.index) for s in drawn}) == len(drawn) == 180
    assert {s.model for s in drawn} == {teacher.model}
    ended = [s for s in drawn if s.finish == "stop"]
    brief, usual, filled = (
        np.median([s.tokens for s in ended if s.index % 3 == turn]) for turn in range(3)
    )
    assert brief < 45 < usual < 80 <= length.LONGEST <= filled


def test_a_policy_is_asked_each_question_for_one_length():
    questions = load_questions("clinic_ward", "train", limit=60)
    plan = PolicyPlan(budgets=LINES, reward="length")
    drawer = Drawer(None, questions, plan=plan, form="cot", seed=1, name="p")
    assert [q.id for q in drawer.questions] == [q.id for q in questions]
    budgets = dict(LINES)
    for question, form, request in zip(
        drawer.questions, drawer.forms, drawer.requests, strict=True
    ):
        words = form.removeprefix("cot_budget@")
        assert question.tags["budget"] == budgets[words]
        assert f"in about {words}," in request.messages[-1]["content"][-1]["text"]
        assert len(request.indices) == plan.responses
    assert len(set(drawer.forms)) == 3
    other = [words for _, words in give_budgets(questions, LINES, seed=2)]
    assert other != [form.removeprefix("cot_budget@") for form in drawer.forms]


def test_a_policy_without_budgets_asks_as_before():
    questions = load_questions("clinic_ward", "train", limit=4)
    drawer = Drawer(None, questions, plan=PolicyPlan(), form="cot", seed=1, name="p")
    assert drawer.questions == questions and drawer.requests == make_requests(questions, "cot", 8)


def row(n, tokens, logprobs, right=True):
    return {
        "question": str(n),
        "letters": ["A"],
        "answer": "A" if right else "B",
        "options": 2,
        "statuses": ["correct" if right else "wrong"],
        "tokens": [tokens],
        "tags": {},
        "likelihood": {"letters": ["A"], "logprobs": [logprobs]},
    }


def invented(**given):
    names = {arm: arm.replace("_", " ").replace("alone two", "alone, two") for arm in given}
    rows = {names[arm]: {WARD: [own, own]} for arm, own in given.items()}
    arms = {arm: Arm(sources=(("clinic_ward:train", 1),)) for arm in rows}
    return Results(Common(bootstrap=200, likelihood=True), rows, arms)


def test_nearness_and_confidence_are_what_they_say():
    sure = row(0, 54, [0.0, float(np.log(3))])
    assert length.read_nearness([sure], 72) == pytest.approx(-0.25)
    assert length.read_nearness([sure], 54) == 0
    assert length.read_confidence([sure]) == pytest.approx(0.75)
    assert length.read_overconfidence([sure]) == pytest.approx(-0.25)
    unread = row(1, 5, None, right=False)
    assert length.read_confidence([unread]) == 0


def test_the_calibration_error_is_that_of_a_plain_sum():
    rng = np.random.default_rng(0)
    sure, right = rng.random((40, 2)), (rng.random((40, 2)) < 0.6).astype(float)
    total = 0.0
    for low in np.arange(10) / 10:
        inside = [
            (s, r) for s, r in zip(sure.ravel(), right.ravel(), strict=True) if low <= s < low + 0.1
        ]
        if inside:
            mean_sure, mean_right = np.mean(inside, axis=0)
            total += len(inside) / 80 * abs(mean_sure - mean_right)
    assert length.measure_calibration_error(sure, right) == pytest.approx(total)
    assert length.measure_calibration_error(np.ones((3, 1)), np.ones((3, 1))) == 0


def test_one_budget_is_no_comparison():
    recipe = load_recipe("smoke")
    own = {**recipe.scalars("62_length"), "budgets": "one line = 36"}
    with pytest.raises(UsageError, match="two or more"):
        length.arms(recipe.with_scalars("62_length", **own))


def test_a_finding_about_lengths_is_the_difference_of_distances():
    results = invented(
        rewarded_for_two_lines=[row(n, 72, [0.0, -9.0]) for n in range(20)],
        rewarded_for_the_answer_alone_two_lines=[row(n, 90, [0.0, -9.0]) for n in range(20)],
    )
    claim = next(c for c in length.claims() if isinstance(c, length.Kept))
    finding = length.state_finding(claim, results, LINES)
    assert finding["difference"] == pytest.approx(0.25) and finding["outcome"] == "holds"
    assert finding["by_seed"] == pytest.approx([0.25, 0.25]) and "gate" not in finding


def test_a_finding_about_confidence_needs_students_that_can():
    able = [row(n, 30, [0.0, -9.0]) for n in range(18)]
    able += [row(n, 30, [0.0, -9.0], right=False) for n in (18, 19)]
    unable = [row(n, 30, [0.0, -0.1], right=n % 2) for n in range(20)]
    claim = next(c for c in length.claims() if isinstance(c, length.Trusted))
    same = invented(asked_for_one_line=able, asked_for_a_long_text=able)
    finding = length.state_finding(claim, same, LINES)
    assert finding["difference"] == 0 and finding["outcome"] == "holds"
    guessing = invented(asked_for_one_line=unable, asked_for_a_long_text=unable)
    assert length.state_finding(claim, guessing, LINES)["outcome"] == "not tested"


def test_what_is_kept_of_a_policys_questions_names_their_templates(tmp_path):
    questions = load_questions("clinic_ward", "train", limit=6)
    plan = PolicyPlan(budgets=LINES, reward="length")
    drawer = Drawer(None, questions, plan=plan, form="cot", seed=1, name="p")
    from octomed.train.reinforce import list_rollout_requests

    rows = list_rollout_requests(drawer, [{"step": 0, "asked": [questions[3].id]}])
    assert [r["template"] for r in rows] == [drawer.forms[3]]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("changed", [{"form": "direct"}, {"k": 0}, {"blind": True}])
def test_lengths_are_asked_of_traces_alone(teaching, changed):
    recipe, taught, _ = teaching
    with pytest.raises(UsageError, match="let form be cot"):
        declare_stages(replace(taught, **changed), recipe.common)


def test_commands_take_lengths():
    from octomed.run.cli import PolicyWords, TrainingOptions, declare_policy, declare_training

    words = "one line = 36, two lines = 72"
    arm, common = declare_training(("clinic_ward:train",), TrainingOptions(budgets=words), "cot")
    assert arm.length.budgets == read_budgets(words) and arm.k == common.samples
    paid, _ = declare_policy(("clinic_ward:train",), PolicyWords(budgets=words, reward="length"))
    assert paid.policy.budgets == read_budgets(words) and not paid.length.budgets
    with pytest.raises(UsageError, match="write its words"):
        declare_policy(("clinic_ward:train",), PolicyWords(budgets="long"))
