"""Teachers by name, and the vLLM engine's own part, with a stand-in for vLLM.

`test_vllm.py` has the real vLLM."""

import json
import sys
import types

import pytest
from toys import ask

from octomed.core.paths import OctomedError
from octomed.generate import engines
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.engine_vllm import VLLMEngine
from octomed.generate.engines import FORCED, find_teacher_revision, load_teacher
from octomed.generate.models import TextProcessor
from octomed.generate.samples import Request, Sampling, derive_sample_seed
from octomed.train.students import save_student


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    save_student(path, *student, [])
    return path


class Core:
    """vLLM's engine, as far as ours knows it.

    Every request takes as many steps as its seed's last digit, and answers with its seed."""

    def __init__(self):
        self.open, self.aborted, self.most, self.refuse = {}, [], 0, lambda prompt, p: None

    def add_request(self, number, prompt, p):
        if why := self.refuse(prompt, p):
            raise ValueError(why)
        assert number not in self.open
        self.open[number] = [p.seed % 10, p, prompt]
        self.most = max(self.most, len(self.open))

    def step(self):
        for o in self.open.values():
            o[0] -= 1
        return [
            self.output(n, *self.open.pop(n)[1:])
            for n, (left, *_) in list(self.open.items())
            if left < 0
        ]

    def output(self, number, p, prompt):
        ids = list(range(p.max_tokens))
        out = types.SimpleNamespace(
            text=f"seed {p.seed}",
            token_ids=ids,
            finish_reason="length" if p.seed % 2 == 0 else "stop",
            logprobs=[{i: types.SimpleNamespace(logprob=-0.5)} for i in ids],
        )
        return types.SimpleNamespace(request_id=number, finished=True, outputs=[out])

    def abort_request(self, numbers):
        self.aborted += numbers


@pytest.fixture
def stand_in(monkeypatch, folder):
    "A `VLLMEngine` on a stand-in."
    core, given = Core(), {}

    class LLM:
        llm_engine = core
        renderer = types.SimpleNamespace(render_cmpl=lambda prompts: prompts)
        model_config = types.SimpleNamespace(max_model_len=200, get_vocab_size=lambda: 500)

        def __init__(self, path, **options):
            given.update(options, path=path)

    modules = {
        "vllm": types.SimpleNamespace(
            LLM=LLM, SamplingParams=lambda **kw: types.SimpleNamespace(**kw)
        ),
        "vllm.platforms": types.SimpleNamespace(
            current_platform=types.SimpleNamespace(is_cpu=lambda: True)
        ),
        "vllm.sampling_params": types.SimpleNamespace(
            RequestOutputKind=types.SimpleNamespace(FINAL_ONLY="final")
        ),
    }
    for name, m in modules.items():
        monkeypatch.setitem(sys.modules, name, m)
    engine = VLLMEngine(folder, "tiny@1", max_pixels=12_544, ahead=8)
    engine.core, engine.given = core, given
    return engine


DRAWN = Sampling(temperature=1.0, max_tokens=6)


def test_samples_come_as_they_finish_and_answer_to_their_own_seed(stand_in):
    samples = list(stand_in.generate([ask("q1", 16), ask("q2", 16)], DRAWN))
    assert {(s.question, s.index) for s in samples} == {
        (q, i) for q in ("q1", "q2") for i in range(16)
    }
    assert all(
        s.text == f"seed {derive_sample_seed(DRAWN, s.question, s.index)}"
        and s.seed == derive_sample_seed(DRAWN, s.question, s.index)
        for s in samples
    )
    assert [s.index for s in samples if s.question == "q1"] != list(range(16)), (
        "a short response does not wait for a long one"
    )
    assert stand_in.core.most == 8, "no more than `ahead` are handed over"


def test_fault_12_what_vllm_refuses_is_an_error_sample_and_the_others_go_on(stand_in):
    stand_in.core.refuse = lambda prompt, p: (
        "vLLM will not" if p.seed == derive_sample_seed(DRAWN, "q2", 1) else None
    )
    samples = {
        (s.question, s.index): s
        for s in stand_in.generate(
            [ask("q1", 3), ask("long", 2, "one " * 300), ask("q2", 3)], DRAWN
        )
    }
    assert len(samples) == 8
    assert {k for k, s in samples.items() if s.finish == "error"} == {
        ("long", 0),
        ("long", 1),
        ("q2", 1),
    }
    assert "no room" in samples["long", 0].text and samples["q2", 1].text == "vLLM will not"
    assert all(s.text == f"seed {s.seed}" for s in samples.values() if s.finish != "error")


