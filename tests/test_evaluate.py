"Who answers, scores and the rates beside them, the vote, the grader, and shuffled options."

from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import ToyEngine, register_toy_source

import octomed.evaluate.evaluate as module
from octomed.core.files import read_jsonl
from octomed.core.paths import OctomedError, UsageError
from octomed.core.recipe import Common
from octomed.core.store import ExternalInput, run_stage
from octomed.data.questions import Question
from octomed.evaluate.arms import Arm, declare_evaluation
from octomed.evaluate.evaluate import (
    Respondent,
    compute_rates,
    engine_of,
    evaluation,
    find_contender,
    find_paper_accuracies,
    find_respondent,
    sampling_of,
    score_runs,
    score_votes,
    score_with_grader,
    shuffle_options,
    student_of,
)
from octomed.evaluate.results import Results
from octomed.evaluate.stats import load_paper_table
from octomed.evaluate.tables import tabulate_scores
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.engines import register_teacher
from octomed.generate.prompts import (
    list_templates,
    load_contenders,
    load_template,
    make_prompt_key,
    write_messages,
)
from octomed.generate.samples import Request, Sampling

QS = [
    Question(
        stem=f"which is it, {n}?",
        options=("one", "two", "three", "four"),
        answer="ABCD"[n % 4],
        source="toybench",
        split="test",
        category="text_only",
    )
    for n in range(8)
]
register_toy_source("toybench", "test", "benchmark", QS)
texts = st.lists(
    st.text(min_size=1).map(str.strip).filter(bool), min_size=1, max_size=10, unique=True
)


@given(texts, st.data(), st.integers(0, 3))
def test_fault_44_shuffling_keeps_the_options_and_moves_the_right_one(options, data, seed):
    q = Question(
        stem="which?",
        options=tuple(options),
        answer=data.draw(st.sampled_from("ABCDEFGHIJ"[: len(options)])),
        source="s",
        split="test",
        category="text_only",
    )
    s = shuffle_options(q, seed)
    assert sorted(s.options) == sorted(q.options)
    assert s.answer_text == q.answer_text
    assert s.stem == q.stem
    assert len(options) == 1 or (s.answer != q.answer and s.id != q.id)
    assert shuffle_options(q, seed) == s


class Knows(ToyEngine):
    "Says the right option's text."

    def __init__(self, *_, **__):
        self.model = f"{type(self).__name__}@1"

    def say(self, question):
        return question.answer_text

    def answer(self, request, index):
        text = request.messages[-1]["content"][-1]["text"]
        q = next(q for q in QS if q.stem in text)
        order = tuple(sorted(q.options, key=text.index))
        asked = replace(q, options=order, answer="ABCD"[order.index(q.answer_text)])
        return f"<think>x</think>\n\n\\boxed{{{self.say(asked)}}}", "stop", 5


class FirstPlace(Knows):
    "Says whatever stands first."

    def say(self, question):
        return question.options[0]


def read_with(engine, monkeypatch, control=0, seeds=2, **more):
    monkeypatch.setattr(module, "TransformersEngine", engine)
    monkeypatch.setattr(module, "student_identity", lambda s: engine.__name__)
    s = evaluation(
        student=engine.__name__,
        benchmark="toybench:test",
        limit=None,
        form="cot",
        seeds=seeds,
        sampling=Sampling(),
        max_pixels=12_544,
        data="1",
        control=control,
        **more,
    )
    return sorted(
        read_jsonl(run_stage(s) / "rows.jsonl"),
        key=lambda r: [q.id for q in QS].index(r["question"]),
    )


def test_fault_44_the_control_is_reported_beside_the_score(monkeypatch):
    r = compute_rates(read_with(Knows, monkeypatch, 8))
    assert (r["in_order"], r["shuffled"], r["moved"]) == (1, 1, 0)


