"""Every shape in which servers send responses and errors, from a real local server.

The tables hold what vLLM, llama.cpp, TGI, Ollama, SGLang, Anthropic, Gemini, Mistral, Together,
DeepSeek, Azure, OpenRouter, LiteLLM and others send."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from misbehaving import chunks, completion, send_bytes, send_events, send_json, status
from toys import chat

from octomed.core.paths import OctomedError
from octomed.data.questions import Question
from octomed.distill.rejection import judge_sample
from octomed.distill.sampling import make_requests
from octomed.generate.engine_openai import OpenAIEngine
from octomed.generate.prompts import load_template
from octomed.generate.samples import Request, Sampling
from octomed.generate.server_errors import Fault, read_fault
from octomed.generate.server_responses import ServerResponse

PLAIN = Sampling(temperature=1.0, max_tokens=64)


def engine(**kw):
    return OpenAIEngine("fake", "FAKE", **{"timeout": 60.0, "max_pixels": 12_544, **kw})


def ask(name="q1", n=1, text="which is it ?"):
    return Request(name, chat(text), f"prompt of {name}", tuple(range(n)))


def draw(requests=None, **kw):
    return list(engine(**kw).generate(requests or [ask()], PLAIN))


def choice(delta=None, finish=None, **more):
    choices = [{"index": 0, "delta": delta or {}, "finish_reason": finish, **more}]
    return {"id": "x", "object": "chat.completion.chunk", "model": "fake-1", "choices": choices}


ENDS = {
    "stop": "stop eos eos_token end_turn stop_sequence STOP COMPLETE tool_calls tool_use "
    "function_call endTurn FinishReason.STOP FINISH_REASON_STOP </s> completed",
    "length": "length max_tokens MAX_TOKENS model_length max_output_tokens limit maxTokens "
    "model_context_window_exceeded FinishReason.MAX_TOKENS",
    "refused": "content_filter SAFETY refusal RECITATION PROHIBITED_CONTENT content_filtered "
    "ERROR_TOXIC sensitive",
}
WORDS = [(word, outcome) for outcome, words in ENDS.items() for word in words.split()]


@pytest.mark.parametrize("word, outcome", WORDS)
def test_the_words_of_all_servers_for_an_end_are_known(fake, capsys, word, outcome):
    fake.always = send_events(choice({"content": "B"}), choice({}, word))
    samples = draw([ask(n=2)])
    assert [(s.text, s.finish) for s in samples] == [("B", outcome)] * 2
    assert len(fake.asked) == 2 and "not known" not in capsys.readouterr().err


def test_a_word_that_is_not_known_is_named_once_and_costs_no_retry(fake, capsys):
    fake.always = send_events(choice({"content": "B"}), choice({}, "because"))
    assert [s.finish for s in draw([ask(n=4)])] == ["stop"] * 4
    assert len(fake.asked) == 4
    err = capsys.readouterr().err
    assert err.count("ended a response with 'because', a word that is not known here") == 1


def test_an_end_without_a_word_is_an_end_if_the_server_says_that_nothing_follows(fake):
    fake.always = send_events(choice({"content": "B"}), choice({}, None))
    assert [(s.text, s.finish) for s in draw()] == [("B", "stop")] and len(fake.asked) == 1
    usage = {"choices": [], "usage": {"completion_tokens": 64, "prompt_tokens": 3}}
    fake.always = send_events(choice({"content": "B"}), usage)
    assert draw()[0].finish == "length", "the budget is spent"


THOUGHT = "<think>so B\n</think>\n\nB"
CONTENTS = {
    "parts": ([{"content": [{"type": "text", "text": "a"}]}, {"content": ["b"]}], "ab"),
    "Mistral's thought": (
        [
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so B"}]}]},
            {"content": [{"type": "text", "text": "B"}]},
        ],
        THOUGHT,
    ),
    "Anthropic's thought": (
        [{"content": [{"type": "thinking", "thinking": "so B"}, {"type": "text", "text": "B"}]}],
        THOUGHT,
    ),
    "a reasoning part": (
        [
            {
                "content": [
                    {"type": "reasoning", "text": "so B"},
                    {"type": "output_text", "text": "B"},
                ]
            }
        ],
        THOUGHT,
    ),
    "reasoning_content": ([{"reasoning_content": "so B"}, {"content": "B"}], THOUGHT),
    "reasoning": ([{"reasoning": "so "}, {"reasoning": "B"}, {"content": "B"}], THOUGHT),
    "thinking": ([{"thinking": "so B"}, {"content": "B"}], THOUGHT),
    "one thought under two names": (
        [{"reasoning": "so B", "reasoning_content": "so B"}, {"content": "B"}],
        THOUGHT,
    ),
    "OpenRouter's details": (
        [
            {
                "reasoning": "so B",
                "reasoning_details": [{"type": "reasoning.text", "text": "so B"}],
            },
            {"content": "B"},
        ],
        THOUGHT,
    ),
    "null": ([{"content": None, "reasoning_content": None}, {"content": "B"}], "B"),
    "one part": ([{"content": {"type": "text", "text": "B"}}], "B"),
    "a refusal as a part": (
        [{"content": [{"type": "refusal", "refusal": "I will not"}]}],
        "I will not",
    ),
    "a character in two pieces": ([{"content": "\ud83d"}, {"content": "\ude00"}], "\U0001f600"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_content_of_any_shape_is_read(fake, name):
    deltas, text = CONTENTS[name]
    parts = [json.dumps(choice(delta)) for delta in deltas]
    fake.always = send_events(*parts, choice({}, "stop"))
    assert [s.text for s in draw()] == [text] and len(fake.asked) == 1


MARKS = {
    "</think>": "<think>so B\n</think>\n\nAnswer: B",
    "[/THINK]": "[THINK]so B\n[/THINK]\n\nAnswer: B",
    "◁/think▷": "◁think▷so B\n◁/think▷\n\nAnswer: B",
    "## Final Response": "## Thinking\n\nso B\n## Final Response\n\nAnswer: B",
    "=== over ===": "so B\n=== over ===\n\nAnswer: B",
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_thought_in_its_own_field_is_ended_by_the_mark_of_the_template(fake, mark, tmp_path):
    fake.always = send_events(
        choice({"reasoning": "so B"}), choice({"content": "Answer: B"}), choice({}, "stop")
    )
    form = tmp_path / "form.yaml"
    form.write_text(
        f"name: form\nsource: a test\nthink_first: true\nend_of_think: '{mark}'\n"
        "text: '{question}'\n"
    )
    question = Question("Which is it?", ("flu", "cold"), "B", "toy", "test", "text_only")
    (request,) = make_requests([question], str(form), 1)
    (sample,) = draw([request])
    assert sample.text == MARKS[mark]
    verdict = judge_sample(sample, question, load_template(str(form)))
    assert (verdict.status, verdict.letter) == ("correct", "B")


def test_a_thought_that_is_cut_gets_the_mark_of_the_template_and_goes_on(fake):
    fake.owner = "vllm"
    cut = send_events(choice({"reasoning": "so"}), choice({}, "length"))
    fake.script = [cut, send_events(choice({"content": "B"}), choice({}, "stop"))]
    forced = Sampling(temperature=1.0, max_tokens=8, answer_tokens=4)
    request = replace(ask(), end_of_think="[/THINK]")
    (sample,) = engine().generate([request], forced)
    assert sample.text == "[THINK]so\n[/THINK]\n\nB"
    assert fake.asked[1]["messages"][-1]["content"] == "[THINK]so\n[/THINK]\n\n"


def test_a_message_that_is_sent_again_at_the_end_is_not_read_twice(fake):
    last = choice({}, "stop", message={"role": "assistant", "content": "B"})
    fake.always = send_events(choice({"content": "B"}), last)
    assert [s.text for s in draw()] == ["B"]


START = json.dumps(choice({"content": "a\u2028b\u2029c\x85"}), ensure_ascii=False)
END = json.dumps(choice({}, "stop"))
TEXT = "a\u2028b\u2029c\x85"
HALVES = [START[: START.index('"choices"')], START[START.index('"choices"') :]]
STREAMS = {
    "LF": f"data: {START}\n\ndata: {END}\n\ndata: [DONE]\n\n",
    "CR": f"data: {START}\r\rdata: {END}\r\rdata: [DONE]\r\r",
    "CRLF": f"data: {START}\r\n\r\ndata: {END}\r\n\r\ndata: [DONE]\r\n\r\n",
    "mixed ends": f"data: {START}\r\n\ndata: {END}\r\r\ndata: [DONE]\n\r\n",
    "no blank": f"data:{START}\n\ndata:{END}\n\ndata:[DONE]\n\n",
    "comments": f": hello\n\n:\n\ndata: {START}\n: ping\n\n:\ndata: {END}\n\ndata: [DONE]\n\n",
    "an event over lines": f"data: {HALVES[0]}\ndata: {HALVES[1]}\n\n"
    f"data: {END}\n\ndata: [DONE]\n\n",
    "empty data": f"data:\n\ndata: {START}\n\ndata: \n\ndata: {END}\n\ndata\n\ndata: [DONE]\n\n",
    "BOM": f"\ufeffdata: {START}\n\ndata: {END}\n\ndata: [DONE]\n\n",
    "other fields": f"id: 1\nretry: 5\nevent: message\nfoo: bar\ndata: {START}\n\ndata: {END}\n\n",
    "another event": f'event: ping\ndata: {{"type": "ping"}}\n\nevent: x\ndata: y\n\n'
    f"data: {START}\n\n"
    f"data: {END}\n\ndata: [DONE]\n\n",
    "no last line": f"data: {START}\n\ndata: {END}",
    "no DONE": f"data: {START}\n\ndata: {END}\n\n",
    "DONE with blanks": f"data: {START}\n\ndata: {END}\n\ndata:   [DONE]  \n\ndata: later\n\n",
    "error null": f'data: {START[:-1]}, "error": null}}\n\ndata: {END[:-1]}, "error": {{}}}}\n\n',
    "a filter's first chunk": 'data: {"choices": [], "prompt_filter_results": [{}]}\n\n'
    f"data: {START}\n\ndata: {END}\n\ndata: [DONE]\n\n",
}


@pytest.mark.parametrize("name", STREAMS)
def test_events_are_read_by_the_standard(fake, name):
    fake.always = send_bytes(STREAMS[name].encode())
    assert [(s.text, s.finish) for s in draw()] == [(TEXT, "stop")]
    assert len(fake.asked) == 1


def test_chunks_on_lines_of_their_own_are_read(fake):
    lines = "\n".join(json.dumps(choice(*part)) for part in (({"content": "B"},), ({}, "eos")))
    fake.always = send_bytes(lines.encode(), "application/x-ndjson")
    assert [(s.text, s.finish) for s in draw()] == [("B", "stop")]


def test_a_body_that_is_cut_is_asked_again(fake):
    fake.script = [send_bytes(b'{"choices": [{"message": {"content": "B"', "application/json")]
    assert draw()[0].finish == "stop" and len(fake.asked) == 2


def test_an_event_stream_is_utf8_whatever_the_headers_say(fake):
    data = STREAMS["LF"].encode()
    for kind in ("text/event-stream; charset=iso-8859-1", "text/plain", "application/json"):
        fake.always = send_bytes(data, kind)
        assert [s.text for s in draw()] == [TEXT]


def test_a_whole_response_in_place_of_a_stream_is_read(fake):
    fake.always = send_json(completion("B", finish="eos"))
    assert [(s.text, s.finish, s.tokens) for s in draw()] == [("B", "stop", 7)]


def test_a_connection_that_is_dropped_after_the_end_loses_nothing(fake):
    def act(h, body):
        h.send_response(200)
        h.send_header("Content-Type", "text/event-stream")
        h.send_header("Content-Length", "99999")
        h.end_headers()
        h.wfile.write(f"data: {START}\n\ndata: {END}\n\n".encode())
        h.close_connection = True

    fake.always = act
    assert [s.text for s in draw()] == [TEXT] and len(fake.asked) == 1


def test_a_connection_that_stays_open_after_the_end_loses_nothing(fake, monkeypatch):
    import threading

    read = threading.Event()

    def act(h, body):
        send_bytes(STREAMS["LF"].encode())(h, body)
        h.wfile.flush()
        read.wait(300)

    fake.always = act
    monkeypatch.setattr("octomed.generate.server_responses.LINGER", 0.05)
    assert [s.text for s in draw()] == [TEXT]
    read.set()


OOM = "CUDA out of memory"
STATED = {
    "an object without `error`": (
        send_events({"object": "error", "message": OOM, "code": 50001}),
        OOM,
    ),
    "an error event": (send_bytes(f"event: error\ndata: {OOM}\n\n".encode()), OOM),
    "an error event with JSON": (
        send_bytes(b'event: error\ndata: {"detail": "' + OOM.encode() + b'"}\n\n'),
        OOM,
    ),
    "an error as a text": (send_events({"error": OOM}), OOM),
    "choices null": (send_events({"choices": None, "error_message": OOM, "model": "m"}), OOM),
    "in a choice": (send_events(choice({}, "error", error={"message": OOM, "code": None})), OOM),
    "after the beginning": (
        send_events(choice({"content": "B"}), {"error": {"message": OOM}}),
        OOM,
    ),
    "JSON with status 200": (send_json({"error": {"message": OOM}}), OOM),
    "JSON as an event stream": (send_bytes(json.dumps({"message": OOM}).encode()), OOM),
    "pretty JSON": (send_bytes(json.dumps({"detail": {"reason": OOM}}, indent=2).encode()), OOM),
    "JSON in a text": (send_json({"error": {"message": json.dumps({"detail": OOM})}}), OOM),
    "behind a router": (
        send_json(
            {"error": {"message": "Provider error", "metadata": {"raw": f'{{"msg": "{OOM}"}}'}}}
        ),
        f"Provider error: {OOM}",
    ),
    "a plain text": (send_bytes(OOM.encode(), "text/plain"), OOM),
    "a web page": (
        send_bytes(
            b"<!DOCTYPE html><html><head><title>Log in &amp; go</title></head></html>", "text/html"
        ),
        "a web page, Log in & go",
    ),
    "no choice": (send_json({"id": "x", "model": "fake-1", "choices": []}), "`choices` is empty"),
    "nothing": (send_bytes(b""), "status 200"),
}


@pytest.mark.parametrize("name", STATED)
def test_the_servers_own_sentence_reaches_the_user(fake, name):
    "It is asked once more, since a few of these do pass, and then the run stops."
    fake.always, sentence = STATED[name]
    with pytest.raises(OctomedError) as failed:
        draw([ask(f"q{n}", 4) for n in range(9)], concurrency=2)
    assert sentence in str(failed.value)
    assert len(fake.asked) <= 8


REFUSALS = {
    "FastAPI": (
        422,
        {
            "detail": [
                {
                    "type": "extra_forbidden",
                    "loc": ["body", "seed"],
                    "msg": "Extra inputs are not permitted",
                }
            ]
        },
        "does not take seed .*FAKE_LEAVE_OUT=seed",
    ),
    "Mistral": (
        422,
        {
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "stream_options"],
                        "msg": "Extra inputs are not permitted",
                    }
                ]
            },
            "type": "invalid_request_error",
            "code": None,
        },
        "does not take stream_options",
    ),
    "LiteLLM": (
        400,
        {
            "error": {
                "message": "litellm.BadRequestError: Unsupported parameter: 'max_tokens' is "
                "not supported with this model. Use 'max_completion_tokens' instead.",
                "type": None,
                "param": None,
                "code": "400",
            }
        },
        "does not take max_tokens .*Use 'max_completion_tokens' instead",
    ),
    "Gemini, a field": (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "Invalid JSON payload received. "
                    'Unknown name "seed": Cannot find field.',
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        "does not take seed",
    ),
    "Gemini, a key": (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "API key not valid. Please pass a valid API key.",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        "refuses the key .*set FAKE_API_KEY",
    ),
    "DeepSeek, a model": (
        400,
        {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}},
        r"has no fake \(Model Not Exist\)",
    ),
    "OpenRouter, a model": (
        400,
        {"error": {"message": "fake is not a valid model ID", "code": 400}},
        "fake is not a valid model ID",
    ),
    "Mistral, a model": (
        400,
        {"object": "error", "message": "Invalid model: fake", "code": "1500"},
        "has no fake",
    ),
    "Azure, a model": (
        404,
        {
            "error": {
                "code": "DeploymentNotFound",
                "message": "The API deployment for this resource does not exist.",
            }
        },
        "has no fake",
    ),
    "Ollama, a model": (
        404,
        {"error": "model 'fake' not found, try pulling it first"},
        "has no fake .*pulling",
    ),
    "Anthropic, credit": (
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "Your credit balance is too low"},
        },
        "no credit left",
    ),
    "DeepSeek, credit": (402, {"error": {"message": "Insufficient Balance"}}, "no credit left"),
    "TGI": (
        422,
        {"error": "Input validation error: cannot do that", "error_type": "validation"},
        "refuses every request .*cannot do that",
    ),
    "unknown words": (
        400,
        {"errorMessage": "we are not amused"},
        r"refuses every request \(we are not amused\)",
    ),
    "no JSON": (400, "we are not amused", "refuses every request .*we are not amused"),
    "no words": (400, "", r"refuses every request \(status 400\)"),
    "a number": (422, 7, "refuses every request"),
    "a proxy's key": (
        407,
        "<html><title>407 Proxy Authentication Required</title></html>",
        "407 Proxy",
    ),
    "no permission": (
        403,
        {"message": "not from your country"},
        "refuses the key or its use .*not from your country",
    ),
    "no permission for a field": (
        403,
        {"error": {"message": "You are not allowed to request logprobs from this model"}},
        "does not take logprobs",
    ),
    "a model, in codes": (
        400,
        {"code": 1211, "msg": "model does not exist, check the model code"},
        "has no fake .*check the model code",
    ),
    "wrapped": (400, {"result": {"inner": [{"message": "deep down"}]}}, r"\(deep down\)"),
    "in the stream": (
        200,
        {"error": {"type": "authentication_error", "message": "invalid x-api-key"}},
        "refuses the key",
    ),
    "in the stream, a status": (
        200,
        {"error": {"code": 404, "message": "gone fishing"}},
        "has no fake",
    ),
    "budget": (
        400,
        {
            "error": {
                "message": "max_tokens is too large: this model supports at most "
                "16 completion tokens",
                "param": "max_tokens",
            }
        },
        "16 completion tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_every_request_meets_stops_the_run_and_is_no_outcome(fake, name):
    number, body, sentence = REFUSALS[name]
    data = body if isinstance(body, str) else json.dumps(body)
    fake.always = send_bytes(data.encode(), "application/json", number)
    samples = []
    with pytest.raises(OctomedError, match=sentence):
        for sample in engine().generate([ask(f"q{n}", 16) for n in range(40)], PLAIN):
            samples.append(sample)
    assert not samples and len(fake.asked) <= 2


OUTCOMES = {
    "OpenAI": (
        400,
        {
            "error": {
                "message": "maximum context length is 8 tokens",
                "code": "context_length_exceeded",
            }
        },
        "error",
    ),
    "vLLM": (
        400,
        {
            "object": "error",
            "message": "'max_tokens' is too large: 64. This model's maximum context length is "
            "70 tokens and your request has 11 input tokens",
        },
        "error",
    ),
    "in a chunk": (
        200,
        {
            "choices": None,
            "error_type": "BadRequestError",
            "error_message": "context length exceeded",
        },
        "error",
    ),
    "Anthropic": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "prompt is too long: 9 tokens > 8 maximum",
            },
        },
        "error",
    ),
    "TGI": (
        422,
        {
            "error": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4999",
            "error_type": "validation",
        },
        "error",
    ),
    "too large": (413, "<html><title>413 Request Entity Too Large</title></html>", "error"),
    "no sentence for it": (400, {"message": "image 0 cannot be decoded"}, "error"),
    "Azure's filter": (
        400,
        {
            "error": {
                "message": "triggering Azure OpenAI's content management policy",
                "code": "content_filter",
            }
        },
        "refused",
    ),
    "a moderation": (
        403,
        {"error": {"message": "Your chosen model requires moderation and your input was flagged"}},
        "refused",
    ),
    "Alibaba's filter": (
        400,
        {
            "code": "data_inspection_failed",
            "message": "Input data may contain inappropriate content.",
        },
        "refused",
    ),
}


@pytest.mark.parametrize("name", OUTCOMES)
@pytest.mark.parametrize("is_first", [True, False])
def test_what_one_request_meets_is_the_outcome_of_its_sample(fake, name, is_first):
    number, body, finish = OUTCOMES[name]
    data = body if isinstance(body, str) else json.dumps(body)
    refuse = send_bytes(data.encode(), "application/json", number)

    def act(h, body):
        is_odd = "odd" in body["messages"][0]["content"]
        refuse(h, body) if is_odd else h.stream(chunks("fine"))

    fake.always = act
    requests = [ask("odd", 4, text="this is odd"), ask("q1", 4)]
    samples = draw(requests if is_first else requests[::-1], concurrency=4)
    assert sorted((s.question, s.finish) for s in samples) == sorted(
        [("odd", finish)] * 4 + [("q1", "stop")] * 4
    )
    assert len(fake.asked) <= 9, "at most one control request"


def test_a_run_of_nothing_but_long_prompts_is_no_fault_of_every_request(fake):
    fake.always = status(400, "maximum context length is 8 tokens")
    assert [s.finish for s in draw([ask(f"q{n}", 2) for n in range(5)])] == ["error"] * 10


def test_a_request_whose_control_gets_no_answer_has_none_either(fake):
    fake.script = [status(400, "we are not amused"), *[status(503, "busy")] * 3]
    with pytest.raises(OctomedError, match=r"1 samples got no answer from FAKE \(busy\)"):
        draw([ask(n=3)], retries=2, concurrency=1)
    assert len(fake.asked) == 6


def test_fields_that_a_server_refuses_are_left_out_by_name(fake, monkeypatch):
    monkeypatch.setenv("FAKE_LEAVE_OUT", "seed, stream_options max_tokens")
    (sample,) = draw()
    (body,) = fake.asked
    assert sample.finish == "stop" and body["max_completion_tokens"] == 64
    assert not {"seed", "stream_options", "max_tokens"} & body.keys()


def test_a_limit_that_passes_is_waited_for_as_long_as_the_server_asks(fake, monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("octomed.generate.engine_openai.asyncio.sleep", sleep)
    soon = {"Retry_After": "1.5"}
    milliseconds = {"retry_after_ms": "1700"}
    for headers, least in ((soon, 1.5), (milliseconds, 1.7)):
        pauses.clear()
        fake.script = [send_json({"error": {"message": "slow down"}}, 429, **headers)] * 2
        assert [s.finish for s in draw()] == ["stop"]
        assert len(pauses) == 2 and min(pauses) == least


def test_a_limit_that_does_not_pass_has_an_end(fake):
    fake.always = send_events({"error": {"type": "overloaded_error", "message": "Overloaded"}})
    with pytest.raises(OctomedError, match=r"FAKE does not answer \(Overloaded\)"):
        draw([ask(n=40)], retries=2, concurrency=2)
    assert len(fake.asked) <= 3 * 6


def test_a_date_is_a_time_to_wait(fake):
    late = {"Retry_After": "Fri, 31 Dec 2100 23:59:59 GMT"}
    fake.always = send_json({"error": {"message": "slow down"}}, 429, **late)
    with pytest.raises(OctomedError, match=r"asks to wait \d+ s: run again after that"):
        draw()
    assert len(fake.asked) == 1


def test_lists_of_models_and_greetings_of_any_shape_are_no_traceback(fake):
    for models in ([], {"data": None}, {"object": "list"}, b"<html>hello</html>", {"models": [1]}):
        fake.models = models
        assert [s.finish for s in draw()] == ["stop"]
    fake.models = None
    fake.hello = send_json({"choices": [{"message": {"content": "Hi"}}]})
    assert engine().model == "fake", "a server that reports no version"
    for act, sentence in (
        (send_bytes(b"<html><title>Welcome</title></html>", "text/html"), "a web page, Welcome"),
        (send_json({"choices": []}), "`choices` is empty"),
        (send_json({"detail": "Model not loaded"}), "Model not loaded"),
    ):
        fake.hello = act
        with pytest.raises(OctomedError, match=sentence):
            _ = engine().model


def test_a_model_that_thinks_before_its_first_word_is_given_more_room(fake):
    refusal = "Could not finish the message because max_tokens or model output limit was reached"

    def answer(h, body):
        if body["max_tokens"] < 100:
            status(400, refusal)(h, body)
        else:
            h.send(completion("Hello"))

    fake.hello = answer
    assert engine().model == "fake@fake-1"


def test_a_greeting_that_is_refused_stops_the_run_with_the_servers_words(fake):
    fake.hello = status(400, "we are not amused")
    with pytest.raises(OctomedError, match=r"refuses every request \(we are not amused\)"):
        draw()
    assert not fake.asked


NAMES = """choices delta message content text type thinking finish_reason stop_reason usage error
code completion_tokens logprobs logprob model index refusal loc param detail metadata raw"""
KEYS = st.sampled_from(sorted(set(NAMES.split())))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("text")
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(KEYS, v), max_leaves=12)
CHOICES = st.fixed_dictionaries({"choices": st.lists(st.dictionaries(KEYS, VALUES), max_size=2)})


@given(CHOICES | VALUES)
def test_no_shape_is_a_traceback(part):
    reply = ServerResponse()
    try:
        reply.take_whole(part)
    except Fault as fault:
        assert fault.sentence
    else:
        assert isinstance(reply.join_thought(), str)
        assert reply.outcome in ("stop", "length", "refused")


@given(VALUES, st.sampled_from([200, 400, 422, 500]))
def test_every_error_has_a_sentence_and_a_kind(error, number):
    fault = read_fault(error, number)
    assert fault.sentence.strip()
    assert fault.kind in ("stop", "declined", "filtered", "unclear", "passing", "stated")


def test_an_object_that_is_nested_too_deeply_is_a_fault_with_a_sentence():
    with pytest.raises(Fault):
        ServerResponse().take_whole('{"error":' * 200_000)
    nested = {"message": "deep down"}
    for _ in range(900):
        nested = {"error": nested}
    assert read_fault(nested, 400).sentence
