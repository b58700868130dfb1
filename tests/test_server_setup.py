"""What must be right before a server is asked: address, key, proxy, certificates."""

import shutil
import socket
import ssl
import subprocess
import threading
from http.server import ThreadingHTTPServer

import pytest
from misbehaving import KEY, Fake, Handler, send_bytes
from toys import ask

from octomed.core.paths import OctomedError
from octomed.generate.engine_openai import OpenAIEngine
from octomed.generate.engine_openai_batch import OpenAIBatchEngine
from octomed.generate.engines import load_teacher
from octomed.generate.samples import Sampling
from octomed.generate.servers import Server


def say(kind=OpenAIEngine, **kw):
    "The sentence that a run with this environment ends in."
    with pytest.raises(OctomedError) as failed:
        list(kind("fake", "FAKE", retries=0, **kw).generate([ask("q1", 1)], Sampling()))
    sentence = str(failed.value)
    assert "\n" not in sentence and "sk-1" not in sentence and KEY not in sentence
    return sentence


ADDRESSES = {
    "http://localhost:8000/v1\n": "FAKE_BASE_URL begins or ends in a blank or a line break",
    " http://localhost:8000/v1": "begins or ends in a blank",
    "http://localhost:8000/v1\r": "begins or ends in a blank or a line break",
    "http://local host/v1": "holds a blank",
    "http://localhost:8000\u200b/v1": "an invisible character",
    '"http://localhost:8000/v1"': "quotation marks",
    "localhost:8000/v1": "has no http:// or https:// before localhost:8000/v1",
    "api.example.com": "has no http:// or https:// before api.example.com",
    "ws://localhost/v1": "begins with ws://",
    "http://": "names no host",
    "http:///v1": "names no host",
    "http://localhost:port/v1": "is no address",
    "http://localhost:99999/v1": "is no address",
    "http://[::1/v1": "is no address",
    "http://api..example.com/v1": "is no address",
    "http://h/v1/chat/completions": "ends in /chat/completions, which is added to it: "
    "set it to http://h/v1",
    "http://h/v1/chat/completions/": "set it to http://h/v1",
    "http://h/v1/completions": "ends in /completions",
    "http://h/v1/models": "ends in /models",
    "http://h/openai?api-version=2024-10-21": "holds a query",
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_cannot_be_is_named_at_once(fake, monkeypatch, url):
    monkeypatch.setenv("FAKE_BASE_URL", url)
    assert ADDRESSES[url] in say() and "FAKE_BASE_URL" in say()
    assert say(OpenAIBatchEngine) == say()
    with pytest.raises(OctomedError, match="FAKE_BASE_URL"):
        load_teacher("openai:fake@FAKE")
    assert not fake.headers


KEYS = {
    "": "FAKE_API_KEY is empty",
    "  ": "is empty",
    "sk-1\n": "begins or ends in a blank or a line break",
    "sk-1\r\n": "begins or ends in a blank or a line break",
    " sk-1": "begins or ends in a blank",
    "sk-\n1": "holds a blank, a line break",
    "'sk-1'": "quotation marks",
    "Bearer sk-1": "the word Bearer",
    "sk\u20131": "holds a character that no key has",
    "sk-1\x00": None,
}


@pytest.mark.parametrize("key", [key for key, flaw in KEYS.items() if flaw])
def test_a_key_that_cannot_be_is_named_at_once(fake, monkeypatch, key):
    monkeypatch.setenv("FAKE_API_KEY", key)
    assert KEYS[key] in say() and "FAKE_API_KEY" in say()
    assert not fake.headers


def test_a_server_may_ask_for_no_key_but_openais_asks_for_one(fake, monkeypatch):
    monkeypatch.delenv("FAKE_API_KEY")
    (sample,) = OpenAIEngine("fake", "FAKE").generate([ask("q1", 1)], Sampling())
    assert sample.finish == "stop"
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(OctomedError, match="OPENAI asks for a key: set OPENAI_API_KEY"):
        list(OpenAIEngine("gpt-4o").generate([ask("q1", 1)], Sampling()))


PROXIES = {
    "socks5://127.0.0.1:1080": "needs the package socksio: pip install socksio, or unset ",
    "socks5h://127.0.0.1:1080": "needs the package socksio",
    "socks4://127.0.0.1:1080": "names no proxy that can be used",
    "ftp://127.0.0.1:1080": "names no proxy that can be used",
    "http://127.0.0.1:port": "names no proxy that can be used",
}


@pytest.mark.parametrize("address", PROXIES)
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "http_proxy"])
def test_a_proxy_that_cannot_be_used_is_named_at_once(fake, monkeypatch, name, address):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv(name, address)
    sentence = say()
    assert sentence.startswith(name) and PROXIES[address] in sentence
    assert not fake.headers


