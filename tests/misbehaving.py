"""A local server that speaks OpenAI's protocol and misbehaves on purpose."""

import itertools
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from octomed.generate.engine_openai import serve_locally

KEY = "sk-canary-5f1d8c"  # of the fixture `fake`; no sentence may show it
USAGE = {"completion_tokens": 7, "prompt_tokens": 11}


def _chunk(model, delta, finish=None):
    return {
        "id": "x",
        "object": "chat.completion.chunk",
        "model": model,
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def chunks(text="<think>I see.</think> <answer>B</answer>", finish="stop", model="fake-1", **delta):
    "A response as the parts of a stream."
    pieces = [piece for piece in (text[:5], text[5:]) if piece]
    return [
        _chunk(model, {"role": "assistant", **delta}),
        *(_chunk(model, {"content": piece}) for piece in pieces),
        _chunk(model, {}, finish),
        {"id": "x", "model": model, "choices": [], "usage": USAGE},
    ]


def completion(text, finish="stop", model="fake-1", **message):
    "A whole response."
    return {
        "id": "x",
        "object": "chat.completion",
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish,
            }
        ],
        "usage": {**USAGE, "total_tokens": 18},
    }


class Fake:
    "What the server does: `script` holds one misbehaviour after another, then all goes well."

    def __init__(self):
        self.script = []
        self.always = None  # a misbehaviour in place of every answer to a streamed request
        self.asked = []  # bodies of streamed requests
        self.headers = []
        self.files = {}
        self.batches = {}
        self.owner = "fake"
        self.models = None  # what is sent in place of the list of models
        self.hello = None  # what answers the first, small request
        self.tokens = None  # number of each whole token that vLLM's `/tokenize` knows
        self.cancelled = []  # ids of batches
        self.answer = lambda body: chunks()  # to a streamed request
        self.complete = lambda body: completion(f"seed {body['seed']}")  # to a line of a batch file
        self.refuses = None  # a key: every request is refused, and the message quotes the key
        self.batch_status = "completed"
        self.delays = itertools.repeat(0.0)  # seconds before each streamed request is noticed
        self.lock = threading.Lock()
        self.now = 0  # streamed requests under way
        self.most = 0  # the most that were under way together

    def tokenize(self, body):
        "The answer of vLLM's `/tokenize`: known tokens are whole, all else is characters."
        known = "|".join(map(re.escape, self.tokens))
        pieces = re.findall(f"{known}|.", body["prompt"])
        return {
            "tokens": [self.tokens.get(piece, 1000 + ord(piece[0])) for piece in pieces],
            "token_strs": pieces,
        }

    def take(self, body):
        "Note a streamed request; gives the next misbehaviour, if one is left."
        with self.lock:
            delay = next(self.delays)
        time.sleep(delay)
        with self.lock:
            self.asked.append(body)
            self.now += 1
            self.most = max(self.most, self.now)
            return self.script.pop(0) if self.script else self.always

    def run_batch(self, body):
        "Answer a batch file, in another order and with a broken line at its end."
        batch_id = f"batch-{len(self.batches)}"
        rows = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        lines = []
        for row in reversed(rows):
            response = self.complete(row["body"])
            if not response:
                continue
            if "status_code" not in response:
                response = {"status_code": 200, "body": response}
            lines.append(json.dumps({"custom_id": row["custom_id"], "response": response}) + "\n")
        self.files[f"out-{batch_id}"] = "".join(lines).encode() + b"{this is no JSON\n"
        errors = {"object": "list", "data": [{"message": "line 1 is malformed", "code": "x"}]}
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "created_at": 0,
            "output_file_id": f"out-{batch_id}",
            "errors": errors if self.batch_status == "failed" else None,
        }
        return self.batches[batch_id]


