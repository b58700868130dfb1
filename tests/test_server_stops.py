"""When a run stops, nothing more is asked, in every engine.

No test here measures time: servers and clients wait for each other."""

import itertools
import threading

import pytest
from misbehaving import (
    Handler,
    chunks,
    completion,
    send_bytes,
    send_json,
    serving,
    status,
    wait_for_hang_up,
)
from toys import ask, chat

from octomed.core.paths import OctomedError
from octomed.core.recipe import load_recipe
from octomed.generate.engine_openai import OpenAIEngine
from octomed.generate.engine_openai_batch import OpenAIBatchEngine
from octomed.generate.engine_transformers import TransformersEngine
from octomed.generate.ledger import Ledger, Stopped, top_up
from octomed.generate.samples import Request, Sampling, derive_sample_seed
from octomed.train.students import save_student

PLAIN = Sampling(temperature=1.0, max_tokens=8)
LONG = 300  # seconds that a test waits for what comes at once


@pytest.fixture
def begun(monkeypatch):
    "The number of requests that the client has begun."
    from octomed.generate.engine_openai import _Wire

    begun, plain = [], _Wire.on_request

    async def on_request(self, request):
        await plain(self, request)
        begun.append(request)

    monkeypatch.setattr(_Wire, "on_request", on_request)
    return begun


def engine(**kw):
    return OpenAIEngine("fake", "FAKE", **{"retries": 3, "timeout": LONG, **kw})


@pytest.mark.parametrize("number", [500, 401, 422])
def test_a_run_that_has_stopped_has_begun_nothing_more(monkeypatch, begun, number):
    "The server notices requests late. The run waits for what it has sent, however long that takes."
    monkeypatch.setattr("octomed.generate.engine_openai.GRACE", LONG)
    monkeypatch.setattr("octomed.generate.engine_openai.PAUSE", 0.01)
    with serving() as (fake, url):
        monkeypatch.setenv("FAKE_BASE_URL", url)
        fake.delays = iter([0.0, 0.05, 0.1, 0.15] * 100)
        fake.always = status(number)
        with pytest.raises(OctomedError):
            list(engine(concurrency=4).generate([ask("q1", 500)], PLAIN))
        asked = len(fake.asked)
    assert len(fake.asked) == asked == len(begun) <= 40
    assert number == 500 or asked <= 2


def test_what_is_in_flight_when_a_run_stops_is_cancelled(fake, monkeypatch, begun):
    monkeypatch.setattr("octomed.generate.engine_openai.GRACE", 0.05)
    gone, waiting = threading.Semaphore(0), threading.Barrier(4)
    wait = wait_for_hang_up(gone)

    def wait_together(h, body):
        waiting.wait(LONG)
        wait(h, body)

    def refuse_when_the_others_wait(h, body):
        waiting.wait(LONG)
        status(401)(h, body)

    fake.script = [
        lambda h, body: h.stream(chunks()),
        *[wait_together] * 3,
        refuse_when_the_others_wait,
    ]
    with pytest.raises(OctomedError, match="refuses the key"):
        list(engine(concurrency=4).generate([ask("q1", 500)], PLAIN))
    for _ in range(3):
        assert gone.acquire(timeout=LONG), "the client hangs up"
    assert len(fake.asked) == len(begun) == 5


def test_a_caller_that_stops_cancels_what_is_in_flight(fake, begun):
    arrived, gone = threading.Semaphore(0), threading.Semaphore(0)
    wait = wait_for_hang_up(gone)

    def arrive(h, body):
        arrived.release()
        wait(h, body)

    fake.script, fake.always = [lambda h, body: h.stream(chunks())], arrive
    threads = threading.active_count()
    samples = engine(concurrency=4).generate([ask("q1", 500)], PLAIN)
    next(samples)
    for _ in range(4):
        assert arrived.acquire(timeout=LONG), "four requests are in flight"
    samples.close()
    for _ in range(4):
        assert gone.acquire(timeout=LONG), "the client hangs up"
    assert len(fake.asked) == len(begun) == 5
    assert threading.active_count() <= threads + 5, "the server's own threads may be left"


def test_a_request_that_waits_to_be_sent_again_is_not_sent_after_the_stop(fake, begun):
    waits = threading.Event()

    def ask_to_wait(h, body):
        send_json({"error": {"message": "slow down"}}, 429, Retry_After="100")(h, body)
        waits.set()

    def refuse(h, body):
        waits.wait(LONG)
        status(401)(h, body)

    fake.script = [lambda h, body: h.stream(chunks()), ask_to_wait, refuse]
    with pytest.raises(OctomedError, match="refuses the key"):
        list(engine(concurrency=2).generate([ask("q1", 500)], PLAIN))
    assert len(fake.asked) == len(begun) <= 4