def test_fault_40_a_forced_exit_is_one_sample_with_two_counts(stand_in):
    s = Sampling(temperature=1.0, max_tokens=6, answer_tokens=5)
    for x in stand_in.generate([ask("q1", 16)], s):
        late = x.seed % 2 == 0
        assert x.text == (f"seed {x.seed}{FORCED}seed {x.seed ^ 1}" if late else f"seed {x.seed}")
        assert (x.tokens, x.answer_tokens, x.finish) == (
            (11, 5, "stop") if late else (6, 0, "stop")
        )


def test_a_second_pass_without_room_leaves_the_thought_cut(stand_in):
    s = Sampling(temperature=1.0, max_tokens=6, answer_tokens=5)
    stand_in.core.refuse = lambda prompt, p: "no room" if p.max_tokens == 5 else None
    cut = [x for x in stand_in.generate([ask("q1", 16)], s) if x.seed % 2 == 0]
    assert cut and all(
        (x.text, x.finish, x.tokens, x.answer_tokens) == (f"seed {x.seed}", "length", 6, 0)
        for x in cut
    )


def test_seconds_of_the_samples_add_up_to_the_time_of_the_steps(stand_in):
    import time

    step, took = stand_in.core.step, []

    def timed():
        start = time.perf_counter()
        time.sleep(0.002)
        out = step()
        took.append(time.perf_counter() - start)
        return out

    stand_in.core.step = timed
    assert sum(s.seconds for s in stand_in.generate([ask("q1", 16)], DRAWN)) == pytest.approx(
        sum(took), rel=0.1
    )


def test_what_is_running_when_the_caller_stops_is_aborted(stand_in):
    samples = stand_in.generate([ask("q1", 100)], DRAWN)
    next(samples)
    samples.close()
    assert len(stand_in.core.aborted) == 7 and set(stand_in.core.aborted) == set(stand_in.core.open)


def test_what_vllm_is_told(stand_in):
    stand_in.logprobs = True
    p = stand_in._params(Sampling(stop=("x",)), 7, 9)
    assert (
        p.seed,
        p.max_tokens,
        p.repetition_penalty,
        p.stop,
        p.include_stop_str_in_output,
        p.logprobs,
    ) == (7, 9, 1.0, ["x"], True, 0)
    assert (
        stand_in.given["generation_config"] == "vllm"
        and stand_in.given["trust_remote_code"] is False
        and stand_in.given["enable_prefix_caching"] is True
    )
    assert all(
        json.loads(s.logprobs) == [-0.5] * s.tokens
        for s in stand_in.generate([ask("q1", 2)], DRAWN)
    )


def test_f20_vllm_is_told_which_tokens_stand_for_images(stand_in, folder):
    from octomed.generate.render import list_image_ids, list_image_marks

    ids = list_image_ids(stand_in.processor)
    assert len(ids) >= 3
    assert stand_in._params(Sampling(), 7, 9).logit_bias == dict.fromkeys(ids, -100.0)
    guesses = {"speculative_config": {"model": "a smaller one"}}
    guessing = VLLMEngine(folder, "tiny@1", max_pixels=12_544, **guesses)._params(Sampling(), 7, 9)
    assert guessing.bad_words == list_image_marks(stand_in.processor)
    assert not hasattr(guessing, "logit_bias")


def test_the_prompt_is_the_one_of_the_transformers_engine(stand_in, folder, picture):
    from octomed.generate.render import write_chat

    other = TransformersEngine(folder, "tiny@1", max_pixels=12_544)
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "the user"}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "which is it ?"},
            ],
        },
    ]
    for messages in (chat, [*chat[:1], {"role": "user", "content": chat[1]["content"][1:]}]):
        _text, images, size = stand_in._prompt(messages)
        assert size == len(
            other.processor.tokenizer(write_chat(other.processor, messages, 12_544))["input_ids"]
        )
        assert images == [
            p["image"] for m in messages for p in m["content"] if p["type"] == "image"
        ]
    assert {s.prompt_tokens for s in other.generate([ask("q1", 2)], DRAWN)} == {
        s.prompt_tokens for s in stand_in.generate([ask("q1", 2)], DRAWN)
    }


def test_a_text_model_is_given_plain_text_and_refuses_images(stand_in, student, picture):
    stand_in.processor = TextProcessor(stand_in.tokenizer)
    stand_in.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    assert stand_in._prompt(ask("q1").messages)[0] == "user: which is it ?"
    with pytest.raises(OctomedError, match="reads no images: name another teacher_image"):
        stand_in._prompt([{"role": "user", "content": [{"type": "image", "image": picture}]}])


