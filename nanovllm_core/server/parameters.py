"""OpenAI's parameters as `SamplingParams`: what is taken, what makes no difference here, and what is refused.

Nothing that would change the answer is ignored: a parameter that is not supported is taken only at the value that asks
for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nanovllm_core.errors import GenerationError, nearest
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.server.errors import ApiError, refuse

SAME = (  # the name is the one of SamplingParams
    "temperature", "top_p", "n", "seed", "stop", "top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids",
)  # fmt: skip
IDLE = (  # of bookkeeping, or without meaning for one local model
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "parallel_tool_calls",
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "store": (False,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "echo": (False,),
        "suffix": ("",),
    }
)
INSTEAD = MappingProxyType(
    {
        "presence_penalty": "; repetition_penalty is supported",
        "frequency_penalty": "; repetition_penalty is supported",
        "best_of": "; n is supported",
    }
)
STREAMING = ("stream", "stream_options")
OWN = MappingProxyType(
    {
        False: ("prompt", "max_tokens", "logprobs", "best_of"),
        True: ("messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
    }
)
MOST = MappingProxyType({"stop": 16, "stop_token_ids": 256})  # each is looked for after every token, for all to wait
COMPLETION = 16  # max_tokens of OpenAI's /v1/completions where none is given


def check_names(body: Mapping[str, Any], *, chat: bool) -> None:
    """Raise ApiError for a parameter that is not known, or that asks for what is not supported."""
    known = ("model", *SAME, *STREAMING, *OWN[chat], *IDLE, *NEUTRAL)
    for name, value in body.items():
        if name not in known:
            raise ApiError(400, f"{name[:80]}: not a parameter of this API{nearest(name[:80], known)}", param=name[:80])
        if value is None or name not in NEUTRAL:
            continue
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[name]):
            said = " or ".join(map(json.dumps, NEUTRAL[name]))
            raise refuse(name, value, f"not supported here, allowed: null or {said}{INSTEAD.get(name, '')}")
    best = body.get("best_of")
    if best is not None and best != (body.get("n") or 1):
        raise refuse("best_of", best, f"not supported here, allowed: null, or what n is{INSTEAD['best_of']}")


def sampling(body: Mapping[str, Any], *, chat: bool, longest: int) -> SamplingParams:
    """The parameters of a body whose names are checked. `longest`: an answer's tokens where the body does not say.

    Raises ApiError.
    """
    given = {name: body[name] for name in SAME if body.get(name) is not None}
    for name, most in MOST.items():
        value = given.get(name)
        if value is None or (name == "stop" and isinstance(value, str)):
            continue
        if not isinstance(value, list) or len(value) > most:
            told = value if not isinstance(value, list) else f"{len(value)} of them"
            raise refuse(name, told, f"allowed: a list of at most {most}")
    given["max_tokens"] = _longest(body, chat, longest)
    given["logprobs"] = _logprobs(body) if chat else body.get("logprobs")
    if chat is False and isinstance(given["logprobs"], bool):
        raise refuse("logprobs", given["logprobs"], "allowed: null, or how many likeliest tokens to tell")
    try:
        return SamplingParams(**given)
    except GenerationError as e:
        text = str(e).removeprefix("SamplingParams: ")
        name = text.partition(":")[0]
        if chat and name == "logprobs":
            text, name = f"top_{text}", "top_logprobs"
        raise ApiError(400, text, param=name) from None


def _longest(body: Mapping[str, Any], chat: bool, longest: int) -> Any:
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise refuse("max_completion_tokens", new, f"but max_tokens is {old!r:.80}: give one of them")
    if old is None and new is None:
        return longest if chat else min(COMPLETION, longest)
    return old if new is None else new


def _logprobs(body: Mapping[str, Any]) -> Any:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if not isinstance(wanted, bool | None):
        raise refuse("logprobs", wanted, "allowed: true or false; top_logprobs says how many")
    if not wanted:
        if top:
            raise refuse("top_logprobs", top, "allowed only with logprobs: true")
        return None
    return 0 if top is None else top
