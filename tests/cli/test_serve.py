"""`gfxlm serve` as a process: it listens at once, answers, and ends in order."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gfxlm.cli.serve import HttpOptions
from gfxlm.errors import UserError
from tests.cli.runner import complaint

LISTENING = re.compile(r"listening on (https?://\S+)")
ENDLESS = {"prompt": "import os", "max_tokens": 1800, "ignore_eos": True, "stream": True}


class Served:
    """The process, where it listens, and what it logs."""

    def __init__(self, *options: str, program: Sequence[str] = ("-m", "gfxlm"), **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.lines: list[str] = []
        self.listening = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.listening.wait(60), self.log

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := LISTENING.search(line):
                self.url = found[1].rstrip('"},')
                self.listening.set()

    def until_ready(self, client: httpx.Client) -> None:
        end = time.monotonic() + 60
        while client.get("/health").status_code != 200:
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    def ended(self, seconds: float = 20) -> int:
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def served(*options: str, program: Sequence[str] = ("-m", "gfxlm"), **environment: str) -> Iterator[Served]:
    running = Served(*options, program=program, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.ended()


def test_it_listens_while_it_loads_and_ends_in_order() -> None:
    with (
        served("--log-format", "json", "--served-model-name", "tiny") as server,
        httpx.Client(base_url=server.url) as client,
    ):
        assert client.get("/health").status_code in (503, 200)
        # Whoever comes early waits, and gets an answer.
        early = client.post("/v1/completions", json={"prompt": "import", "max_tokens": 2}, timeout=60)
        assert early.status_code == 200, early.text
        assert early.json()["model"] == "tiny"
        assert client.get("/health").json() == {"status": "ok"}
        with client.stream("POST", "/v1/completions", json={**ENDLESS, "max_tokens": 60}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert "[DONE]" in text
        assert '"finish_reason": "length"' in text
        assert server.ended() == 0
        logged = [json.loads(line) for line in server.lines]
        assert "Traceback" not in server.log
        assert any(entry.get("generated_tokens") == 60 for entry in logged)
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_what_does_not_end_in_time_is_cut_off() -> None:
    with served("--shutdown-timeout", "0.3") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.ended() == 0
        assert "Traceback" not in server.log


def test_a_second_signal_cuts_off_at_once() -> None:
    with served() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGINT)
            while "ending" not in server.log:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGINT)
            *_, last = [line for line in lines if line]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.ended() == 0
        assert "Traceback" not in server.log


LOADING = """
import torch
from gfxlm.cli import main
from gfxlm.engine.engine import Engine

def warms_up_for_ever(self):
    print("warming up", flush=True, file=__import__("sys").stderr)
    while True:
        torch.ones(64, 64) @ torch.ones(64, 64)

Engine.warm_up = warms_up_for_ever
main()
"""


def test_a_signal_while_it_loads_ends_it_in_order() -> None:
    with served(program=("-c", LOADING)) as server:
        while "warming up" not in server.log:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0, server.log


BREAKING = """
import sys
from gfxlm.cli import main
from gfxlm.engine.engine import Engine

step = Engine.step

def breaks_at_a_third_token(self):
    produced = step(self)
    if any(len(request.tokens) == 3 for request in produced):
        raise ZeroDivisionError(f"injected; {sys.getswitchinterval()} s")
    return produced

Engine.step = breaks_at_a_third_token
main()
"""


def test_an_engine_that_fails_for_good_ends_the_process() -> None:
    body = {"prompt": "import os", "max_tokens": 8, "ignore_eos": True}
    with (
        served("--max-concurrency", "2", program=("-c", BREAKING)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        server.until_ready(client)
        for _ in range(2):
            assert client.post("/v1/completions", json=body).status_code == 500
            server.until_ready(client)
        # Two of these run as it fails for the third time, the others wait.
        answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(8)))
        assert {answer.status_code for answer in answers} <= {500, 503}
        assert all(answer.json()["error"]["message"] for answer in answers)
        with contextlib.suppress(httpx.TransportError):  # it may have ended by now
            assert client.get("/health").status_code == 503
        assert server.ended() == 1
        assert "failed 3 times" in server.log
        assert "injected; 0.0005 s" in server.log  # for so long at most, the engine waits for other threads
        assert "to be started again" in server.log


def test_tls_and_keys(tmp_path: Path) -> None:
    key, certificate, keys = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path / "keys"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    keys.write_text("# ours\nsk-file\n\n")
    options = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--api-key-file", str(keys))
    with served(*options, GFXLM_API_KEY="sk-environment") as server:
        assert server.url.startswith("https://")
        with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=str(certificate))) as client:
            server.until_ready(client)
            assert client.get("/v1/models").status_code == 401
            for name in ("sk-file", "sk-environment"):
                assert client.get("/v1/models", headers={"Authorization": f"Bearer {name}"}).status_code == 200
        with pytest.raises(httpx.HTTPError), httpx.Client(base_url=server.url.replace("https", "http")) as client:
            client.get("/health")


def test_a_model_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    assert "nowhere" in complaint("serve", "--model", tmp_path / "nowhere", "--port", "0")


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    found = subprocess.run(
        [sys.executable, "-m", "gfxlm", "serve", "--port", "0", "--model", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2
    assert "gfxlm: error: " in found.stderr
    assert "Traceback" not in found.stderr


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: Address already in use" in complaint("serve", "--port", port)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ssl-keyfile", "x"], "TLS needs both"),
        (["--ssl-keyfile", "x", "--ssl-certfile", "y"], "there is no file x"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--temp", "-1"], "temperature must be"),
        (["--chat-template-args", "[]"], "--chat-template-args: expected a JSON object"),
        (["--kv-bits", "3"], "3"),
        (["--served-model-name", "a", "--served-model-name", "b"], "--served-model-name"),
        (["--model", "builtin", "--model", "builtin"], "given twice"),
        (["--prompt-concurrency", "8"], "--prefill-step-size"),
        (["--prompt-cache-size", "8"], "--no-prefix-cache"),
        (["--prompt-cache-bytes", "8"], "--no-prefix-cache"),
        (["--adapter-path", "x"], "fuse"),
        (["--chat-template", "x"], "the model's own"),
        (["--use-default-chat-template"], "the model's own"),
        (["--pipeline"], "one device"),
        (["--request-timeout", "-1"], "--request-timeout"),
        (["--request-timeout", "0"], "no time for any request"),
        (["--tool-parser", "bogus"], "qwen3_coder"),
        (["--served-model-name", ""], "--served-model-name: is empty"),
        (["--allowed-origins", "https://a.example,b.example"], "'b.example'"),
        (["--allowed-origins", "https://a.example/"], "'https://a.example/'"),
    ],
)
def test_a_bad_option_is_one_line(options: list[str], says: str) -> None:
    assert says in complaint("serve", "--port", "0", *options)


def test_keys_come_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFXLM_API_KEY", "sk-3\n")
    file = tmp_path / "keys"
    file.write_text("# a comment\n  sk-1  \n\nsk-2\n")
    assert HttpOptions(api_key=["sk-0"], api_key_file=file).keys() == ("sk-0", "sk-3", "sk-1", "sk-2")
    monkeypatch.delenv("GFXLM_API_KEY")
    assert HttpOptions().keys() == ()
    file.write_text("# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        HttpOptions(api_key_file=file).keys()
    with pytest.raises(UserError, match="is empty"):
        HttpOptions(api_key=[""]).keys()