def test_a_proxy_that_is_not_up_is_named(fake, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.1:{port}")
    sentence = say()
    assert f"through the proxy that HTTP_PROXY names, 127.0.0.1:{port}" in sentence
    assert "secret" not in sentence


def test_certificates_that_are_not_there_are_named_at_once(fake, monkeypatch, tmp_path):
    wrong = tmp_path / "no.pem"
    wrong.write_text("no certificate")
    for name, value, flaw in (
        ("SSL_CERT_FILE", "/no/such.pem", "cannot be read (No such file or directory)"),
        ("SSL_CERT_FILE", str(tmp_path), "cannot be read"),
        ("SSL_CERT_FILE", str(wrong), "which holds no certificate"),
        ("SSL_CERT_DIR", "/no/such", "which is no folder"),
    ):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            assert say().startswith(f"{name} names {value}") and flaw in say()
    assert not fake.headers


@pytest.fixture
def self_signed(tmp_path):
    "(what it does, address, certificate) of a server whose certificate nobody knows."
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed, which makes the certificate")
    key, file = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(file)]
    subprocess.run([*make, *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    fake = Fake()
    handler = type("FakeHandler", (Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield fake, f"https://127.0.0.1:{server.server_address[1]}/v1", file
    server.shutdown()
    server.server_close()


def test_a_certificate_that_is_not_trusted_is_named_at_once(self_signed, monkeypatch):
    fake, address, file = self_signed
    monkeypatch.setenv("FAKE_BASE_URL", address)
    monkeypatch.setattr("octomed.generate.engine_openai.PAUSE", None)  # no second try
    with pytest.raises(OctomedError) as failed:
        list(OpenAIEngine("fake", "FAKE").generate([ask("q1", 1)], Sampling()))
    assert f"the certificate of {address} is not trusted here (self" in str(failed.value)
    assert "set SSL_CERT_FILE" in str(failed.value) and not fake.headers
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    (sample,) = OpenAIEngine("fake", "FAKE").generate([ask("q1", 1)], Sampling())
    assert sample.finish == "stop"


def test_https_to_a_server_that_speaks_http_is_named_at_once(fake, monkeypatch):
    url = Server("FAKE").url.replace("http://", "https://")
    monkeypatch.setenv("FAKE_BASE_URL", url)
    assert "if it speaks plain http, set FAKE_BASE_URL to http://" in say()


def test_what_a_failed_connection_means_is_named(fake, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("FAKE_BASE_URL", f"http://127.0.0.1:{port}/v1")
    assert "nothing listens at 127.0.0.1:" in say()
    monkeypatch.setenv("FAKE_BASE_URL", "http://no-such-host.invalid/v1")
    assert "the host no-such-host.invalid is not known" in say()


def test_a_server_that_sends_requests_elsewhere_is_named(fake, monkeypatch):
    elsewhere = send_bytes(b"", "text/html", 301, Location="/elsewhere")
    fake.hello = elsewhere
    with monkeypatch.context() as m:
        m.setattr(Handler, "do_GET", lambda h: h.send({"detail": "Method Not Allowed"}, 405))
        assert "/elsewhere" in say()


def test_no_password_of_an_address_or_a_proxy_is_seen(monkeypatch):
    monkeypatch.setenv("FAKE_BASE_URL", "http://me:pass-1@localhost/v1")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass-2@proxy:80")
    monkeypatch.setenv("FAKE_API_KEY", "pass-3\n")
    text = Server("FAKE").clean("pass-1 pass-2 pass-3")
    assert text == "[removed] [removed] [removed]"


def test_a_word_that_stands_for_no_key_is_left_in_texts(monkeypatch):
    text = "The bladder is EMPTY, none of the others are."
    for key in ("EMPTY", "none", "x"):
        monkeypatch.setenv("FAKE_API_KEY", key)
        assert Server("FAKE").clean(text) == text
