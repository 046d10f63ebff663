"""Who may ask, what may be listened on, and what is said of a wrong start."""

import json
import subprocess
import sys
from argparse import ArgumentParser

import openai
import pytest

from nanovllm_core.errors import ServingError
from nanovllm_core.server.command import add_parser, key_of, settings_of

KEY = "sk-Very/secret+key=1"


def parsed(*words):
    parser = ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


@pytest.fixture(scope="module")
def locked(start):
    return start("--name", "ours/v1", "--kv-cache-tokens", "8192", NANOVLLM_API_KEY=KEY)


def test_a_key_is_wanted(locked):
    with locked.client(KEY) as client:
        assert [m.id for m in client.models.list().data] == ["ours/v1"]
        assert client.models.retrieve("ours/v1").id == "ours/v1"
        assert client.completions.create(model="ours/v1", prompt="a", max_tokens=2).choices
    for wrong in ("none", KEY[:-1], KEY + "x", KEY.lower(), "\u00e9"):
        code, headers, found = locked.post(
            "/v1/completions", {"prompt": "a"}, {"Authorization": f"Bearer {wrong}".encode("latin-1")}
        )
        assert (code, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert json.loads(found)["error"]["code"] == "invalid_api_key"
    with locked.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    for headers in ({}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"X-Api-Key": KEY}):
        assert locked.get("/v1/models", headers)[0] == 401
        assert locked.get("/v1/nothing", headers)[0] == 401
        assert json.loads(locked.get("/health", headers)[2]) == {"status": "ok"}
    assert locked.get("/")[0] == 200
    assert locked.get("/health", {"Authorization": f"bearer {KEY}"})[2] != b'{"status":"ok"}'
    assert KEY not in locked.said


@pytest.mark.parametrize("key", [None, KEY])
def test_pages_elsewhere_and_names_that_lead_here_are_refused(server, locked, key):
    asked = server if key is None else locked
    known = {} if key is None else {"Authorization": f"Bearer {key}"}
    port = asked.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "",
        "127.0.0.1.evil.example",
        "[",
        "a@b",
        "127.0.0.1@evil.example",
    ):
        code, _, found = asked.get("/v1/models", {"Host": host, **known})
        assert code in (400, 403), (host, found)
    for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST", "localhost.", "192.168.1.7:80"):
        assert asked.get("/v1/models", {"Host": host, **known})[0] == 200, host
    own = f"127.0.0.1:{port}"
    for origin in (
        "http://evil.example",
        "null",
        "",
        f"http://127.0.0.1:{port + 1}",
        f"http://{own}.evil.example",
        f"file://{own}",
    ):
        code, headers, _ = asked.post("/v1/completions", {"prompt": "a"}, {"Origin": origin, "Host": own, **known})
        assert code == 403, origin
        assert "Access-Control-Allow-Origin" not in headers
    body = {"prompt": "a", "max_tokens": 1}
    assert asked.post("/v1/completions", body, {"Origin": f"http://{own}", "Host": own, **known})[0] == 200
    simple = {"Content-Type": "text/plain", **known}  # what a form can send
    assert asked.post("/v1/completions", body, simple)[0] == 415


def test_what_is_allowed_by_name(start):
    server = start(
        "--allow-host",
        "Models.Example.",
        "--allow-origin",
        "https://app.example",
        "--quiet",
        "--kv-cache-tokens",
        "8192",
    )
    assert server.get("/health", {"Host": "models.example:8000"})[0] == 200
    assert server.get("/health", {"Host": "other.example"})[0] == 403
    page = {"Origin": "https://app.example"}
    code, headers, _ = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, page)
    assert (code, headers["Access-Control-Allow-Origin"]) == (200, page["Origin"])
    assert server.post("/v1/completions", {"prompt": "a"}, {"Origin": "https://app.example.evil"})[0] == 403
    assert server.said == ""


def test_an_open_door_must_be_asked_for():
    for address in ("0.0.0.0", "::", "192.168.1.7", "fe80::1%eth0"):
        with pytest.raises(ServingError, match=r"there is no API key: set NANOVLLM_API_KEY .* --no-key"):
            settings_of(parsed("m", "--host", address), None, address)
        assert settings_of(parsed("m"), KEY, address).hosts is None
        assert settings_of(parsed("m", "--no-key"), None, address).hosts == frozenset()
        assert settings_of(parsed("m", "--allow-host", "a"), KEY, address).hosts == {"a"}
    for address in ("127.0.0.1", "127.9.9.9", "::1"):
        assert settings_of(parsed("m"), None, address).hosts == frozenset()
        assert settings_of(parsed("m"), KEY, address).hosts == frozenset()
    assert KEY not in repr(settings_of(parsed("m"), KEY, "::1"))
    for origin in ("*", "https://*", "app.example", "https://app.example/", "null"):
        with pytest.raises(ServingError, match="--allow-origin"):
            settings_of(parsed("m", "--allow-origin", origin), None, "::1")


def test_keys_of_the_environment():
    assert key_of("", no_key=True) is None
    assert key_of(KEY, no_key=False) == KEY
    for key, no_key in ((KEY, True), ("two words", False), ("schl\u00fcssel", False), ("quux\n", False)):
        with pytest.raises(ServingError) as error:
            key_of(key, no_key=no_key)
        assert key.strip() not in str(error.value)


def test_names(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    names = {given: settings_of(parsed(given), None, "::1").name for given in (".", "../model/", "org/hub-name")}
    assert names == {".": "model", "../model/": "model", "org/hub-name": "org/hub-name"}


def run(*words, **environment):
    import os

    command = [sys.executable, "-m", "nanovllm_core.cli", "serve", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "NANOVLLM_API_KEY": "", **environment}
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{folder}", "--port", "70000"], "expected a whole number from 0 to 65535"),
        (["{folder}", "--port", "{port}"], "cannot listen on 127.0.0.1 port"),
        (["{folder}", "--host", "no.such.host.invalid"], "no address to listen on"),
        (["{folder}", "--host", "0.0.0.0"], "there is no API key"),
        (["{folder}/nothing"], "nothing"),
        (["{folder}", "--max-body", "0"], "expected a whole number from 1"),
        (["{folder}", "--timeout", "0"], "expected seconds, above 0"),
        (["{folder}", "--drain", "-1"], "expected seconds, from 0"),
        (["{folder}", "--dtype", "int4"], "allowed: auto, float32, bfloat16"),
        (["{folder}", "--max-model-len", "5000"], "the model takes 1 to 4096"),
    ],
)
def test_a_wrong_start_is_one_message(server, folder, words, told):
    port = ("0",) if "--port" not in words else ()
    done = run(*(w.format(folder=folder, port=server.port) for w in words), *(("--port", *port) if port else ()))
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_the_extra_it_says_what_to_install(folder):
    code = (
        "import sys; from importlib.machinery import PathFinder\n"
        "class Hidden(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *rest):\n"
        "        return None if name in ('starlette', 'uvicorn') else super().find_spec(name, *rest)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden\n"
        "from nanovllm_core.cli import main\n"
        f"code = main(['serve', {str(folder)!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.strip() == "nanovllm: serve: starlette and uvicorn not installed: pip install 'nanovllm[serve]'"


def test_help_brings_no_heavy_library():
    code = (
        "import sys\nfrom nanovllm_core.cli import main\ntry:\n    main(['serve', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(str({'torch', 'starlette', 'uvicorn', 'numpy'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() in ("", "set()"), done.stderr
    assert "NANOVLLM_API_KEY" in done.stdout
