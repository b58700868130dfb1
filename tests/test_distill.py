"Rejection sampling: what is kept, what is counted, and what happens when nothing is."
import json
import pytest
from octomed.core import OctomedError, read_jsonl
from octomed.distill import accept, accepted, boxed_as, questions, read_samples, samples, subset
from octomed.engines import Sample, Sampling, register_teacher, sample_seed
from octomed.questions import Question, Source, register
from octomed.store import run

QUESTIONS = [Question(f"which is it, {n}?", ("yes", "no", "perhaps"), "B", "toy", "train", "text_only") for n in range(4)]
register(Source("toy", "train", "text_only", "train", make=lambda **_: list(QUESTIONS), revision="1"))


class Toy:
    "Right on every second sample, never on the first question; one of its samples is refused, one is cut off."
    model, name = "toy@1", "simulated"
    def generate(self, requests, sampling):
        for r in requests:
            for i in r.indices:
                right = i % 2 and r.question != QUESTIONS[0].id
                text, finish = f"<think>sample {i}</think>\n\n<answer>{'B' if right else 'A'}</answer>", "stop"
                if i == 2: text, finish = "i cannot answer this", "refused"
                if i == 4: text, finish = "<think>it goes on", "length"
                yield Sample(r.question, self.model, r.prompt, sampling.key, i, text, finish, 7, seed=sample_seed(sampling, r.question, i))


class Hopeless(Toy):
    model = "hopeless@1"
    def generate(self, requests, sampling):
        for s in super().generate(requests, sampling): s.text, s.finish = "<answer>C</answer>", "stop"; yield s


register_teacher("toy/teacher", Toy, "1")
register_teacher("toy/hopeless", Hopeless, "1")


def declared(teacher="toy/teacher", n=16, k=4):
    data = questions(sources=(("toy:train", None, "1"),), against=(), seed=0, max_pixels=12_544)
    drawn = samples(questions=data, teachers={"text": (teacher, "1", "r1")}, n=n, sampling=Sampling())
    return data, drawn, accepted(questions=data, samples=drawn, k=k, answer="letter")


def test_fault_15_a_question_with_none_of_16_accepted_is_counted_and_left_out():
    _, drawn, kept = declared()
    rows, funnel = read_jsonl(run(kept)/"traces.jsonl"), json.loads((run(kept)/"funnel.json").read_text())
    assert funnel["questions_without"] == 1 and QUESTIONS[0].id not in {r["question"] for r in rows}
    assert funnel["pass_count"] == {"0": 1, "8": 3} and len(rows) == 3*4


def test_fault_15_no_trace_at_all_is_an_error_and_leaves_no_artifact():
    *_, kept = declared("toy/hopeless")
    with pytest.raises(OctomedError, match="no sample was accepted"): run(kept)
    assert not kept.folder.exists()


def test_the_funnel_conserves_samples_and_keeps_every_outcome():
    _, drawn, kept = declared()
    funnel = json.loads((run(kept)/"funnel.json").read_text())
    assert funnel["samples"] == 4*16 == sum(funnel["outcomes"].values())
    assert funnel["outcomes"] == {"correct": 24, "wrong": 32, "refused": 4, "truncated": 4}
    assert funnel["kept"] + funnel["over_k"] == funnel["outcomes"]["correct"]
    assert all(len(ss) == 16 for ss in read_samples(run(drawn)).values())


def test_accepted_sets_are_nested_in_k_and_a_later_run_tops_up():
    few = read_jsonl(run(declared(n=8, k=2)[2])/"traces.jsonl")
    many = read_jsonl(run(declared(n=16, k=4)[2])/"traces.jsonl")
    index = lambda rows, q: [r["index"] for r in rows if r["question"] == q]
    for q in QUESTIONS[1:]: assert index(few, q.id) == [1, 3] and index(many, q.id) == [1, 3, 5, 7]


def test_the_box_holds_the_letter_or_the_text():
    assert (boxed_as(QUESTIONS[0], "letter"), boxed_as(QUESTIONS[0], "text")) == ("B", "no")
    with pytest.raises(OctomedError, match="choose letter or text"): boxed_as(QUESTIONS[0], "colour")


def test_subsets_are_nested_and_do_not_depend_on_the_order_of_rows():
    assert subset(QUESTIONS, 2) == subset(QUESTIONS[::-1], 3)[:2]
    assert subset(QUESTIONS, None, seed=1) != subset(QUESTIONS, None, seed=2)
