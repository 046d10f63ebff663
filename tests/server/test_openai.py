"""The real `openai` client against a real process: what it asks for comes, in the shapes that it reads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from nanovllm_core import LLM, SamplingParams
from nanovllm_core.chat import chat_ids

GREEDY = {"model": "small", "temperature": 0, "max_tokens": 12}
PROMPT = "The river runs"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does it run? 😀"}]


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


@pytest.fixture(scope="module")
def wanted(llm):
    """What the engine itself answers."""
    params = SamplingParams(temperature=0, max_tokens=12)
    return llm.generate([PROMPT, chat_ids(llm.tokenizer, CHAT)], params, use_tqdm=False)


def ids_of(llm, text):
    return [*llm.tokenizer.prefix_ids, *llm.tokenizer.encode([text])[0]]


def test_models(client):
    [model] = client.models.list().data
    assert model.id == "small"
    assert client.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_completion(client, llm, wanted):
    found = client.completions.create(prompt=PROMPT, **GREEDY)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason, choice.index) == (wanted[0]["text"], "length", 0)
    assert found.model == "small"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids_of(llm, PROMPT)), 12)
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12


def test_chat(client, llm, wanted):
    found = client.chat.completions.create(messages=CHAT, **GREEDY)
    [choice] = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted[1]["text"])
    assert choice.finish_reason == "length"
    assert found.usage.prompt_tokens == len(chat_ids(llm.tokenizer, CHAT))


@pytest.mark.parametrize("usage", [False, True])
def test_streams_say_the_same(client, wanted, usage):
    more = {"stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    chunks = list(client.completions.create(prompt=PROMPT, **GREEDY, **more))
    texts = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].text for chunk in texts) == wanted[0]["text"]
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    said = list(client.chat.completions.create(messages=CHAT, **GREEDY, **more))
    deltas = [chunk.choices[0].delta for chunk in said if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == wanted[1]["text"]
    for stream in (chunks, said):
        assert len({chunk.id for chunk in stream}) == 1
        assert (stream[-1].usage is not None) == usage
        if usage:
            assert stream[-1].usage.completion_tokens == 12
            assert all(chunk.usage is None for chunk in stream[:-1])


def test_every_form_of_prompt(client, llm):
    one, two = ids_of(llm, PROMPT), ids_of(llm, "Zoë")
    texts = [client.completions.create(prompt=p, **GREEDY).choices[0].text for p in (PROMPT, "Zoë")]
    for prompt, count in ((one, 1), ([PROMPT, "Zoë"], 2), ([one, two], 2)):
        found = client.completions.create(prompt=prompt, **GREEDY)
        assert [c.text for c in found.choices] == texts[:count]
        assert [c.index for c in found.choices] == list(range(count))
    assert found.usage.prompt_tokens == len(one) + len(two)
    assert found.usage.completion_tokens == 24


def test_several_prompts_with_several_answers_stream_together(client):
    asked = {"prompt": [PROMPT, "Zoë"], "n": 3, "seed": 5, "model": "small", "max_tokens": 9}
    whole = client.completions.create(**asked)
    texts = [""] * 6
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in whole.choices]
    assert len(set(texts[:3])) == len(set(texts[3:])) == 3
    assert whole.usage.completion_tokens == sum([9] * 6)


def test_seeds_and_sampling(client):
    asked = {"prompt": PROMPT, "model": "small", "max_tokens": 16, "temperature": 1.5, "top_p": 0.9}
    more = {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1, "ignore_eos": True}
    one, same, other = (
        client.completions.create(**asked, seed=seed, extra_body=more).choices[0].text for seed in (7, 7, 8)
    )
    assert one == same != other
    likeliest = [
        client.completions.create(**{**asked, "temperature": t}, extra_body={"top_k": 1}).choices[0].text
        for t in (0, 2)
    ]
    assert likeliest[0] == likeliest[1]


def test_stop(client, llm, wanted):
    text, ids = wanted[0]["text"], wanted[0]["token_ids"]
    stop = text[4:6]
    for given in (stop, [stop, "absent"]):
        for stream in (False, True):
            found = client.completions.create(prompt=PROMPT, stop=given, stream=stream, **GREEDY)
            choices = [chunk.choices[0] for chunk in found] if stream else found.choices
            assert "".join(c.text for c in choices) == text[: text.index(stop)]
            assert choices[-1].finish_reason == "stop"
    ended = client.completions.create(prompt=PROMPT, extra_body={"stop_token_ids": [ids[3]]}, **GREEDY)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == ids.index(ids[3]) + 1


def test_logprobs(client, llm, wanted):
    ids = wanted[0]["token_ids"]
    found = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY).choices[0].logprobs
    assert found.tokens == [llm.tokenizer.decode([i]) for i in ids]
    assert [max(top.values()) for top in found.top_logprobs] == pytest.approx(found.token_logprobs)
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    parts = [c.choices[0].logprobs for c in client.completions.create(prompt=PROMPT, logprobs=3, stream=True, **GREEDY)]
    for name in ("tokens", "text_offset"):
        assert [x for part in parts if part for x in getattr(part, name)] == getattr(found, name)
    said = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **GREEDY).choices[0].logprobs
    assert len(said.content) == 12
    for token in said.content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    alone = client.chat.completions.create(messages=CHAT, logprobs=True, **GREEDY).choices[0].logprobs
    assert [t.top_logprobs for t in alone.content] == [[]] * 12


def test_content_in_parts_and_the_developer(client):
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        CHAT[1],
    ]
    one, other = (client.chat.completions.create(messages=m, **GREEDY) for m in (CHAT, parts))
    assert one.choices[0].message == other.choices[0].message
    assert one.usage == other.usage
    spoken = [CHAT[1], one.choices[0].message, {"role": "user", "content": "<|endoftext|>"}]
    assert client.chat.completions.create(messages=spoken, **GREEDY).choices[0].message.content


def test_what_makes_no_difference_is_taken(client, wanted):
    more = {
        "user": "u", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
        "n": 1, "stop": None, "seed": None, "logprobs": None,
    }  # fmt: skip
    found = client.completions.create(prompt=PROMPT, best_of=1, echo=False, suffix="", **more, **GREEDY)
    assert found.choices[0].text == wanted[0]["text"]
    more |= {
        "logprobs": False,
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
    }
    found = client.chat.completions.create(messages=CHAT, max_completion_tokens=12, **more, **GREEDY)
    assert found.choices[0].message.content == wanted[1]["text"]


BAD = {
    "unknown": ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
    "temperature": ({"temperature": -1}, "got -1, allowed: a number from 0 on"),
    "top_p": ({"top_p": 2}, "above 0 and at most 1"),
    "n": ({"n": 0}, "allowed: 1 to 1024"),
    "many": ({"n": 1000}, "asks for 1000 answers at once, allowed: 320"),
    "max_tokens": ({"max_tokens": "many"}, "allowed: 1 and more"),
    "seed": ({"seed": -1}, "seed: got -1"),
    "stop": ({"stop": 5}, "a list of at most 16"),
    "stops": ({"stop": ["a"] * 17}, "a list of at most 16"),
    "empty stop": ({"stop": [""]}, "texts of 1 to 1000 characters"),
    "penalty": ({"extra_body": {"repetition_penalty": 1e-300}}, "allowed: 0.01 to 100"),
    "huge": ({"temperature": 10**400}, "allowed: a number from 0 on"),
    "infinite": ({"extra_body": {"min_p": float("1e308") * 0 + 7}}, "0 to 1"),
    "presence": ({"presence_penalty": 1}, "repetition_penalty is supported"),
    "tools": ({"extra_body": {"tools": [{"type": "function"}]}}, "not supported here"),
    "format": ({"extra_body": {"response_format": {"type": "json_object"}}}, "not supported here"),
    "bias": ({"logit_bias": {"5": 1}}, "not supported here"),
    "stream": ({"extra_body": {"stream": "yes"}}, "true or false"),
    "options": ({"extra_body": {"stream_options": {"include_usage": True}}}, "only with stream"),
}
BAD_COMPLETIONS = {
    "echo": ({"echo": True}, "not supported here"),
    "suffix": ({"suffix": "x"}, "not supported here"),
    "best_of": ({"best_of": 3}, "n is supported"),
    "logprobs": ({"logprobs": 101}, "0 to 100"),
    "logprobs of chat": ({"logprobs": True}, "how many likeliest"),
    "empty": ({"prompt": []}, "allowed: a text, a list of texts"),
    "none": ({"prompt": None}, "allowed: a text, a list of texts"),
    "mixed": ({"prompt": ["a", 1]}, "allowed: a text, a list of texts"),
    "id": ({"prompt": [400]}, "allowed: 0 to 399"),
    "long": ({"prompt": [5] * 5000}, "too many"),
    "chat's": ({"extra_body": {"messages": []}}, "not a parameter of this API"),
}
BAD_CHATS = {
    "none": ({"messages": []}, "at least one"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "allowed: system, developer, user, assistant"),
    "content": ({"messages": [{"role": "user", "content": None}]}, "allowed: a text"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "images and sound are not read",
    ),
    "calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}]}, "not supported here"),
    "refused": ({"messages": [{"role": "user", "content": "refuse this"}]}, "the chat template refuses"),
    "logprobs": ({"logprobs": 3}, "top_logprobs says how many"),
    "top": ({"top_logprobs": 3}, "only with logprobs"),
    "many": ({"logprobs": True, "top_logprobs": 101}, "top_logprobs: got 101"),
    "tokens": ({"max_completion_tokens": 5}, "but max_tokens is 12"),
}


@pytest.mark.parametrize("case", [*BAD, *(f"{c} (completions)" for c in BAD_COMPLETIONS)])
def test_bad_completions_are_refused(client, case):
    given, told = BAD_COMPLETIONS[case[:-14]] if case.endswith(" (completions)") else BAD[case]
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"prompt": PROMPT, **GREEDY, **given})
    assert told in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("case", [*BAD, *(f"{c} (chat)" for c in BAD_CHATS)])
def test_bad_chats_are_refused(client, case):
    given, told = BAD_CHATS[case[:-7]] if case.endswith(" (chat)") else BAD[case]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"messages": CHAT, **GREEDY, **given})
    assert told in error.value.body["message"]


def test_another_model_is_not_found(client):
    for ask in (
        lambda m: client.completions.create(prompt=PROMPT, model=m),
        lambda m: client.chat.completions.create(messages=CHAT, model=m),
    ):
        with pytest.raises(openai.NotFoundError, match="this server has 'small' only") as error:
            ask("gpt-4o")
        assert error.value.code == "model_not_found"


def test_many_clients_at_once(server, client):
    """Each gets its own answer, whatever runs beside it; then the cache is free again."""
    free = server.idle()["free_pages"]

    def ask(i):
        asked = {
            "prompt": f"{PROMPT} {i % 8}",
            "model": "small",
            "max_tokens": 10 + i % 8,
            "temperature": 1,
            "seed": i % 8,
        }
        if i % 2:
            return i % 8, client.completions.create(**asked).choices[0].text
        return i % 8, "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))

    with ThreadPoolExecutor(24) as pool:
        found = set(pool.map(ask, range(96)))
    assert len(found) == 8
    assert server.idle()["free_pages"] == free


def test_an_answer_that_is_left_ends(server, client):
    free = server.idle()["free_pages"]
    asked = {"model": "small", "max_tokens": 4000, "stream": True, "extra_body": {"ignore_eos": True}}
    for prompts in ({"prompt": PROMPT, "n": 3}, {"prompt": [PROMPT, "b"]}):
        with client.completions.create(**prompts, **asked) as stream:
            next(iter(stream))
            assert server.until(lambda h: h["running"] >= 2)["free_pages"] < free
        assert server.idle(5)["free_pages"] == free


def test_a_client_that_does_not_wait_ends_its_answer(server, client):
    """One that asked for the whole answer, and gave up."""
    free = server.idle()["free_pages"]
    impatient = client.with_options(timeout=1.0, max_retries=0)
    before = len(server.lines)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(prompt=PROMPT, model="small", max_tokens=4000, extra_body={"ignore_eos": True})
    assert server.idle(5)["free_pages"] == free
    assert " 499 " in "".join(server.lines[before:])


def test_abandoned_while_waiting(start):
    """A client that leaves the queue is not answered later."""
    server = start("--batch-size", "1")
    with server.client() as client:
        asked = {"prompt": PROMPT, "model": "small", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
        with client.completions.create(**asked, stream=True) as first:
            next(iter(first))
            pool = [threading.Thread(target=_given_up, args=(client, asked)) for _ in range(3)]
            for thread in pool:
                thread.start()
            server.until(lambda h: h["waiting"] == 3)
            for thread in pool:
                thread.join()
            server.until(lambda h: h["waiting"] == 0, 5)
        assert server.idle(5)["answers"] == 0


def _given_up(client, asked):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=2.0).completions.create(**asked)