def test_fault_44_a_student_that_answers_by_place_is_unmasked(monkeypatch):
    rows = read_with(FirstPlace, monkeypatch, 8)
    r = compute_rates(rows)
    assert score_runs(rows).mean() == 0.25
    assert r["in_order"] == 0.25
    assert r["moved"] > 0.5
    assert r["shuffled"] < 0.6


def test_fault_44_the_control_leaves_the_score_alone_and_asks_only_what_it_says(monkeypatch):
    with_, without = read_with(FirstPlace, monkeypatch, 3), read_with(FirstPlace, monkeypatch, 0)
    assert score_runs(with_).tolist() == score_runs(without).tolist()
    assert sum("shuffled" in r for r in with_) == 3
    assert "shuffled" not in compute_rates(without)


def row(**changed):
    return {
        "question": "q",
        "statuses": ["correct"],
        "letters": ["A"],
        "forced": [False],
        "tokens": [3],
        "options": 2,
        **changed,
    }


def test_fault_40_a_forced_exit_is_counted():
    assert compute_rates([row(), row(forced=[True])])["forced_exit"] == 0.5


def request(q, template, indices=(0,)):
    "What an engine is asked about a question."
    messages = write_messages(template, q)
    return Request(
        question=q.id,
        messages=messages,
        prompt=make_prompt_key(messages, template),
        indices=indices,
    )


def kept(student, folder):
    for part in student:
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pictured", [False, True])
def test_fault_39_evaluation_reads_the_prompt_that_training_read(
    student, picture, tmp_path, pictured
):
    import torch

    from octomed.generate.render import PixelCache, collate, render_row

    q = replace(QS[0], images=(picture,)) if pictured else QS[0]
    t = load_template("cot")
    engine = TransformersEngine(kept(student, tmp_path), "tiny", 12_544)
    seen = []
    generate = engine.net.generate
    engine.net.generate = lambda **kw: seen.append(kw) or generate(**kw)
    list(engine.generate([request(q, t)], Sampling(max_tokens=2)))
    trained = render_row(
        engine.processor,
        write_messages(t, q),
        "<think>one</think>\n\n\\boxed{one}",
        max_pixels=12_544,
    )
    assert seen[0]["input_ids"].tolist() == [trained.input_ids[: trained.prompt]]
    assert seen[0]["attention_mask"].all()
    pixels = PixelCache(engine.processor, 12_544)
    batch = collate(engine.processor, [trained.input_ids], [trained.images], pixels=pixels)
    assert ("pixel_values" in batch) == pictured
    for key in ("pixel_values", "image_grid_thw") if pictured else ():
        assert torch.equal(seen[0][key], batch[key])
    assert seen[0]["mm_token_type_ids"].tolist() == [
        batch["mm_token_type_ids"][0, : trained.prompt].tolist()
    ]


def test_fault_40_a_forced_exit_never_passes_its_budget(student, tmp_path):
    t, engine = load_template("cot"), TransformersEngine(kept(student, tmp_path), "tiny", 12_544)
    asked = [request(q, t, indices=(0, 1)) for q in QS[:2]]
    drawn = list(engine.generate(asked, Sampling(1.0, 1.0, max_tokens=6, answer_tokens=4)))
    forced = [s for s in drawn if s.answer_tokens]
    assert forced, "a student that knows nothing ends no thought in six tokens"
    assert all(s.answer_tokens <= 4 and s.tokens - s.answer_tokens <= 6 for s in drawn)
    assert all("</think>" in s.text for s in forced)


def test_fault_41_the_same_runs_give_the_same_rates(monkeypatch):
    assert compute_rates(read_with(FirstPlace, monkeypatch, 8)) == compute_rates(
        read_with(FirstPlace, monkeypatch, 8)
    )