def test_a_run_begins_with_one_request_until_the_server_answers(fake):
    "The others would be paid for as well if every request met a fault."
    fake.always = status(503)
    begun = []

    async def sleep(seconds):
        begun.append(len(fake.asked))

    with pytest.MonkeyPatch.context() as m:
        m.setattr("octomed.generate.engine_openai.asyncio.sleep", sleep)
        samples = engine(concurrency=8, retries=3).generate([ask("q1", 16)], PLAIN)
        with pytest.raises(OctomedError, match=r"FAKE does not answer \(broken\)"):
            list(samples)
    assert begun[:3] == [1, 2, 3], "the first request is asked again before another is sent"


FAILURES = {
    "500": status(500, "the engine is dead"),
    "502": send_bytes(b"<title>the engine is dead</title>", "text/html", 502),
    "503": status(503, "the engine is dead"),
    "529": status(529, "the engine is dead"),
    "429": status(429, "the engine is dead"),
    "an error in the stream": lambda h, body: h.stream(
        [chunks()[0], {"error": {"message": "the engine is dead", "code": 500}}]
    ),
    "a stated one": send_json({"error": "the engine is dead"}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_server_that_only_fails_gets_nine_requests_within_32_seconds(fake, monkeypatch, name):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    fake.always = FAILURES[name]
    monkeypatch.setattr("octomed.generate.engine_openai.PAUSE", 0.5)
    monkeypatch.setattr("octomed.generate.engine_openai.asyncio.sleep", sleep)
    with pytest.raises(OctomedError, match=r"FAKE does not answer .*the engine is dead.*is up"):
        list(OpenAIEngine("fake", "FAKE").generate([ask("q1", 500)], PLAIN))
    assert len(fake.asked) <= 9 and sum(pauses) < 32


def test_a_server_that_dies_is_asked_no_second_round(fake, monkeypatch):
    "Requests under way are sent again seven times; when all have failed, no other is begun."
    fake.script = [lambda h, body: h.stream(chunks())] * 5
    fake.always = status(500, "the engine is dead")
    run, samples = engine(retries=6, concurrency=4).generate([ask("q1", 500)], PLAIN), []
    with pytest.raises(OctomedError, match="the engine is dead"):
        samples.extend(run)
    assert len(fake.asked) <= 5 + 7 * (4 + 3)


def test_a_server_that_fails_at_first_is_waited_for(fake):
    fake.script = [status(503)] * 4
    samples = list(engine(retries=6).generate([ask("q1", 40)], PLAIN))
    assert len(samples) == 40 and len(fake.asked) == 44


@pytest.fixture(scope="module")
def here(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    save_student(path, *student, [])
    return TransformersEngine(path, "tiny@1", max_pixels=12_544, batch=2)


def test_transformers_begins_no_batch_after_the_stop(here, tmp_path, monkeypatch):
    from octomed.generate import engine_transformers

    batches, plain = [], engine_transformers._complete

    def complete(engine, texts, images, **kw):
        batches.append(len(texts))
        return plain(engine, texts, images, **kw)

    monkeypatch.setattr(engine_transformers, "_complete", complete)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(Stopped, match="enough: 1 of 8 samples are kept"):
        top_up(ledger, here, [ask("q1", 8)], PLAIN, stop=lambda sample: "enough")
    assert batches == [2]


def test_a_simulated_teacher_answers_nothing_after_the_stop(tmp_path, monkeypatch):
    from octomed.clinic.teachers import SimulatedTeacher
    from octomed.data.sources import load
    from octomed.generate.engines import load_teacher

    answered, plain = [], SimulatedTeacher.answer

    def answer(self, request, sampling, seed):
        answered.append(request.question)
        return plain(self, request, sampling, seed)

    monkeypatch.setattr(SimulatedTeacher, "answer", answer)
    load_recipe("smoke")
    q = load("clinic_ward:train", limit=1)[0]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    requests = [Request(q.id, chat(q.stem), "a prompt", tuple(range(8)))]
    with pytest.raises(Stopped, match="enough: 1 of 8 samples are kept"):
        top_up(
            ledger, load_teacher("clinic/reasoner"), requests, PLAIN, stop=lambda sample: "enough"
        )
    assert len(answered) == len(ledger) == 1


def test_the_ledger_closes_an_engine_at_once_and_takes_one_without_close(tmp_path):
    from octomed.generate.engines import make_sample

    class Engine:
        model, name, closed = "m@1", "toy", False

        def generate(self, requests, sampling):
            try:
                for request in requests:
                    for index in request.indices:
                        yield make_sample(
                            self, request, index, sampling=sampling, text="B", finish="stop"
                        )
            finally:
                self.closed = True

    class Kept(Engine):
        def generate(self, requests, sampling):
            self.samples = super().generate(requests, sampling)
            return self.samples  # somebody else holds the iterator as well

    class Mapped(Engine):
        def generate(self, requests, sampling):
            return itertools.chain(super().generate(requests, sampling))

    for kind in (Kept, Mapped):
        e = kind()
        ledger = Ledger(tmp_path / f"{kind.__name__}.sqlite")
        with pytest.raises(Stopped):
            top_up(ledger, e, [ask("q1", 8)], PLAIN, stop=lambda sample: "enough")
        assert e.closed and len(ledger) == 1


# batch files


def batches(**kw):
    return OpenAIBatchEngine("fake", "FAKE", poll=0.01, max_pixels=12_544, retries=0, **kw)


def question(name, n):
    return Request(name, chat(f"{name}: which?"), f"prompt of {name}", tuple(range(n)))


@pytest.fixture(autouse=True)
def own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("OCTOMED_STORE", str(tmp_path / "store"))


def interrupt(seconds):
    raise KeyboardInterrupt


def test_a_caller_that_stops_cancels_the_batches_that_are_not_ready(fake, monkeypatch):
    run = batches(lines=2).generate([question("q", 6)], PLAIN)
    next(run)  # of the first of three batches
    run.close()
    assert fake.cancelled == ["batch-1", "batch-2"]
    fake.cancelled.clear()
    fake.batch_status = "in_progress"
    monkeypatch.setattr("octomed.generate.engine_openai_batch.time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(batches().generate([question("paid", 2)], PLAIN))
    assert not fake.cancelled, "what was paid for is collected by the next run"


def test_a_batch_file_that_is_refused_stops_the_others(fake):
    fake.batch_status = "failed"
    with pytest.raises(OctomedError, match="refused the batch file"):
        list(batches(lines=2).generate([question("q", 6)], PLAIN))
    assert "batch-1" in fake.cancelled and "batch-2" in fake.cancelled


def test_files_that_only_fail_are_sent_seven_times(fake, monkeypatch):
    sent = []

    def fail(h, data):
        sent.append(data)
        status(503, "the engine is dead")(h, data)

    monkeypatch.setattr(Handler, "upload", fail)
    run = OpenAIBatchEngine("fake", "FAKE", poll=0.01).generate([question("q", 4)], PLAIN)
    with pytest.raises(OctomedError, match=r"FAKE does not answer .the engine is dead.: run again"):
        list(run)
    assert len(sent) == 7 and not fake.batches


def submit(fake, n, name="q", **kw):
    "Submit a batch that is not collected."
    fake.batch_status = "in_progress"
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as m:
        m.setattr("octomed.generate.engine_openai_batch.time.sleep", interrupt)
        list(batches(**kw).generate([question(name, n)], PLAIN))
    fake.batch_status = "completed"


def test_a_batch_that_is_gone_is_named_and_asked_again(fake, capsys):
    submit(fake, 4)
    fake.batches["batch-elsewhere"] = fake.batches.pop("batch-0")
    samples = list(batches().generate([question("q", 4)], PLAIN))
    assert sorted(s.index for s in samples) == [0, 1, 2, 3]
    assert "the batch batch-0 at FAKE is given up (no such path)" in capsys.readouterr().err
    assert len(list(batches().folder.glob("*.json"))) == 1


def test_a_batch_whose_file_is_gone_is_named_and_asked_again(fake, capsys):
    submit(fake, 4)
    del fake.files["out-batch-0"]
    samples = list(batches().generate([question("q", 4)], PLAIN))
    assert sorted(s.index for s in samples) == [0, 1, 2, 3]
    assert "batch-0 at FAKE is given up" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["expired", "cancelled", "EXPIRED", "canceled"])
def test_an_expired_batch_gives_what_it_has_and_the_rest_is_asked_again(fake, word):
    submit(fake, 4)
    lines = fake.files["out-batch-0"].splitlines()
    fake.files["out-batch-0"] = lines[0] + b"\n"
    fake.batch_status = word
    with pytest.raises(OctomedError, match=rf"batch batch-\d is {word.lower()}.*run again"):
        fake.complete = lambda body: None
        list(batches().generate([question("q", 4)], PLAIN))
    fake.batch_status, fake.complete = "completed", lambda body: completion("B")
    assert len(list(batches().generate([question("q", 4)], PLAIN))) == 4


LINES = {
    "max_tokens": (completion("B", finish="max_tokens"), ("B", "length")),
    "end_turn": (completion("B", finish="end_turn"), ("B", "stop")),
    "no word": (completion("B", finish=None), ("B", "stop")),
    "U+2028": (completion("a\u2028b"), ("a\u2028b", "stop")),
    "parts": (completion([{"type": "text", "text": "B"}]), ("B", "stop")),
    "a body that is a text": (
        {"status_code": 200, "body": '{"choices": [{"message": {"content": "B"}}]}'},
        ("B", "stop"),
    ),
    "too long": (
        {"status_code": 400, "body": {"message": "prompt is too long"}},
        ("prompt is too long", "error"),
    ),
    "a text that is an error": (
        {"status_code": 413, "body": "Entity Too Large"},
        ("Entity Too Large", "error"),
    ),
    "a filter": ({"status_code": "400", "body": {"error": {"code": "content_filter"}}}, None),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_any_shape_are_read(fake, name):
    line, wanted = LINES[name]
    fake.complete = lambda body: line
    (sample,) = batches().generate([question("q", 1)], PLAIN)
    assert (sample.text, sample.finish) == wanted if wanted else sample.finish == "refused"


@pytest.mark.parametrize(
    "line, reason",
    [
        ({"choices": []}, "`choices` is empty"),
        ({"status_code": 200, "body": "not today"}, "not today"),
        ({"status_code": 200, "body": None}, "the line has no body"),
        ({"status_code": 200, "body": 7}, "7"),
        ({"status_code": 503, "body": {"detail": "overloaded"}}, "overloaded"),
        ({"status_code": None, "body": {"choices": None}}, "`choices` is empty"),
    ],
)
def test_a_line_without_an_answer_is_named_and_asked_again(fake, line, reason):
    bad = derive_sample_seed(PLAIN, "q", 1)
    fake.complete = lambda body: line if body["seed"] == bad else completion("B")
    samples = []
    with pytest.raises(
        OctomedError, match=f"1 lines of the batch got no answer.*{reason}.*run again"
    ):
        for sample in batches().generate([question("q", 3)], PLAIN):
            samples.append(sample)
    assert sorted(s.index for s in samples) == [0, 2]
    fake.complete = lambda body: completion("B")
    again = Request("q", question("q", 3).messages, "prompt of q", (1,))
    assert [s.text for s in batches().generate([again], PLAIN)] == ["B"]


@pytest.mark.parametrize(
    "body, sentence",
    [
        ({"detail": [{"loc": ["body", "seed"], "msg": "not permitted"}]}, "does not take seed"),
        ({"message": "we are not amused"}, "refuses every request .*not amused"),
    ],
)
def test_a_batch_that_is_refused_line_by_line_stops_the_run_once(fake, body, sentence):
    "The next run asks again. It does not read the old refusals for ever."
    fake.complete = lambda _: {"status_code": 422, "body": body}
    with pytest.raises(OctomedError, match=sentence):
        list(batches().generate([question("q", 4)], PLAIN))
    fake.complete = lambda body: completion("B")
    assert len(list(batches(leave_out=("temperature",)).generate([question("q", 4)], PLAIN))) == 4


def test_a_server_that_answers_files_with_pages_has_no_batch_files(fake, monkeypatch):
    monkeypatch.setattr(Handler, "upload", lambda h, data: h.send(b"<html>hi</html>"))
    with pytest.raises(OctomedError, match="has no batch files: use an openai: teacher"):
        list(batches().generate([question("q", 1)], PLAIN))


def test_a_status_of_a_batch_that_is_not_known_is_named_once(fake, capsys, monkeypatch):
    looks = []

    def look(seconds):
        looks.append(seconds)
        fake.batch_status = "SUCCESS" if len(looks) > 2 else "marinating"

    fake.batch_status = "marinating"
    monkeypatch.setattr("octomed.generate.engine_openai_batch.time.sleep", look)
    assert len(list(batches().generate([question("q", 2)], PLAIN))) == 2
    assert capsys.readouterr().err.count("is 'marinating', a word that is not known here") == 1
