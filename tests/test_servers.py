"API faults, against a real local HTTP server that misbehaves on purpose."

import contextlib
import io
import logging
import threading
import traceback

import pytest
from misbehaving import (
    KEY,
    chunks,
    completion,
    cut,
    error_in_stream,
    hang_up,
    malformed,
    out_of_resources,
    status,
    wait_for_hang_up,
    web_page,
)
from toys import chat

from octomed.core.paths import OctomedError
from octomed.generate.engine_openai import OpenAIEngine
from octomed.generate.engine_openai_batch import OpenAIBatchEngine
from octomed.generate.engines import FORCED, load_teacher
from octomed.generate.ledger import Ledger, draw_samples
from octomed.generate.samples import Request, Sampling, derive_sample_seed

PLAIN = Sampling(temperature=1.0, max_tokens=64)


def ask(name="q1", n=4, images=()):
    messages = chat(f"{name}: which is it ?", *images)
    return Request(name, messages, f"prompt of {name}", tuple(range(n)))


def engine(**kw):
    return OpenAIEngine(
        "fake", "FAKE", **{"retries": 3, "timeout": 5.0, "max_pixels": 12_544, **kw}
    )


FAULTS = {
    "429": status(429, wait=1),
    "500": status(500),
    "503": status(503),
    "malformed JSON": malformed,
    "a web page": web_page,
    "cut stream": cut,
    "hung up": hang_up,
    "error in the stream": error_in_stream,
    "out of resources": out_of_resources,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_10_what_fails_on_the_way_is_asked_again(fake, fault):
    fake.script = [FAULTS[fault]]
    samples = list(engine().generate([ask()], PLAIN))
    assert sorted(s.index for s in samples) == [0, 1, 2, 3] and len(fake.asked) == 5
    assert {(s.text, s.finish, s.tokens, s.prompt_tokens, s.model, s.engine) for s in samples} == {
        ("<think>I see.</think> <answer>B</answer>", "stop", 7, 11, "fake@fake-1", "openai fp_1")
    }


def test_fault_10_a_time_out_is_asked_again(fake):
    gone = threading.Semaphore(0)
    fake.script = [wait_for_hang_up(gone)]
    e = engine(timeout=60.0, retries=8)
    assert e.model == "fake@fake-1"
    e.timeout = 1.0
    (sample,) = e.generate([ask(n=1)], PLAIN)
    assert sample.finish == "stop" and len(fake.asked) >= 2
    assert gone.acquire(timeout=300), "the client ended the first request"


def test_a_wait_that_is_too_long_ends_the_run(fake):
    fake.script = [status(429, wait=3600)]
    with pytest.raises(OctomedError, match="asks to wait 3600 s: run again"):
        list(engine().generate([ask(n=1)], PLAIN))


def test_fault_10_what_got_no_answer_is_no_sample_and_is_drawn_by_the_next_run(fake, tmp_path):
    e, ledger = engine(concurrency=1), Ledger(tmp_path / "ledger.sqlite")
    fake.script = [status(500)] * 4
    with pytest.raises(
        OctomedError, match=r"1 samples got no answer from FAKE \(broken\): run again"
    ):
        draw_samples(ledger, e, [ask(n=6)], PLAIN)
    assert len(ledger) == 5
    asked = len(fake.asked)
    assert [s.index for s in draw_samples(ledger, e, [ask(n=6)], PLAIN)] == list(range(6)) and len(
        fake.asked
    ) == asked + 1


def test_a_server_that_only_fails_stops_the_run_early(fake):
    fake.script = [status(500)] * 10_000
    with pytest.raises(OctomedError, match=r"FAKE does not answer \(broken\).*or run again later"):
        list(engine(concurrency=4).generate([ask(n=500)], PLAIN))
    assert len(fake.asked) == 4 + 1 + 1
    fake.script = [status(500)] * 4
    kept = list(engine(concurrency=1, keep_failures=True).generate([ask(n=2)], PLAIN))
    assert (
        next((s.finish, s.text) for s in kept) == ("error", "broken") and kept[1].finish == "stop"
    )


def test_fault_11_refusals_and_length_are_outcomes(fake):
    fake.answer = lambda body: chunks("<think>It may", finish="length")
    assert {s.finish for s in engine().generate([ask()], PLAIN)} == {"length"}
    fake.answer = lambda body: chunks("", refusal="I cannot help with that.")
    assert {(s.finish, s.text) for s in engine().generate([ask()], PLAIN)} == {
        ("refused", "I cannot help with that.")
    }
    fake.answer = lambda body: chunks("The", finish="content_filter")
    assert {(s.finish, s.text) for s in engine().generate([ask()], PLAIN)} == {("refused", "The")}
    fake.script = [status(400, "filtered", code="content_filter")]
    (sample,) = engine().generate([ask(n=1)], PLAIN)
    assert (sample.finish, sample.text) == ("refused", "filtered")


def test_fault_12_one_over_long_prompt_neither_aborts_nor_misaligns(fake):
    def judge(h, body):
        if "long" in body["messages"][0]["content"]:
            status(
                400,
                "maximum context length is 2048 tokens",
                code="context_length_exceeded",
                param="max_tokens",
            )(h, body)
        else:
            h.stream(chunks(body["messages"][0]["content"]))

    fake.script = [judge] * 12
    samples = list(engine().generate([ask("q1"), ask("long"), ask("q2")], PLAIN))
    assert {(s.question, s.finish) for s in samples} == {
        ("q1", "stop"),
        ("long", "error"),
        ("q2", "stop"),
    }
    assert (
        all(s.text.startswith(s.question) for s in samples if s.finish == "stop")
        and len(samples) == 12
    )


def test_fault_13_every_sample_asks_with_its_own_seed(fake):
    samples = list(engine().generate([ask("q1", 16), ask("q2", 16)], PLAIN))
    wanted = {(q, derive_sample_seed(PLAIN, q, i)) for q in ("q1", "q2") for i in range(16)}
    assert (
        {(b["messages"][0]["content"][:2], b["seed"]) for b in fake.asked}
        == wanted
        == {(s.question, s.seed) for s in samples}
    )
    assert len({seed for _, seed in wanted}) == 32


def test_fault_14_a_question_that_comes_twice_is_answered_twice_and_kept_once(fake, tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    samples = draw_samples(ledger, engine(), [ask(), ask()], PLAIN)
    assert [s.index for s in samples] == [0, 1, 2, 3] * 2 and len(ledger) == 4


def test_fault_9_a_run_that_is_stopped_asks_only_for_what_is_missing(fake, tmp_path):
    ledger, e = Ledger(tmp_path / "ledger.sqlite"), engine(concurrency=1)

    class Stops:
        model, name = e.model, e.name

        def generate(self, requests, sampling):
            for n, s in enumerate(e.generate(requests, sampling)):
                if n == 5:
                    raise KeyboardInterrupt
                yield s

    with pytest.raises(KeyboardInterrupt):
        draw_samples(ledger, Stops(), [ask(n=16)], PLAIN)
    kept = {s.seed for s in ledger.find([bytes.fromhex(k.hex()) for k in keys(e, 16)]).values()}
    assert len(kept) == 5
    fake.asked.clear()
    draw_samples(ledger, e, [ask(n=16)], PLAIN)
    assert len(fake.asked) == 11 and not {b["seed"] for b in fake.asked} & kept


def keys(e, n):
    from octomed.generate.samples import make_sample_key

    return [make_sample_key("q1", e.model, "prompt of q1", PLAIN.key, i) for i in range(n)]


def test_requests_are_under_way_together_up_to_the_limit(fake):
    together = threading.Barrier(8)

    def wait_for_the_others(h, body):
        together.wait(300)  # passes when eight requests are under way
        h.stream(chunks())

    fake.script = [lambda h, body: h.stream(chunks()), *[wait_for_the_others] * 24]
    samples = list(engine(concurrency=8, timeout=300).generate([ask(n=25)], PLAIN))
    assert len(samples) == 25 and fake.most == 8


def test_images_travel_as_data_and_text_as_plain_strings(fake, picture):
    import base64

    from octomed.data.images import image_path

    list(engine().generate([ask("q1", 1), ask("q2", 1, [picture])], PLAIN))
    text, parts = sorted(
        (b["messages"][0]["content"] for b in fake.asked), key=lambda c: isinstance(c, list)
    )
    assert text == "q1: which is it ?" and [p["type"] for p in parts] == ["image_url", "text"]
    kind, _, data = parts[0]["image_url"]["url"].partition(",")
    assert (
        kind == "data:image/png;base64"
        and base64.b64decode(data) == image_path(picture, 12_544).read_bytes()
    )


def test_reasoning_that_comes_apart_is_joined(fake):
    from octomed.generate.answers import judge

    for name in ("reasoning_content", "reasoning"):
        parts = chunks("<answer>B</answer>", **{name: "It is viral."})
        fake.answer = lambda body, parts=parts: parts
        (sample,) = engine().generate([ask(n=1)], PLAIN)
        assert sample.text == "<think>It is viral.\n</think>\n\n<answer>B</answer>"
        assert (
            judge(sample.text, {"A": "no", "B": "yes"}, "B", think_first=True).status == "correct"
        )
    fake.answer = lambda body: chunks("", finish="length", reasoning_content="It is")
    (sample,) = engine().generate([ask(n=1)], PLAIN)
    assert (
        sample.text == "<think>It is"
        and judge(sample.text, {"A": "no"}, "A", think_first=True).status == "truncated"
    )


def test_what_a_server_cannot_do_is_said_before_anything_is_asked(fake):
    for s, reason in (
        (Sampling(answer_tokens=8), "cannot continue"),
        (Sampling(repetition_penalty=1.1), "no repetition penalty"),
    ):
        with pytest.raises(OctomedError, match=f"unsupported: .*{reason}"):
            list(engine().generate([ask()], s))
    assert not fake.asked


def test_fault_40_a_forced_exit_continues_where_the_server_can_and_is_counted(fake):
    fake.owner = "vllm"
    fake.answer = lambda body: (
        chunks("\\boxed{B}")
        if body.get("continue_final_message")
        else chunks("<think>It may ", finish="length")
    )
    s = Sampling(max_tokens=5, answer_tokens=8)
    (sample,) = engine().generate([ask(n=1)], s)
    first, second = fake.asked
    assert sample.text == "<think>It may" + FORCED + "\\boxed{B}" and (
        sample.finish,
        sample.tokens,
        sample.answer_tokens,
    ) == ("stop", 14, 7)
    assert (
        second["messages"][-1] == {"role": "assistant", "content": "<think>It may" + FORCED}
        and second["add_generation_prompt"] is False
    )
    assert (first["max_tokens"], second["max_tokens"]) == (5, 8) and second["seed"] == first[
        "seed"
    ] ^ 1
    assert (first["repetition_penalty"], first["top_k"]) == (1.0, 0), (
        "a vLLM server would add its model's own generation config"
    )
    fake.answer = lambda body: chunks("<think>It may ", finish="length")

    def refuse(h, body):
        return status(400, "the final message does not appear in the chat")(h, body)

    fake.script = [lambda h, body: h.stream(fake.answer(body)), refuse]
    (sample,) = engine().generate([ask(n=1)], s)
    assert (sample.text, sample.finish, sample.answer_tokens) == ("<think>It may ", "length", 0), (
        "a template that cannot be continued leaves the thought cut"
    )


@pytest.mark.parametrize(
    "code, error, says",
    [
        (401, {}, "refuses the key .*set FAKE_API_KEY"),
        (404, {}, "has no fake"),
        (402, {}, "no credit left"),
        (429, {"code": "insufficient_quota"}, "no credit left"),
        (400, {"param": "temperature", "code": "unsupported_value"}, r"leave_out=\('temperature',"),
    ],
)
def test_what_no_retry_mends_stops_the_run_with_a_sentence(fake, code, error, says):
    fake.script = [status(code, f"no, {KEY}", **error)] * 9
    with pytest.raises(OctomedError, match=says) as e:
        list(engine(concurrency=2).generate([ask()], PLAIN))
    assert KEY not in "".join(traceback.format_exception(e.value)) and len(fake.asked) <= 9
    assert "temperature" not in engine(leave_out=("temperature",))._body(ask(), PLAIN, 0)


def test_a_key_that_is_cut_in_half_is_no_leak(fake):
    fake.script = [status(400, "x" * 290 + KEY)]
    (sample,) = engine().generate([ask(n=1)], PLAIN)
    assert sample.finish == "error" and KEY[:8] not in sample.text and "[removed]" in sample.text


def test_another_version_in_the_middle_of_a_run_is_noticed(fake):
    fake.script = [
        lambda h, body: h.stream(chunks()),
        lambda h, body: h.stream(chunks(model="fake-2")),
    ]
    with pytest.raises(OctomedError, match="answered as fake-2, before as fake-1"):
        list(engine(concurrency=1).generate([ask(n=2)], PLAIN))


def batches(**kw):
    return OpenAIBatchEngine("fake", "FAKE", poll=0.01, max_pixels=12_544, **kw)


def test_a_batch_file_is_written_uploaded_looked_after_and_collected(fake):
    samples = list(batches(lines=5).generate([ask("q1", 8), ask("q2", 4)], PLAIN))
    assert len(fake.batches) == 3
    assert {(s.question, s.index, s.text) for s in samples} == {
        (q, i, f"seed {derive_sample_seed(PLAIN, q, i)}")
        for q, n in (("q1", 8), ("q2", 4))
        for i in range(n)
    }
    assert {(s.finish, s.tokens, s.prompt_tokens, s.engine) for s in samples} == {
        ("stop", 7, 11, "openai-batch")
    }


def interrupt(seconds):
    raise KeyboardInterrupt


def test_fault_9_a_batch_that_was_paid_for_is_collected_by_the_next_run(fake):
    fake.batch_status = "in_progress"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as m:
        m.setattr("octomed.generate.engine_openai_batch.time.sleep", interrupt)
        list(batches().generate([ask("paid", 4)], PLAIN))
    fake.batch_status = "completed"
    samples = list(batches().generate([ask("paid", 6)], PLAIN))
    assert sorted(s.index for s in samples) == list(range(6)) and len(fake.batches) == 2
    assert [f.count(b"custom_id") for n, f in fake.files.items() if n.startswith("file")] == [
        4,
        2,
    ], "only what was not in the first batch is paid for"


def test_fault_12_a_bad_line_of_a_batch_is_an_outcome_or_asked_again(fake):
    bad = {
        derive_sample_seed(PLAIN, "lines", 1): {
            "status_code": 400,
            "body": {"error": {"message": "too long"}},
        },
        derive_sample_seed(PLAIN, "lines", 2): {"status_code": 500, "body": {}},
        derive_sample_seed(PLAIN, "lines", 3): None,
    }
    fake.complete = lambda body: bad.pop(body["seed"], completion("fine"))
    run, samples = batches().generate([ask("lines", 5)], PLAIN), []
    with pytest.raises(OctomedError, match="2 lines of the batch got no answer"):
        for s in run:
            samples.append(s)
    assert {s.index: s.finish for s in samples} == {0: "stop", 1: "error", 4: "stop"}
    assert {
        s.index: s.text
        for s in batches().generate(
            [Request("lines", ask("lines").messages, "prompt of lines", (2, 3))], PLAIN
        )
    } == {2: "fine", 3: "fine"}


def test_a_server_without_batch_files_and_a_refused_file_say_so(fake):
    fake.batch_status = "failed"
    with pytest.raises(OctomedError, match=r"refused the batch file \(line 1 is malformed\)"):
        list(batches().generate([ask("refused", 1)], PLAIN))
    fake.files = None
    with pytest.raises(OctomedError, match="has no batch files: use an openai: teacher"):
        list(batches().generate([ask("none", 1)], PLAIN))


def test_a_recipe_names_a_server_and_the_environment_says_where_it_is(fake):
    e = load_teacher("openai:fake@FAKE", max_pixels=12_544)
    assert (e.name, e.model, e.max_pixels) == ("openai", "fake@fake-1", 12_544)
    assert load_teacher("openai-batch:fake@FAKE").name == "openai-batch"


def test_fault_17_a_canary_key_appears_in_no_output_log_ledger_or_traceback(fake, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)

    def echo(h, body):
        return h.stream(chunks(f"your key is {h.headers['Authorization']}"))

    fake.script = [
        echo,
        status(500, KEY),
        status(400, f"bad key {KEY}"),
        *[status(500, KEY)] * 4,
    ]
    output, ledger = io.StringIO(), Ledger(tmp_path / "ledger.sqlite")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        e = engine(concurrency=1)
        with pytest.raises(OctomedError, match="got no answer") as failed:
            draw_samples(ledger, e, [ask(n=4)], PLAIN)
        print(e, vars(e), e.server, failed.value)
        traceback.print_exception(failed.value)
    ledger.close()
    assert any(KEY in v for h in fake.headers for v in h.values()), "the server did get the key"
    assert "[removed]" in output.getvalue()
    for where in (
        output.getvalue(),
        caplog.text,
        *(p.read_bytes().decode("latin1") for p in tmp_path.rglob("*") if p.is_file()),
    ):
        assert KEY not in where
    assert any(
        b"your key is Bearer [removed]" in p.read_bytes()
        for p in tmp_path.rglob("*")
        if p.is_file()
    )


def test_fault_17_a_canary_key_appears_in_no_notebook(fake, tmp_path):
    import nbclient
    import nbformat

    fake.refuses = KEY
    ways = (
        "OpenAIEngine('fake', 'FAKE', model='fake')",
        "OpenAIEngine('fake', 'FAKE')",
        "OpenAIBatchEngine('fake', 'FAKE', model='fake')",
    )
    imports = (
        "from octomed.generate.engine_openai import OpenAIEngine\n"
        "from octomed.generate.engine_openai_batch import OpenAIBatchEngine\n"
        "from octomed.generate.samples import Request, Sampling\n"
        "requests = [Request('q1', [{'role': 'user', 'content': 'Which?'}], 'p')]"
    )
    run = "display(engine)\nlist(engine.generate(requests, Sampling()))"
    code = ["%xmode Verbose", imports, *(f"engine = {way}\n{run}" for way in ways)]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    nbclient.NotebookClient(
        nb,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    refused = (
        "the server FAKE refuses the key (Incorrect API key provided: [removed]): set FAKE_API_KEY"
    )
    for cell in nb.cells[2:]:
        errors = [output.evalue for output in cell.outputs if output.output_type == "error"]
        assert errors == [refused]
    assert KEY not in nbformat.writes(nb)


def test_a_server_that_is_down_says_so(monkeypatch):
    monkeypatch.setenv("DOWN_BASE_URL", "http://127.0.0.1:9/v1")
    down = OpenAIEngine("fake", "DOWN", retries=0)
    says = r"DOWN does not answer .*see that DOWN_BASE_URL is right"
    with pytest.raises(OctomedError, match=says):
        _ = down.model


QWEN_TOKENS = {"<|image_pad|>": 71, "<|vision_start|>": 72, "<|vision_end|>": 73, "<|im_end|>": 74}


def test_f20_a_vllm_server_is_asked_never_to_draw_a_token_of_an_image(fake):
    fake.owner, fake.tokens = "vllm", QWEN_TOKENS
    list(engine().generate([ask(n=2)], PLAIN))
    bias = {"71": -100.0, "72": -100.0, "73": -100.0}
    assert [body["logit_bias"] for body in fake.asked] == [bias] * 2


def test_f20_no_other_server_gets_a_bias_and_one_without_tokenize_neither(fake, monkeypatch):
    fake.tokens = QWEN_TOKENS
    list(engine().generate([ask(n=1)], PLAIN))
    fake.owner, fake.tokens = "vllm", None
    list(engine().generate([ask(n=1)], PLAIN))
    fake.tokens = QWEN_TOKENS
    monkeypatch.setenv("FAKE_LEAVE_OUT", "logit_bias")
    list(engine().generate([ask(n=1)], PLAIN))
    assert len(fake.asked) == 3 and not any("logit_bias" in body for body in fake.asked)


def test_f20_a_vllm_server_that_takes_no_bias_is_asked_without(fake):
    fake.owner, fake.tokens = "vllm", QWEN_TOKENS
    words = "The min_p and logit_bias sampling parameters are not yet supported with speculative"
    fake.script = [status(400, f"{words} decoding.")]
    samples = list(engine(retries=0).generate([ask(n=3)], PLAIN))
    assert [s.finish for s in samples] == ["stop"] * 3
    assert ["logit_bias" in body for body in fake.asked] == [True, False, False, False]


IMAGE_MARKS = ["<|image_pad|>", "<|vision_start|>", "<IMG_CONTEXT>", "<start_of_image>", "[IMG]"]


@pytest.mark.parametrize("mark", IMAGE_MARKS)
def test_f20_a_response_with_a_token_of_an_image_is_an_error_that_says_so(fake, mark):
    fake.answer = lambda body: chunks(f"I see {mark}. The answer is B")
    (sample,) = engine().generate([ask(n=1)], PLAIN)
    sentence = f"the response holds {mark}, which stands for an image and is no text"
    assert sample.finish == "error" and sentence in sample.text
    fake.complete = lambda body: completion(f"I see {mark}. The answer is B")
    (sample,) = batches().generate([ask(n=1)], PLAIN)
    assert sample.finish == "error" and sentence in sample.text


@pytest.mark.parametrize("mark", IMAGE_MARKS)
def test_f20_a_question_with_a_token_of_an_image_is_not_asked(fake, mark):
    requests = [ask(f"what is {mark}", 2), ask("q2", 2)]
    samples = list(engine().generate(requests, PLAIN))
    refused = [s for s in samples if s.question != "q2"]
    assert len(fake.asked) == 2 and len(samples) == 4
    assert {s.finish for s in refused} == {"error"} and f"holds {mark}" in refused[0].text
    samples = list(batches().generate(requests, PLAIN))
    assert sorted(s.finish for s in samples) == ["error", "error", "stop", "stop"]
    (batch,) = fake.batches.values()
    assert len(fake.files[batch["input_file_id"]].splitlines()) == 2


def test_f20_ordinary_words_in_brackets_are_no_tokens(fake):
    text = "In the <image> [Image 1] of <b>B</b> <answer>B</answer>"
    fake.answer = lambda body: chunks(text)
    (sample,) = engine().generate([ask("the <image> shows", 1)], PLAIN)
    assert (sample.text, sample.finish) == (text, "stop")
