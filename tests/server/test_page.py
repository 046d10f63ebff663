"""The chat page in a real headless Chromium."""

import json
import re
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium-headless-shell")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a server's page in a browser of its own; nothing that it does may break its policy or go elsewhere."""
    contexts, complaints = [], []

    def open_page(server):
        context = chromium.new_context()
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: complaints.append(asked.url) if not asked.url.startswith((server.url, "data:")) else None,
        )
        page.goto(server.url)
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert [c for c in complaints if "Content Security Policy" in c or c.startswith("http")] == []


def said(page, role):
    return page.locator(f".said[data-role={role}]")


def done(page, answers):
    """Wait until so many answers stand there whole."""
    page.wait_for_function(
        "n => document.querySelectorAll('.said[data-role=assistant][aria-busy=false]').length === n"
        " && !document.getElementById('send').disabled",
        arg=answers,
    )


def test_a_conversation_by_keyboard(server, opened):
    page = opened(server)
    page.wait_for_function("() => document.title === 'small'")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.fill("#tokens", "12")
    page.focus("#prompt")
    requests = []
    page.on("request", lambda asked: requests.append(asked.post_data_json) if asked.method == "POST" else None)
    page.keyboard.type("Where does")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("it run?")
    page.keyboard.press("Enter")
    done(page, 1)
    assert said(page, "user").inner_text() == "Where does\nit run?"
    first = said(page, "assistant").text_content()
    assert first
    assert page.input_value("#prompt") == ""
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("And then?")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    done(page, 2)
    assert [m["role"] for m in requests[1]["messages"]] == ["user", "assistant", "user"]
    assert requests[1]["messages"][1]["content"] == first
    assert requests[1]["max_tokens"] == 12
    page.click("#clear")
    assert page.locator(".said").count() == 0
    page.keyboard.type("Anew")
    page.keyboard.press("Enter")
    done(page, 1)
    assert requests[2]["messages"] == [{"role": "user", "content": "Anew"}]
    assert opened.complaints == []


def test_text_is_never_markup(server, opened):
    page = opened(server)
    page.fill("#tokens", "40")  # a few might have no text
    attack = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><b>bold</b>"
    page.fill("#prompt", attack)
    page.click("#send")
    done(page, 1)
    assert said(page, "user").inner_text() == attack
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title() == "small"
    # what a model says comes the same way
    answer = 'data: {"choices": [{"delta": {"content": "<img src=x onerror=alert(1)><b>x</b>"}}]}\n\ndata: [DONE]\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=answer))
    page.fill("#prompt", "x")
    page.click("#send")
    done(page, 2)
    assert said(page, "assistant").last.inner_text() == "<img src=x onerror=alert(1)><b>x</b>"
    assert page.locator("main img, main b").count() == 0


@pytest.mark.parametrize("how", ["button", "escape", "left"])
def test_stopping_ends_the_answer_on_the_server(server, opened, how):
    free = server.idle()["free_pages"]
    page = opened(server)
    page.wait_for_function("() => document.title === 'small'")
    endless = lambda route: route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})  # noqa: E731
    page.route("**/v1/chat/completions", endless)  # the random model may end by itself
    page.fill("#tokens", "4000")
    page.fill("#prompt", "Go on")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.said[data-role=assistant]')?.textContent.length > 20")
    assert server.health()["running"] == 1
    assert page.is_disabled("#send")
    if how == "left":
        page.goto("about:blank")
    else:
        page.click("#stop") if how == "button" else page.keyboard.press("Escape")
        done(page, 1)
        assert said(page, "error").count() == 0
        assert page.is_disabled("#stop")
    assert server.idle(5)["free_pages"] == free


def test_errors_are_shown_and_nothing_is_lost(server, opened):
    page = opened(server)
    page.wait_for_function("() => document.title === 'small'")
    page.fill("#prompt", "refuse this")
    page.keyboard.press("Enter")
    said(page, "error").wait_for()
    assert "the chat template refuses the conversation" in said(page, "error").inner_text()
    page.fill("#tokens", "40")  # a few might have no text
    page.fill("#prompt", "Then this")
    page.keyboard.press("Enter")
    done(page, 1)


def test_continuing_a_text(server, opened):
    page = opened(server)
    page.wait_for_function("() => document.title === 'small'")
    page.select_option("#mode", "text")
    page.fill("#tokens", "40")
    page.fill("#prompt", "The river")
    with page.expect_request("**/v1/completions") as asked:
        page.keyboard.press("Enter")
    assert asked.value.post_data_json["prompt"] == "The river"
    done(page, 1)


def test_a_key_is_asked_for(start, opened):
    server = start("--kv-cache-tokens", "8192", NANOVLLM_API_KEY="open-sesame")
    page = opened(server)
    page.wait_for_selector("#key:visible")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("open-sesame")
    page.keyboard.press("Tab")
    page.wait_for_function("() => document.title === 'small'")
    page.fill("#tokens", "40")  # a few might have no text
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    done(page, 1)
    kept = "[localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(kept) == [0, 0, ""]
    page.reload()
    page.wait_for_selector("#key:visible")
    assert page.input_value("#key") == ""
    assert "open-sesame" not in server.said


def test_other_pages_cannot_ask_or_frame_it(start, server, opened):
    other = start("--kv-cache-tokens", "8192", "--quiet")  # another origin: the port differs
    page = opened(server)
    policy = server.get("/")[1]["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    page.goto(f"{other.url}/v1/nothing")
    opened.complaints.clear()  # it is another server's
    asked = (
        "url => fetch(url, {method: 'POST', headers: {'Content-Type': 'text/plain'}, mode: 'no-cors',"
        " body: '{\"prompt\": \"a\"}'}).then(r => r.type, e => 'failed')"
    )
    before = len(server.lines)
    page.evaluate(asked, f"{server.url}/v1/completions")
    server.until(lambda h: re.search("POST /v1/completions 403", "".join(server.lines[before:])))
    assert page.evaluate("url => fetch(url).then(() => 'read', () => 'failed')", f"{server.url}/v1/models") == "failed"
    opened.complaints.clear()


def test_a_model_without_a_chat_template_continues_texts(folder, start, opened, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    settings = plain / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}))
    server = start("--kv-cache-tokens", "8192", folder=plain)
    page = opened(server)
    page.wait_for_function("() => document.title === 'plain'")
    assert page.input_value("#mode") == "text"
    page.fill("#tokens", "40")  # a few might have no text
    page.fill("#prompt", "The river")
    page.keyboard.press("Enter")
    done(page, 1)
    code, _, found = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert (code, b"no chat template" in found) == (400, True)