def test_fault_41_five_seeds_give_the_same_aggregate_in_another_store(
    student, tmp_path, monkeypatch
):
    folder, runs = kept(student, tmp_path / "s"), []
    for n, seeds in enumerate((5, 5, 2)):
        monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / str(n)))
        s = evaluation(
            student=ExternalInput(folder),
            benchmark="toybench:test",
            limit=None,
            form="cot",
            seeds=seeds,
            sampling=Sampling(max_tokens=12, answer_tokens=4),
            max_pixels=12_544,
            data="1",
        )
        runs.append(read_jsonl(run_stage(s) / "rows.jsonl"))
    assert runs[0] == runs[1]
    assert compute_rates(runs[0]) == compute_rates(runs[1])
    assert len({tuple(r["tokens"]) for r in runs[0]}) > 1
    assert [r["letters"][:2] for r in runs[0]] == [r["letters"] for r in runs[2]], (
        "a later seed only adds"
    )


class Wavers(Knows):
    "Right in seven of ten runs, else says `one`."

    def answer(self, request, index):
        if index % 3 == 1:
            return "<think>x</think>\n\n\\boxed{one}", "stop", 5
        return super().answer(request, index)


def test_a_vote_begins_with_the_runs_and_stands_beside_them(monkeypatch):
    plain = read_with(Wavers, monkeypatch, seeds=5)
    rows = read_with(Wavers, monkeypatch, seeds=5, vote=10)
    assert [{k: v for k, v in r.items() if k != "vote"} for r in rows] == plain
    assert all(len(r["vote"]) == 10 and r["vote"][:5] == r["letters"] for r in rows)
    assert score_votes(rows).shape == (8, 1)
    assert score_votes(rows).mean() == 1
    assert score_runs(rows).mean() == pytest.approx(
        0.7
    )  # three of five, and all of the two questions where `one` is right
    assert score_votes(plain).ravel().tolist() == score_runs(plain).mean(1).tolist()


def test_fault_42_a_tied_vote_is_broken_by_the_seed_alone(monkeypatch):
    rows = [row(question=str(n), answer="A", vote=["A"] * 5 + ["B"] * 5) for n in range(400)]
    assert compute_rates(rows)["ties"] == 1
    assert (
        score_votes(rows, 1).tolist()
        == score_votes(rows, 1).tolist()
        != score_votes(rows, 2).tolist()
    )
    assert 0.4 < score_votes(rows).mean() < 0.6


def test_both_overalls_stand_in_the_table():
    def run_of(vote):
        return [
            row(
                question=str(n),
                answer="A",
                statuses=["correct", "wrong"],
                letters=["A", "B"],
                **({"vote": ["A", "B", "A"]} if vote else {}),
            )
            for n in range(6)
        ]

    register_toy_source("otherbench", "test", "benchmark", QS)
    rows = tabulate_scores(
        Results(
            Common(bootstrap=200),
            {"m": {"toybench:test": [run_of(True)], "otherbench:test": [run_of(False)]}},
        )
    )
    by = {r["benchmark"]: r for r in rows}
    assert (
        by["toybench:test"]["accuracy"],
        by["toybench:test"]["vote"],
        by["toybench:test"]["votes"],
    ) == (0.5, 1.0, 3)
    assert "vote" not in by["otherbench:test"]
    assert (by["Overall"]["accuracy"], by["Overall"]["vote"]) == (0.5, 0.75)
    assert by["Overall"]["vote_interval"] == [0.75, 0.75]


class Fails(Knows):
    "Says `one`, then fails in every way, question after question."

    WAYS: ClassVar[list[tuple[str, str]]] = [
        ("<think>x</think>\n\n\\boxed{one}", "stop"),
        ("I cannot help with that.", "refused"),
        ("the prompt is too long", "error"),
        ("<think>and then", "length"),
        ("<think>x</think>\n\nit is the first", "stop"),
    ]

    def answer(self, request, index):
        text, finish = self.WAYS[[q.id for q in QS].index(request.question) % 5]
        return text, finish, 5