class Handler(BaseHTTPRequestHandler):
    "The protocol; `serving` makes a subclass with a `Fake`."

    fake: Fake
    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def send(self, obj, status=200, **headers):
        data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def send_not_found(self):
        self.send({"error": {"message": "no such path"}}, 404)

    def stream(self, parts, done=True):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for part in parts:
            data = part if isinstance(part, bytes) else json.dumps(part).encode()
            self.wfile.write(b": still here\n\ndata: " + data + b"\n\n")
        if done:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def read(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fake.headers.append(dict(self.headers))
        return data

    def do_GET(self):
        self.read()
        kind, _, name = self.path.removeprefix("/v1/").partition("/")
        name = name.split("/")[0]
        if kind == "models" and self.fake.models is not None:
            self.send(self.fake.models)
        elif kind == "models":
            model = {"id": "fake", "object": "model", "created": 0, "owned_by": self.fake.owner}
            self.send({"object": "list", "data": [model]})
        elif kind == "batches" and name in self.fake.batches:
            self.send({**self.fake.batches[name], "status": self.fake.batch_status})
        elif kind == "files" and name in self.fake.files:
            self.send(self.fake.files[name])
        else:
            self.send_not_found()

    def do_POST(self):
        data, path = self.read(), self.path.removeprefix("/v1")
        if self.fake.refuses:
            message = f"Incorrect API key provided: {self.fake.refuses}"
            self.send({"error": {"message": message}}, 401)
        elif path == "/chat/completions":
            self.chat(json.loads(data))
        elif path == "/tokenize" and self.fake.tokens:
            self.send(self.fake.tokenize(json.loads(data)))
        elif path.endswith("/cancel"):
            self.fake.cancelled.append(path.split("/")[2])
            self.send({**self.fake.batches[path.split("/")[2]], "status": "cancelling"})
        elif path == "/files" and self.fake.files is not None:
            self.upload(data)
        elif path == "/batches" and self.fake.files is not None:
            self.send({**self.fake.run_batch(json.loads(data)), "status": "validating"})
        else:
            self.send_not_found()

    def chat(self, body):
        if not body.get("stream"):
            (self.fake.hello or send_json(completion("Hello", model="fake-1")))(self, body)
            return
        act = self.fake.take(body)
        try:
            if act:
                act(self, body)
            else:
                self.stream(self.fake.answer(body))
        finally:
            self.fake.now -= 1

    def upload(self, data):
        name = f"file-{len(self.fake.files)}"
        self.fake.files[name] = data[data.index(b'{"custom_id"') : data.rindex(b"}\n") + 2]
        self.send(
            {
                "id": name,
                "object": "file",
                "bytes": len(data),
                "created_at": 0,
                "filename": "octomed.jsonl",
                "purpose": "batch",
                "status": "processed",
            }
        )


def status(number, message="broken", wait=None, **error):
    "Answer with an HTTP status."
    headers = {"Retry_After": wait} if wait else {}
    return lambda h, body: h.send({"error": {"message": message, **error}}, number, **headers)


def malformed(h, body):
    h.stream([chunks()[0], b'{"choices": [{"delta"', *chunks()[1:]])


def web_page(h, body):
    h.send(b"<html>Bad gateway</html>")


def cut(h, body):
    h.stream(chunks()[:2], done=False)


def hang_up(h, body):
    h.send_response(200)
    h.send_header("Content-Length", "9999")
    h.end_headers()
    h.wfile.write(b"data: ")
    h.wfile.flush()
    h.connection.close()
    h.close_connection = True


def send_bytes(data, content_type="text/event-stream", number=200, **headers):
    "Answer with these bytes, whatever they are."

    def act(h, body):
        h.send_response(number)
        h.send_header("Content-Type", content_type)
        for name, value in headers.items():
            h.send_header(name.replace("_", "-"), value)
        h.send_header("Connection", "close")
        h.end_headers()
        h.wfile.write(data)
        h.close_connection = True

    return act


def send_json(body, number=200, **headers):
    "Answer with a whole JSON body."
    return send_bytes(json.dumps(body).encode(), "application/json", number, **headers)


def send_events(*parts, end="\n", done=True, last="\n"):
    "Answer with one event for each part; `end` ends each line."
    lines = []
    for part in parts:
        text = part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
        lines += [f"data: {text}{end}", end]
    if done:
        lines.append(f"data: [DONE]{end}{last}")
    return send_bytes("".join(lines).encode())


def wait_for_hang_up(gone):
    "Answer nothing until the client has hung up, and count that."

    def act(h, body):
        h.connection.recv(1)  # gives nothing when the client closes the connection
        gone.release()
        h.close_connection = True

    return act


def error_in_stream(h, body):
    h.stream([chunks()[0], {"error": {"message": "the engine died"}}])


def out_of_resources(h, body):
    h.stream(chunks("<think>I", finish="insufficient_system_resource"))


@contextmanager
def serving():
    "(what it does, its address) of a server on a free port."
    fake = Fake()
    with serve_locally(type("FakeHandler", (Handler,), {"fake": fake})) as url:
        yield fake, url
