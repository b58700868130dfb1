"""A real vLLM engine and a real vLLM server, on a CPU, with a small Qwen2.5-VL and images.

Needs the environment that `python tests/vllm_env.py` makes; skipped without it."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from toys import chat

from octomed.core.paths import OctomedError, root
from octomed.generate.engine_openai import OpenAIEngine
from octomed.generate.engine_transformers import TransformersEngine, _complete
from octomed.generate.engines import FORCED, ChatPrompt, begin_forced_exit, choose_likeliest
from octomed.generate.forced_choice import write_continuations
from octomed.generate.render import list_image_ids
from octomed.generate.samples import Request, Sampling, derive_sample_seed
from octomed.train.students import save_student

PYTHON = Path(os.environ.get("OCTOMED_VLLM") or root() / ".venv-vllm") / "bin" / "python"
pytestmark = [
    pytest.mark.skipif(
        not PYTHON.exists(), reason="vLLM's environment is not made: python tests/vllm_env.py"
    ),
    pytest.mark.timeout(900),
]

WORDS = "which is it ? one two three fever rash the option is user assistant : - ."
GREEDY, DRAWN = Sampling(temperature=0, max_tokens=24), Sampling(temperature=1.0, max_tokens=24)
FORCES = Sampling(temperature=1.0, max_tokens=6, answer_tokens=5)
BUDGET, ANSWER = 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A student whose answers vary, with a generation config of the kind that Qwen2.5-VL ships."
    import torch

    from octomed.clinic.students import Size, build_student

    model, processor = build_student([WORDS], Size(128, 2, 4, 2, 256, 64, 2), 0, 12_544)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "layers" in name:
                p.mul_(4)
    path = tmp_path_factory.mktemp("student")
    save_student(path, model, processor, [])
    config = path / "generation_config.json"
    config.write_text(
        json.dumps(
            {
                **json.loads(config.read_text()),
                "do_sample": True,
                "repetition_penalty": 1.5,
                "temperature": 0.1,
                "top_k": 1,
            }
        )
    )
    return path


@pytest.fixture(scope="module")
def pictures():
    from PIL import Image

    from octomed.data.images import store_image

    return [
        store_image(Image.effect_noise((120 + 40 * n, 100), 60).convert("RGB"), max_pixels=12_544)
        for n in range(3)
    ]


def ask(name, n=1, text="which is it ?", images=(), indices=None):
    return Request(name, chat(text, *images), f"prompt of {name}", tuple(indices or range(n)))


@pytest.fixture(scope="module")
def asked(pictures):
    "What every engine is asked."
    single = [
        ask(f"t{n}", text=t)
        for n, t in enumerate(("which is it ?", "one two", "the option is three . which ?"))
    ] + [ask(f"i{n}", images=pictures[: n + 1]) for n in range(3)]
    many = [ask("i0", 16, images=pictures[:1]), ask("t0", 16)]
    return {
        "greedy": (single, GREEDY),
        "many": (many, DRAWN),
        "some": (
            [ask("i0", images=pictures[:1], indices=(3, 11)), ask("t0", indices=(0, 15))],
            DRAWN,
        ),
        "long": (
            [ask("t0", 2), ask("long", 2, "one " * 3000), ask("i0", 2, images=pictures[:1])],
            DRAWN,
        ),
        "forced": ([ask("i0", 12, images=pictures[:1])], FORCES),
        "stops": (
            [ask("t0", 8)],
            Sampling(temperature=1.0, max_tokens=24, stop=(" option", "fever")),
        ),
        "thoughts": (
            [
                ask(f"c{n}", text=" ".join(WORDS.split()[n % 13 : n % 13 + 2 + n // 13]))
                for n in range(104)
            ],
            None,
        ),
        "twice": ([ask("t0", 2), ask("t0", 2)], DRAWN),
    }


def list_scored(asked) -> list:
    "(text, or messages and a beginning; continuations): with pictures, thoughts, and without."
    thoughts = ("", "<think>it is the rash .</think>", "<think>fever\n</think>")
    boxes = ["A", "fever", "the rash", "which option is it"]
    pairs = [("the option is", [" fever", " the rash - fever", " one"])]
    for n, request in enumerate(asked["greedy"][0]):
        thought = thoughts[n % 3]
        pairs.append(([request.messages, thought], write_continuations(thought, boxes)))
    return pairs


@pytest.fixture(scope="module")
def started(folder, asked, tmp_path_factory):
    """One vLLM server, and one vLLM engine in its own process, both started at once.

    Gives the server's address, the engine's answers and the folder of both."""
    place = tmp_path_factory.mktemp("vllm")
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CONFIG_ROOT": str(place),
        "VLLM_CACHE_ROOT": str(place),
    }

    def rows(requests):
        return [
            {
                "question": r.question,
                "messages": r.messages,
                "prompt": r.prompt,
                "indices": r.indices,
            }
            for r in requests
        ]

    jobs = {name: {"requests": rows(r), "sampling": vars(s)} for name, (r, s) in asked.items() if s}
    jobs["left early"] = {**jobs["many"], "take": 3}
    (place / "jobs.json").write_text(
        json.dumps(
            {
                "generate": jobs,
                "fan": asked["greedy"][0][-1].messages,
                "scored": list_scored(asked),
                "thoughts": [r.messages for r in asked["thoughts"][0]],
                "budget": BUDGET,
                "answer": ANSWER,
            }
        )
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    serve = [
        str(PYTHON),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "32",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--block-size",
        "32",
        "--distributed-executor-backend",
        "uni",
    ]
    with open(place / "server.log", "w") as a, open(place / "engine.log", "w") as b:
        server = subprocess.Popen(serve, env=env, stdout=a, stderr=a, start_new_session=True)
        worker = subprocess.Popen(
            [
                str(PYTHON),
                str(root() / "tests" / "vllm_worker.py"),
                str(folder),
                str(place / "jobs.json"),
                str(place / "out.json"),
            ],
            env=env,
            stdout=b,
            stderr=b,
            start_new_session=True,
        )

    def tail(name):
        return (place / name).read_text()[-2000:]

    try:
        assert worker.wait(600) == 0, tail("engine.log")
        for _ in range(600):
            assert server.poll() is None, tail("server.log")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise AssertionError(f"the server did not come up: {tail('server.log')}")
        yield f"http://127.0.0.1:{port}/v1", json.loads((place / "out.json").read_text()), place
    finally:
        for p in (server, worker):
            if p.poll() is None:
                os.killpg(p.pid, 15)
            try:
                p.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, 9)
                p.wait()


@pytest.fixture(scope="module")
def offline(started):
    "The engine's samples of a job, by question and index."
    return lambda name: {(s["question"], s["index"]): s for s in started[1][name]}


@pytest.fixture(scope="module")
def served(started):
    os.environ["TINY_BASE_URL"] = started[0]
    yield OpenAIEngine("tiny", "TINY", max_pixels=12_544, logprobs=True)
    del os.environ["TINY_BASE_URL"]


@pytest.fixture(scope="module")
def here(folder):
    return TransformersEngine(folder, "tiny@1", max_pixels=12_544)


def ran(engine, job):
    return {(s.question, s.index): vars(s) for s in engine.generate(*job)}


def same(a, b, *names):
    assert {k: [s[n] for n in names] for k, s in a.items()} == {
        k: [s[n] for n in names] for k, s in b.items()
    }


def test_fault_37_a_saved_student_answers_the_same_in_transformers_and_in_vllm(
    here, offline, served, asked
):
    mine = ran(here, asked["greedy"])
    assert len({s["text"] for s in mine.values()}) == 6, (
        "a student that says one thing to everything proves nothing"
    )
    same(mine, offline("greedy"), "text", "finish", "tokens", "prompt_tokens", "seed")
    same(mine, ran(served, asked["greedy"]), "text", "finish", "tokens", "prompt_tokens", "seed")


def test_fault_13_sixteen_samples_are_distinct_and_each_has_its_own_seed(offline, served, asked):
    for samples in (offline("many"), ran(served, asked["many"])):
        assert set(samples) == {(q, i) for q in ("i0", "t0") for i in range(16)}
        assert all(s["seed"] == derive_sample_seed(DRAWN, q, i) for (q, i), s in samples.items())
        assert all(len({samples[q, i]["text"] for i in range(16)}) == 16 for q in ("i0", "t0"))


def test_the_engine_and_the_server_draw_the_same_samples(offline, served, asked):
    same(offline("many"), ran(served, asked["many"]), "text", "finish", "tokens", "prompt_tokens")


def test_f20_no_token_of_an_image_is_drawn_by_the_engine_or_by_its_server(started, served, here):
    counts = started[1]["images_drawn"]
    assert counts["forbidden"] == 0 < counts["allowed"]
    served._look()
    assert served._image_ids == sorted(list_image_ids(here.processor))


def test_what_every_request_meets_stops_the_run_with_the_servers_sentence(served):
    requests = [ask(f"q{n}", 4) for n in range(4)]
    for name, sampling, sentence in (
        ("nobody", DRAWN, "the server TINY has no nobody .*nobody"),
        ("tiny", Sampling(temperature=-1.0, max_tokens=8), "refuses the value of temperature"),
        ("tiny", Sampling(max_tokens=100_000), "refuses the value of max_tokens .*100000"),
    ):
        with pytest.raises(OctomedError, match=sentence):
            list(OpenAIEngine(name, "TINY", max_pixels=12_544).generate(requests, sampling))


def test_fault_9_missing_indices_are_drawn_as_they_would_have_been(offline, served, asked):
    some = offline("some")
    assert set(some) == {("i0", 3), ("i0", 11), ("t0", 0), ("t0", 15)}
    whole = offline("many")
    same(some, {k: whole[k] for k in some}, "text", "seed")
    same(some, ran(served, asked["some"]), "text", "seed")


def test_sixteen_requests_are_what_vllm_makes_of_one_request_for_sixteen(started):
    one, many = started[1]["one_request"], started[1]["many_requests"]
    assert one == many and len(set(one)) == 16


def test_sixteen_samples_read_their_prompt_once(started):
    "Whole blocks of 32 tokens are found in the prefix cache by all but the first."
    (first, size), *others = started[1]["cached"]
    assert first == 0 and size >= 32 and [read for read, _ in others] == [size // 32 * 32] * 15


def test_fault_12_an_over_long_prompt_is_an_error_sample_and_stops_nobody(offline, served, asked):
    for samples in (offline("long"), ran(served, asked["long"])):
        assert {k: s["finish"] == "error" for k, s in samples.items()} == {
            ("t0", 0): False,
            ("t0", 1): False,
            ("long", 0): True,
            ("long", 1): True,
            ("i0", 0): False,
            ("i0", 1): False,
        }
        assert all("token" in samples["long", i]["text"] for i in (0, 1))
        same(
            {k: s for k, s in samples.items() if k[0] != "long"},
            {k: s for k, s in offline("many").items() if k in samples},
            "text",
        )


def test_fault_14_a_question_that_comes_twice_is_answered_twice(started):
    texts = [(s["index"], s["text"]) for s in started[1]["twice"]]
    assert len(texts) == 4 and len(set(texts)) == 2


def test_fault_40_a_forced_exit_never_passes_its_budget_and_is_counted(offline, served, asked):
    for samples in (offline("forced"), ran(served, asked["forced"])):
        late = [s for s in samples.values() if s["answer_tokens"]]
        assert late, "a student that learnt nothing never ends its thought in six tokens"
        assert all(
            FORCED in s["text"] and s["answer_tokens"] <= 5 and s["tokens"] <= 11 for s in late
        )
        assert all(s["tokens"] <= 6 for s in samples.values() if not s["answer_tokens"])
    same(offline("forced"), samples, "text", "tokens", "answer_tokens", "finish")


def test_a_forced_exit_is_the_second_pass_of_the_transformers_engine(here, folder, served):
    s = Sampling(temperature=0, max_tokens=6, answer_tokens=5)
    same(
        ran(here, ([ask("t0"), ask("t1", text="one two")], s)),
        ran(served, ([ask("t0"), ask("t1", text="one two")], s)),
        "text",
        "tokens",
        "answer_tokens",
        "finish",
    )


def test_the_forced_exit_equals_vllms_own_thinking_budget(here, started, asked):
    """At temperature 0, from an open thought. vLLM ends it inside one pass, we in a second one.

    They differ in two cases only, which are left out. Either the thought ended in blanks, which we
    strip, or the tokenizer cuts its text into other tokens, because the second pass reads text."""

    def ids(text):
        return here.processor.tokenizer(text)["input_ids"]

    def complete(prompt, budget):
        (completion,) = _complete(here, [prompt], [[]], sampling=sampling, budget=budget, seeds=[0])
        return completion

    compared = 0
    sampling = Sampling(temperature=0, max_tokens=BUDGET, answer_tokens=ANSWER)
    for r, (theirs, tokens) in zip(asked["thoughts"][0], started[1]["built_in"], strict=False):
        prompt = here.processor.apply_chat_template(
            r.messages, add_generation_prompt=True, tokenize=False
        )
        prompt += "<think>"
        thought = complete(prompt, BUDGET)
        forced = begin_forced_exit(thought.text, thought.finish, sampling)
        if not forced or ids(forced) != thought.ids + ids(FORCED):
            continue
        answer = complete(prompt + forced, ANSWER)
        assert theirs == forced + answer.text
        assert tokens == len(thought.ids) + len(ids(FORCED)) + len(answer.ids)
        compared += 1
    assert compared >= 5


def test_stop_strings_end_a_response_and_stay_in_it(offline, served, asked):
    samples = offline("stops")
    ended = [
        s["text"]
        for s in samples.values()
        if s["finish"] == "stop" and s["text"].endswith((" option", "fever"))
    ]
    assert ended
    same(samples, ran(served, asked["stops"]), "text", "finish")


def test_logprobs_are_kept_one_a_token(offline, served, asked):
    for samples in (offline("many"), ran(served, asked["many"]), offline("forced")):
        for s in samples.values():
            kept = json.loads(s["logprobs"])
            assert len(kept) == s["tokens"] and all(x <= 0 for x in kept)


def test_rollouts_have_the_trainers_logprobs_and_new_weights_are_taken(started, folder, asked):
    from octomed.generate.render import PixelCache, Row, list_chat_images, list_image_ids
    from octomed.train.objective import prepare_packed
    from octomed.train.policy import logprobs_class
    from octomed.train.students import load_student

    model, processor = load_student(folder)
    read = logprobs_class()(model, never=list_image_ids(processor))
    images, pixels = (
        list_chat_images(asked["greedy"][0][-1].messages),
        PixelCache(processor, 12_544),
    )
    first, moved, again = started[1]["rolled"]
    for prompt, ids, logprobs, _ in first:
        row = Row(prompt + ids, len(prompt), images)
        values, _ = read(*prepare_packed(model, processor, [row], pixels))
        assert values.tolist() == pytest.approx(logprobs, abs=1e-3)
    assert [r[3] for r in (first[0], moved[0], again[0])] == [
        "tiny@1",
        "moved by 0.02",
        "moved by -0.02",
    ]
    assert [r[2] for r in moved] != [r[2] for r in first], "the weights that it was given"
    assert [r[1] for r in again] == [r[1] for r in first]


def test_a_caller_that_stops_early_leaves_the_engine_empty_and_usable(started):
    assert len(started[1]["left early"]) == 3 and started[1]["stops"], (
        "the worker asserts that nothing is left running"
    )


def test_the_servers_name_is_its_identity_and_the_build_is_kept(served, asked):
    assert served.model == "tiny"
    assert all(
        s["engine"].startswith("openai")
        for s in ran(served, (asked["greedy"][0][:1], GREEDY)).values()
    )


def test_likelihoods_are_those_of_the_transformers_engine(here, started, asked):
    pairs = list_scored(asked)
    prompts = [
        prompt if isinstance(prompt, str) else ChatPrompt(*prompt, ends_thought=True)
        for prompt, _ in pairs
    ]
    ours = here.likelihoods(prompts, [texts for _, texts in pairs])
    assert any(
        request.messages[0]["content"][0]["type"] == "image" for request in asked["greedy"][0]
    )
    for row, theirs in zip(ours, started[1]["scored"], strict=True):
        assert [score.tokens for score in row] == [tokens for _, tokens, _ in theirs]
        assert [score.is_greedy for score in row] == [greedy for *_, greedy in theirs]
        logprobs = [logprob for logprob, *_ in theirs]
        assert [score.logprob for score in row] == pytest.approx(logprobs, abs=1e-3)
        assert choose_likeliest([score.logprob for score in row]) == choose_likeliest(logprobs)


def test_what_vllm_cannot_score_is_one_sentence(started):
    assert "the model takes 2047" in started[1]["too long"]