def test_fault_43_whatever_fails_is_wrong_and_stays_in_the_count(monkeypatch):
    rows = read_with(Fails, monkeypatch, seeds=1)
    assert len(rows) == len(QS)
    assert [r["finishes"][0] for r in rows[:5]] == [
        "stop",
        "refused",
        "error",
        "length",
        "stop",
    ]
    assert score_runs(rows).ravel().tolist() == [
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]  # question 5 has its right option elsewhere
    r = compute_rates(rows)
    assert (r["failed"], r["truncated"], r["unparsed"]) == (4 / 8, 1 / 8, 1 / 8), (
        "a refusal and an error are neither cut nor unreadable"
    )


class Reads(ToyEngine):
    "A grader that says yes to every response, and keeps what it was asked."

    model = "reads@1"
    asked: ClassVar[list[str]] = []

    def answer(self, request, index):
        self.asked.append(request.messages[-1]["content"][-1]["text"])
        return "<verdict>yes</verdict>", "stop", 0


def test_a_grader_reads_what_is_unparsed_and_its_number_stands_beside(monkeypatch):
    register_teacher("toy/reads", Reads, "1")
    rows = read_with(Fails, monkeypatch, seeds=1, grader="toy/reads", revision="1")
    assert len(Reads.asked) == 1
    assert "it is the first" in Reads.asked[0]
    assert "A: one" in Reads.asked[0]  # no refusal, no error, nothing cut
    assert score_runs(rows).sum() == 1
    assert score_with_grader(rows).sum() == 2
    assert rows[4]["statuses"] == ["unparsed"]
    assert rows[4]["graded"] == ["correct"]
    shown = next(
        r
        for r in tabulate_scores(Results(Common(bootstrap=100), {"m": {"toybench:test": [rows]}}))
        if r["benchmark"] == "toybench:test"
    )
    assert shown["accuracy"] == 1 / 8
    assert shown["graded"] == 2 / 8


def test_an_arm_says_where_it_is_voted_on_and_graded():
    import octomed.clinic.graders  # registers the grader
    import octomed.clinic.students  # registers the students
    import octomed.clinic.teachers  # noqa: F401 - registers the teachers

    common = Common(
        train=("clinic_ward:train",), benchmarks=("clinic_ward:test", "clinic_boards:test")
    )
    arm = Arm((("clinic_ward:train", 5),))
    asks = replace(arm, votes=(("clinic_ward:test", 10),), graded=True)
    assert [declare_evaluation(asks, b, common).params["vote"] for b in common.benchmarks] == [
        10,
        0,
    ]
    assert declare_evaluation(asks, "clinic_ward:test", common).params["grader"] == "clinic/grader"
    assert (
        declare_evaluation(asks, "clinic_ward:test", common).params["student"]
        == declare_evaluation(arm, "clinic_ward:test", common).params["student"]
    )
    assert declare_evaluation(arm, "clinic_ward:test", common) == declare_evaluation(
        replace(arm, votes=(("clinic_boards:test", 10),)), "clinic_ward:test", common
    )


# Who answers


def test_every_model_of_table_2_is_found_and_has_its_template():
    columns = [k for k in load_paper_table(2)[0] if k not in ("category", "task")]
    assert set(load_contenders()) - {"OctoMed-4B", "OctoMed-32B"} == set(columns)
    for c in (c for c in load_contenders().values() if c.name in columns):
        at = "1f2e" if c.hub else "HOUSE"
        asked, form = find_respondent(f"{c.name}@{at}")
        assert form == c.template
        assert form in list_templates()
        assert asked.path == (f"transformers:{c.hub}@1f2e" if c.hub else f"openai:{c.api}@HOUSE")
        assert all(find_contender(n) == c for n in (c.name, c.hub, c.api) if n)
        if c.hub:
            assert (
                find_respondent(f"{c.hub}@1f2e") == (asked, form)
                or find_respondent(f"{c.hub}@1f2e")[0].path == asked.path
            )
        assert find_paper_accuracies(c.name, ["pmc_vqa:test"]) or c.name == "DeepSeek-R1"
    assert (
        find_respondent("openai:DeepSeek-R1@DEEPSEEK")[0].path
        == "openai:deepseek-reasoner@DEEPSEEK"
    )
    assert find_respondent("openai:OctoMed-7B@HOUSE")[0].path == "openai:OctoMed/OctoMed-7B@HOUSE"


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "OctoMed-7B",
            "OctoMed-7B is OctoMed/OctoMed-7B on the hub: pin its revision, "
            "transformers:OctoMed-7B@REVISION",
        ),
        ("vllm:someone/model", "pin its revision, vllm:someone/model@REVISION"),
        ("GPT-4o", "is reached by a server: write openai:GPT-4o@SERVER"),
        ("openai:QoQ-Med-7B", "write openai:QoQ-Med-7B@SERVER"),
    ],
)
def test_a_model_without_revision_or_server_is_asked_for_it(name, says):
    with pytest.raises(UsageError) as e:
        student_of(name, Common())
    assert says in str(e.value)


