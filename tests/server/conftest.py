"""A small random model with a chat template in a folder, and servers of it: real processes, asked over real sockets."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from attrs import define, field

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse this' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXTS = [f"The river runs past {i} old mills and under a stone bridge, für Zoë – 漢字 😀.\n" for i in range(40)]
LENGTH = 4096


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model's folder, `small`."""
    import torch
    from nanovllm_tokenizers.bpe import train
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    train(TEXTS, 400).save(path)
    settings = path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    return path


@define(eq=False, slots=False)
class Server:
    """`nanovllm serve` in a process of its own."""

    folder: object
    flags: tuple = ()
    environment: dict = field(factory=dict)
    process: subprocess.Popen = None
    url: str = ""
    lines: list = field(factory=list)  # that it wrote on standard error

    def start(self):
        command = [sys.executable, "-m", "nanovllm_core.cli", "serve", str(self.folder), "--port", "0", *self.flags]
        self.process = subprocess.Popen(
            command, env={**os.environ, "NANOVLLM_API_KEY": "", **self.environment}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        told = self.process.stdout.readline()
        found = re.search(r"http://\S+", told)
        assert found, (told, self.ended(), self.said)
        self.url = found.group()
        return self

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    @property
    def said(self):
        return "".join(self.lines)

    def client(self, key="none", **more):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **more})

    def connect(self):
        """A raw connection."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def send(self, data, *, close=True):
        """Raw bytes, and all that comes back until the server closes, or does not say more for half a second."""
        with self.connect() as made:
            made.sendall(data)
            if not close:
                made.settimeout(0.5)
            return self.received(made)

    @staticmethod
    def received(connection):
        """What comes until the other side closes, or is silent for the connection's timeout."""
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except (TimeoutError, ConnectionResetError):
            pass
        return found

    def post(self, path, body, headers=None):
        """(status, headers, body) of a request; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **(headers or {})}, method="POST"
        )
        return answer(request)

    def get(self, path, headers=None):
        return answer(urllib.request.Request(self.url + path, headers=headers or {}))

    def health(self):
        return json.loads(self.get("/health")[2])

    def idle(self, seconds=30):
        """Wait until nothing is under way; the figures then."""
        return self.until(lambda h: not (h["running"] or h["waiting"] or h["answers"]), seconds)

    def until(self, good, seconds=30):
        deadline = time.monotonic() + seconds
        while not good(health := self.health()):
            assert time.monotonic() < deadline, health
            time.sleep(0.02)
        return health

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def ended(self, seconds=60):
        """The exit code."""
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.ended()
        self.process.stdout.close()
        self.process.stderr.close()


def answer(request):
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, found.headers, found.read()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.headers, e.read()


@pytest.fixture(scope="session")
def start(folder):
    """Starts servers with flags and environment; they end with the tests."""
    started = []

    def start(*flags, folder=folder, **environment):
        started.append(Server(folder, flags, environment))
        return started[-1].start()

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def server(start):
    """One server as it comes, for tests that leave it idle."""
    return start("--kv-cache-tokens", "32768")


@pytest.fixture
def client(server):
    with server.client() as made:
        yield made
    server.idle()
