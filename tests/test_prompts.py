"Templates as data, rendering, and the student's targets."

import time
from dataclasses import replace

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octomed.core.identity import digest
from octomed.core.paths import OctomedError, UsageError, shipped
from octomed.data.questions import Question
from octomed.evaluate.stats import load_paper_table
from octomed.generate.answers import judge
from octomed.generate.prompts import (
    FORMS,
    Template,
    convert_to_boxed,
    format_question,
    list_templates,
    load_contenders,
    load_template,
    make_direct_target,
    make_prompt_key,
    write_messages,
)

QUESTION = Question(
    stem="Which tissue is this?",
    options=("Tumor", "Stroma", "Inflammatory", "Necrosis"),
    answer="B",
    source="demo",
    split="train",
    category="multimodal_classification",
    images=("aa", "bb"),
)


@pytest.mark.parametrize("name", list_templates())
def test_every_template_renders_and_names_its_source(name):
    t = load_template(name)
    assert t.name == name and t.source and (t.source != "octomed" or t.departure)
    assert set(t.forms) <= set(FORMS) and len(set(t.forms)) == len(t.forms)
    *system, user = write_messages(t, QUESTION)
    assert [m["role"] for m in system] == ["system"] * bool(t.system)
    assert user["role"] == "user" and [p["type"] for p in user["content"]] == [
        "image",
        "image",
        "text",
    ]
    assert [p["image"] for p in user["content"][:2]] == ["aa", "bb"]
    text = user["content"][-1]["text"]
    shown = "Which tissue is this?\nA: Tumor\nB: Stroma\nC: Inflammatory\nD: Necrosis"
    asks_in_words = name in ("cot_open", "r1_open", "short_answer")
    assert (
        text.count(QUESTION.stem if asks_in_words else shown) == 1
        and ("Stroma" in text) == (not asks_in_words)
        and "{question}" not in text
        and "{example}" not in text
    )


def test_the_students_prompt_is_the_papers():
    text = load_template("cot").fill(QUESTION)
    assert (
        text
        == format_question(QUESTION)
        + "\n\nPlease reason step-by-step, and put your final answer within \\boxed{ }."
    )
    assert (
        load_template("cot").think_first
        and not load_template("direct").think_first
        and not load_template("cot_base").think_first
    )
    assert load_template("cot_base").fill(QUESTION) == text


def test_the_worked_example_can_be_supplied(tmp_path):
    own = tmp_path / "example.txt"
    own.write_text("if asked {question}, say <answer>A</answer>\n")
    t = load_template("gpt4o", example=own)
    assert (
        "if asked {question}, say <answer>A</answer>" in t.fill(QUESTION)
        and t.revision != load_template("gpt4o").revision
    )
    with pytest.raises(OctomedError, match="no file"):
        load_template("gpt4o", example=tmp_path / "none.txt")


def test_revision_follows_meaning_and_not_the_file(tmp_path):
    raw = yaml.safe_load(shipped("prompts", "cot.yaml").read_text())
    copy = tmp_path / "copy.yaml"
    copy.write_text(
        "# other comments\n" + yaml.safe_dump(raw | {"forms": ["boxed"], "source": "octomed"})
    )
    assert load_template(str(copy)).revision == load_template("cot").revision
    copy.write_text(yaml.safe_dump(raw | {"text": raw["text"] + " "}))
    assert load_template(str(copy)).revision != load_template("cot").revision


def test_fault_16_a_changed_payload_changes_the_key_and_the_same_one_does_not():
    t = load_template("cot")

    def key(q, t=t):
        return make_prompt_key(write_messages(t, q), t)

    assert key(QUESTION) == key(replace(QUESTION, answer="A", source="x", split="test"))
    keys = {
        key(QUESTION),
        key(replace(QUESTION, stem="Which?")),
        key(replace(QUESTION, images=("bb", "aa"))),
        key(replace(QUESTION, options=("Stroma", "Tumor", "Inflammatory", "Necrosis"))),
        key(QUESTION, replace(t, think_first=False)),
        key(QUESTION, load_template("direct")),
    }
    assert len(keys) == 6


def test_golden_revisions():
    "A change here makes every generation anew: it must be meant."
    assert {n: load_template(n).revision for n in list_templates()} == GOLDEN


GOLDEN = {
    "cot": "0ace501f972681c3",
    "cot_budget": "8237fc7d53aca98b",
    "cot_base": "b7abf61c67ec5a7b",
    "cot_open": "91a434b1426c7d77",
    "r1_open": "7baef263405b532b",
    "short_answer": "896af39a01b1d88a",
    "direct": "ca368d06d9107ae1",
    "gpt4o": "6ccf4a93a2e32d79",
    "r1": "b8bdb2aabe616784",
    "huatuogpt_vision": "6c2e82fb89020468",
    "lingshu": "8047a0218e243fc5",
    "medvlthinker": "cdbf1c836d98c40c",
    "internvl3_5": "8bea0a3728f5263b",
    "glm4_1v_thinking": "0ace501f972681c3",
    "qoq_med": "4dd6573f3c094b7b",
    "medgemma": "6151c56fb340c4ae",
    "gpt4o_eval": "7680a5cbe6977961",
    "deepseek_r1_eval": "dfa5530c1c9a0878",
}