def test_how_a_model_is_run_is_in_no_key(monkeypatch):
    a, b = (Respondent(f"{k}:org/model@1f2e") for k in ("vllm", "transformers"))

    def key(s):
        return evaluation(
            student=s,
            benchmark="toybench:test",
            limit=None,
            form="cot",
            seeds=1,
            sampling=Sampling(),
            max_pixels=12_544,
            data="1",
        ).key

    assert key(a) == key(b) != key(Respondent("vllm:org/model@2"))
    before = key("org/model@1f2e")
    monkeypatch.setenv("OCTOMED_ENGINE", "vllm")
    assert key("org/model@1f2e") == before
    assert find_respondent("OctoMed-7B@1f2e")[0].path == "vllm:OctoMed/OctoMed-7B@1f2e"
    monkeypatch.setenv("OCTOMED_ENGINE", "vlm")
    with pytest.raises(UsageError, match="OCTOMED_ENGINE=vlm is no engine"):
        engine_of("org/model@1", 12_544)


def test_a_registered_teacher_is_evaluated_under_its_own_identity(monkeypatch):
    register_teacher("toy/knows", Knows, "1")
    s = evaluation(
        student=student_of("toy/knows", Common())[0],
        benchmark="toybench:test",
        limit=3,
        form="cot",
        seeds=1,
        sampling=Sampling(),
        max_pixels=12_544,
        data="1",
    )
    assert s.params["student"].key == "Knows@1"
    assert score_runs(read_jsonl(run_stage(s) / "rows.jsonl")).tolist() == [[1]] * 3


def test_a_model_that_is_nowhere_is_one_sentence():
    with pytest.raises(OctomedError, match="the model nobody/nothing@1 cannot be loaded"):
        engine_of("nobody/nothing@1", 12_544)


def test_a_forced_exit_can_be_left_out():
    common = Common(answer_tokens=8)
    assert [
        sampling_of(common, think, n).answer_tokens
        for think, n in ((True, None), (False, None), (True, 0), (True, 3))
    ] == [8, 0, 0, 3]


def test_the_papers_overall_stands_beside_ours_only_where_all_its_rows_do():
    every = [b for b in module.TASKS if b != "nejm:test"]
    assert {"text_only", "multimodal_classification"} == set(
        find_paper_accuracies("LingShu-7B", every)
    ) & {
        "text_only",
        "multimodal_reasoning",
        "multimodal_classification",
    }


def test_a_student_is_named_by_its_key_or_content_and_never_by_a_path(tmp_path):
    from octomed.distill.sampling import student_identity

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights").write_text("1")
    first = student_identity(tmp_path / "mine")
    (tmp_path / "mine" / "weights").write_text("22")
    assert first.startswith("mine@")
    assert str(tmp_path) not in first
    assert student_identity(tmp_path / "mine") != first
    assert student_identity("org/model") == "org/model"
    (tmp_path / "mine" / "card.json").write_text('{"key": "abc"}')
    assert student_identity(tmp_path / "mine") == "abc"
