"""A local server that speaks OpenAI's protocol and misbehaves on purpose."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from octomed.generate.engine_openai import on_loopback


def chunks(text="<think>I see.</think> <answer>B</answer>", finish="stop", model="fake-1", **delta):
    "A response as the parts of a stream."

    def part(d, f=None):
        return {
            "id": "x",
            "object": "chat.completion.chunk",
            "model": model,
            "system_fingerprint": "fp_1",
            "choices": [{"index": 0, "delta": d, "finish_reason": f}],
        }

    words = [part({"content": w}) for w in text.split(" ") and [text[:5], text[5:]] if w]
    return [
        part({"role": "assistant", **delta}),
        *words,
        part({}, finish),
        {
            "id": "x",
            "model": model,
            "choices": [],
            "usage": {"completion_tokens": 7, "prompt_tokens": 11},
        },
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
        "usage": {"completion_tokens": 7, "prompt_tokens": 11, "total_tokens": 18},
    }


class Fake:
    "What the server does: `script` holds one misbehaviour after another, then all goes well."

    def __init__(self):
        self.script, self.asked, self.headers, self.files, self.batches, self.owner = (
            [],
            [],
            [],
            {},
            {},
            "fake",
        )
        self.answer = lambda body: chunks()  # of a streamed request
        self.complete = lambda body: completion(f"seed {body['seed']}")  # of a line of a batch file
        self.refuses = None  # a key that every request is refused with, by its name
        self.batch_status, self.lock, self.most, self.now = "completed", threading.Lock(), 0, 0


def handler(fake):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *a):
            pass

        def send(self, obj, status=200, **headers):
            data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
            self.send_response(status)
            for k, v in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **{k.replace("_", "-"): v for k, v in headers.items()},
            }.items():
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(data)

        def stream(self, parts, done=True):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for p in parts:
                self.wfile.write(
                    b": still here\n\ndata: "
                    + (p if isinstance(p, bytes) else json.dumps(p).encode())
                    + b"\n\n"
                )
            if done:
                self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def read(self):
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.headers.append(dict(self.headers))
            return data

        def do_GET(self):
            self.read()
            path = self.path.removeprefix("/v1")
            if path == "/models":
                return self.send(
                    {
                        "object": "list",
                        "data": [
                            {"id": "fake", "object": "model", "created": 0, "owned_by": fake.owner}
                        ],
                    }
                )
            if path.startswith("/batches/") and (b := fake.batches.get(path.split("/")[2])):
                return self.send({**b, "status": fake.batch_status})
            if path.startswith("/files/") and (f := fake.files.get(path.split("/")[2])) is not None:
                return self.send(f)
            self.send({"error": {"message": "no such path"}}, 404)
            return None

        def do_POST(self):
            data, path = self.read(), self.path.removeprefix("/v1")
            if fake.refuses:
                return self.send(
                    {"error": {"message": f"Incorrect API key provided: {fake.refuses}"}}, 401
                )
            if path == "/chat/completions":
                return self.chat(json.loads(data))
            if path == "/files" and fake.files is not None:
                return self.upload(data)
            if path == "/batches" and fake.files is not None:
                return self.batch(json.loads(data))
            self.send({"error": {"message": "no such path"}}, 404)
            return None

        def chat(self, body):
            if not body.get("stream"):
                return self.send(completion("Hello", model="fake-1"))
            with fake.lock:
                fake.asked.append(body)
                fake.now += 1
                fake.most = max(fake.most, fake.now)
                act = fake.script.pop(0) if fake.script else None
            try:
                act(self, body) if act else self.stream(fake.answer(body))
            finally:
                fake.now -= 1

        def upload(self, data):
            name = f"file-{len(fake.files)}"
            fake.files[name] = data[data.index(b'{"custom_id"') : data.rindex(b"}\n") + 2]
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

        def batch(self, body):
            id = f"batch-{len(fake.batches)}"
            rows = [json.loads(l) for l in fake.files[body["input_file_id"]].splitlines()]
            out = [
                {
                    "custom_id": r["custom_id"],
                    "response": c if "status_code" in c else {"status_code": 200, "body": c},
                }
                for r in reversed(rows)
                if (c := fake.complete(r["body"]))
            ]
            fake.files[f"out-{id}"] = (
                "".join(json.dumps(o) + "\n" for o in out).encode() + b"{this is no JSON\n"
            )
            fake.batches[id] = {
                "id": id,
                "object": "batch",
                "endpoint": body["endpoint"],
                "input_file_id": body["input_file_id"],
                "completion_window": "24h",
                "created_at": 0,
                "output_file_id": f"out-{id}",
                "errors": {
                    "object": "list",
                    "data": [{"message": "line 1 is malformed", "code": "x"}],
                }
                if fake.batch_status == "failed"
                else None,
            }
            self.send({**fake.batches[id], "status": "validating"})

    return Handler


def status(number, message="broken", wait=None, **error):
    "Answer with an HTTP status."
    return lambda h, body: h.send(
        {"error": {"message": message, **error}}, number, **({"Retry_After": wait} if wait else {})
    )


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


def slow(h, body):
    time.sleep(2.5)
    h.stream(chunks())


def error_in_stream(h, body):
    h.stream([chunks()[0], {"error": {"message": "the engine died"}}])


def out_of_resources(h, body):
    h.stream(chunks("<think>I", finish="insufficient_system_resource"))


@contextmanager
def serving():
    "(what it does, its address) of a server on a free port."
    fake = Fake()
    with on_loopback(handler(fake)) as url:
        yield fake, url