def test_golden_renderings():
    "The words as the model gets them, for the templates that generations are kept under."
    asked = format_question(QUESTION)
    boxed = "\n\nPlease reason step-by-step, and put your final answer within \\boxed{ }."
    assert (
        load_template("cot").fill(QUESTION)
        == load_template("cot_base").fill(QUESTION)
        == asked + boxed
    )
    direct = (
        "\n\nPlease answer directly, without reasoning, "
        "and put your final answer within \\boxed{ }."
    )
    assert load_template("direct").fill(QUESTION) == asked + direct
    assert (
        load_template("r1").fill(QUESTION)
        == asked + "\n\nPut your final answer letter within <answer></answer> tags."
    )
    assert digest(load_template("gpt4o").fill(QUESTION)) == "46d08e781badde45"


def test_every_model_of_table_2_can_be_evaluated():
    models = load_contenders()
    later = {"OctoMed-4B", "OctoMed-32B"}
    assert set(models) - later == set(load_paper_table(2)[0]) - {"category", "task"}
    assert all(models[name].hub == f"OctoMed/{name}" for name in later)
    for c in models.values():
        assert c.hub.count("/") == 1 or c.api
        assert load_template(c.template).fill(QUESTION).count(format_question(QUESTION)) == 1
    assert (
        models["OctoMed-7B"].hub == "OctoMed/OctoMed-7B" and models["OctoMed-7B"].template == "cot"
    )


def test_the_end_of_think_of_a_model_is_in_its_templates_revision():
    t = load_template("medgemma")
    assert t.end_of_think == "<unused95>" and {
        load_template(n).end_of_think for n in list_templates() if n != "medgemma"
    } == {"</think>"}
    assert replace(t, end_of_think="</think>").revision != t.revision
    response = "<unused94>thought\nThe answer is A.<unused95>Answer: B"
    assert (
        judge(response, QUESTION.letters, "B", True, t.forms, t.end_of_think).status == "correct"
        and judge(response, QUESTION.letters, "B", True).status == "truncated"
    )


def test_a_system_turn_comes_first():
    terse = Template(
        name="s",
        source="octomed",
        text="{question}",
        think_first=False,
        system="You are terse.",
    )
    system, user = terse.messages(QUESTION)
    assert (system["role"], user["role"]) == ("system", "user")
    assert system["content"] == [{"type": "text", "text": "You are terse."}]


def test_bad_templates_get_a_sentence(tmp_path):
    f = tmp_path / "t.yaml"
    with pytest.raises(UsageError, match="choose from cot"):
        load_template("nothing")
    for text, says in (
        ("a: [", "not YAML"),
        ("[1]", "no template"),
        ("name: x\ntempo: 3", "not tempo"),
        ("name: x", "lacks source"),
        ("name: x\nsource: y\nthink_first: true\ntext: hello", "where the question goes"),
    ):
        f.write_text(text)
        with pytest.raises(OctomedError, match=says):
            load_template(str(f))


@pytest.mark.parametrize(
    "text, target",
    [
        ("<think>R</think> <answer>B</answer>", "<think>R</think>\n\n\\boxed{B}"),
        (
            "<think> R </think>\n\n<answer>B: Stroma</answer>\nGood luck!",
            "<think>R</think>\n\n\\boxed{B}",
        ),
        (
            "<think>R</think>It is stroma.\n<answer>B</answer>",
            "<think>R</think>\n\nIt is stroma.\n\n\\boxed{B}",
        ),
        (
            "<think>R</think>It is stroma.\n\n**Answer:** <answer>B</answer>",
            "<think>R</think>\n\nIt is stroma.\n\nAnswer: \\boxed{B}",
        ),
        ("<think>R</think>$$\\boxed{B}$$", "<think>R</think>\n\n\\boxed{B}"),
        ("<think>a</think>b</think><answer>B</answer>", "<think>ab</think>\n\n\\boxed{B}"),
        (
            "R without tags.\n<answer>A</answer> no, <answer>B</answer>",
            "<think>R without tags.\n<answer>A</answer> no,</think>\n\n\\boxed{B}",
        ),
        ("<think>R</think>B", "<think>R</think>\n\nB\n\n\\boxed{B}"),
    ],
)
def test_the_students_target(text, target):
    assert convert_to_boxed(text, "B") == target


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=80),
    st.sampled_from(
        ["", "<think>", "</think>", "<answer>A</answer>", r"\boxed{A}", "$$", "**Answer:** "]
    ),
    st.text(max_size=40) | st.sampled_from(["not", "wrong: ", "I doubt that", "if", "A or"]),
    st.sampled_from("ABCD"),
)
def test_a_target_is_read_back_as_its_own_answer(reasoning, piece, tail, letter):
    response = f"<think>{reasoning}{piece}</think>{tail}{piece}<answer>{letter}</answer>"
    # what denies its own answer is never accepted, so it never becomes a target
    assume(judge(response, QUESTION.letters, letter, think_first=True).status == "correct")
    target = convert_to_boxed(response, letter)
    assert judge(target, QUESTION.letters, letter, think_first=True).status == "correct"
    assert target.count("</think>") == 1 and target.startswith("<think>")
    assert judge(make_direct_target(letter), QUESTION.letters, letter).status == "correct"


@pytest.mark.parametrize(
    "unit", ["$", "*", "*:", "<answer>", "<think>", r"\boxed{", r"\boxed", ": ", "</think>"]
)
def test_a_target_takes_linear_time(unit):
    start = time.process_time()
    assert convert_to_boxed(
        f"<think>R</think>{unit * (200_000 // len(unit))}<answer>B</answer>", "B"
    ).endswith(r"\boxed{B}")
    assert time.process_time() - start < 2