def test_a_recipe_names_its_teachers(monkeypatch):
    calls = []

    def make(*args, **kw):
        calls.append((args, kw))

    monkeypatch.setattr("octomed.generate.engine_vllm.VLLMEngine", make)
    load_teacher("vllm:Qwen/Qwen2.5-VL-7B-Instruct@cc594898", max_pixels=12_544)
    assert calls == [
        (
            ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct@cc594898", 12_544),
            {"revision": "cc594898"},
        )
    ]
    assert (
        find_teacher_revision("vllm:Qwen/Qwen2.5-VL-7B-Instruct@cc594898") == "cc594898"
        and find_teacher_revision("openai:gpt-4o@AZURE") == ""
    )
    monkeypatch.setitem(engines.TEACHERS, "mine", (lambda: "an engine", "r1"))
    assert load_teacher("mine") == "an engine" and find_teacher_revision("mine") == "r1"


@pytest.mark.parametrize(
    "name, says",
    [
        ("nobody", "choose from"),
        ("other:a@b", "choose from"),
        ("vllm:Qwen/Qwen2.5-VL-7B-Instruct", "vllm:MODEL@REVISION"),
        ("openai:gpt-4o", "openai:MODEL@SERVER"),
        ("vllm:@x", "not whole"),
    ],
)
def test_a_name_that_is_no_teacher_says_how_to_write_one(name, says):
    with pytest.raises(OctomedError, match=says):
        load_teacher(name)
    with pytest.raises(OctomedError, match=says):
        find_teacher_revision(name)


def test_without_vllm_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(OctomedError, match="install octomed with its `vllm` extra"):
        VLLMEngine("a-model", "a-model@1")


def test_f20_a_question_with_a_token_of_the_model_is_an_error_sample(folder):
    engine = TransformersEngine(folder, "tiny@1", max_pixels=12_544)
    asked = [
        Request(
            "q1",
            [{"role": "user", "content": [{"type": "text", "text": "What is <|image_pad|> ?"}]}],
            "p",
        ),
        Request(
            "q2", [{"role": "user", "content": [{"type": "text", "text": "which is it ?"}]}], "p"
        ),
    ]
    samples = {s.question: s for s in engine.generate(asked, Sampling(max_tokens=3))}
    assert samples["q1"].finish == "error"
    assert "<|image_pad|>, which is a token of the model's own" in samples["q1"].text
    assert samples["q2"].finish != "error"


def test_f20_a_model_never_writes_the_tokens_of_an_image(folder):
    import torch

    engine = TransformersEngine(folder, "tiny@1", max_pixels=12_544)
    head = engine.net.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        head.weight[engine.unwritten] = 1.0
        engine.net.model.language_model.norm.weight.fill_(1.0)
    asked = [
        Request(
            "q",
            [{"role": "user", "content": [{"type": "text", "text": "which is it ?"}]}],
            "p",
            tuple(range(8)),
        )
    ]
    counts = []
    tokenizer, decode = engine.processor.tokenizer, engine.processor.tokenizer.decode

    def watch(ids, **options):
        counts.append(len(set(ids) & set(engine.unwritten)))
        return decode(ids, **options)

    tokenizer.decode = watch
    list(engine.generate(asked, Sampling(max_tokens=6, top_p=1.0, temperature=1.0)))
    assert len(counts) >= 8 and not any(counts)


def test_a_forced_exit_ends_the_thought_by_the_mark_of_its_model():
    from octomed.generate.engines import FORCED, begin_forced_exit

    sampling = Sampling(max_tokens=8, answer_tokens=4)
    ended = {
        "<think>It may": "<think>It may" + FORCED,
        "It may": "It may" + FORCED,
        "<thinking>It may": "<thinking>It may\n</thinking>\n\n",
        "◁think▷It may": "◁think▷It may\n◁/think▷\n\n",
        "## Thinking\n\nIt may": "## Thinking\n\nIt may\n## Final Response\n\n",
    }
    for text, beginning in ended.items():
        assert begin_forced_exit(text, "length", sampling) == beginning
        assert begin_forced_exit(beginning + "B", "length", sampling) is None
        assert begin_forced_exit(text, "stop", sampling) is None
    own = {"sampling": sampling, "end_of_think": "=== over ==="}
    assert begin_forced_exit("It may", "length", **own) == "It may\n=== over ===\n\n"
    assert begin_forced_exit("It may\n=== over ===\n\nB", "length", **own) is None
