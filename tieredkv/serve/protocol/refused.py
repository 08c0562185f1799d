"""Fields of requests that do not work here: each is refused by name, with one sentence that says why.

A field is one of three things. It works; or it changes nothing about the answer and is ignored; or it would change the
answer and is refused, so that nobody takes an answer for another. A field that nobody knows is refused too: it may be a
spelling mistake. None, and the values that mean what happens here anyway, are accepted for all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tieredkv.serve.errors import ApiError


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a field is refused, and the values of it that mean what happens here anyway."""

    reason: str
    """The end of a sentence that begins with the field's name."""
    harmless: tuple[Any, ...] = ()


_NO_TOOLS = "is not supported, because no tools are called here: leave it out."
_NO_PENALTY = (
    "is not supported, because transformers has no such penalty: use repetition_penalty, which works on other numbers."
)
_NO_SHAPE = "is not supported, because answers are not constrained to a shape: ask for the shape in words."
NO_LOGPROBS = "is not supported, because probabilities are not kept while an answer is decoded: leave it out."
_NO_REASONING = "is not supported, because models are asked for answers without a part for reasoning: leave it out."
_NO_AUDIO = "is not supported, because neither sound nor speech is read or written here: leave it out."

_NO_IDS = "is not supported, because ids of tokens are not part of this protocol: leave it out."
_NO_TRUNCATION = "is not supported, because no turn is ever left out: begin a new conversation."

_BOTH: dict[str, Refused] = {
    "tools": Refused(_NO_TOOLS, ([],)),
    "tool_choice": Refused(_NO_TOOLS, ("none", "auto")),
    "top_logprobs": Refused(NO_LOGPROBS, (0,)),
    "guided_json": Refused(_NO_SHAPE),
    "guided_regex": Refused(_NO_SHAPE),
    "guided_choice": Refused(_NO_SHAPE),
    "guided_grammar": Refused(_NO_SHAPE),
    "structured_outputs": Refused(_NO_SHAPE),
    "stop_token_ids": Refused(_NO_IDS, ([],)),
    "allowed_token_ids": Refused(_NO_IDS),
    "bad_words": Refused("is not supported, because no words are kept out of answers here: leave it out.", ([],)),
    "length_penalty": Refused("is not supported, because it is for beams, of which there is one: leave it out.", (1,)),
    "truncate_prompt_tokens": Refused(_NO_TRUNCATION),
    "include_stop_str_in_output": Refused("is not supported: answers end before a stop text here.", (False,)),
    "skip_special_tokens": Refused("is not supported: special tokens are never part of an answer here.", (True,)),
    "enable_thinking": Refused(_NO_REASONING, (False,)),
    "moderation": Refused("is not supported, because nothing is moderated here: leave it out."),
    "frequency_penalty": Refused(_NO_PENALTY, (0,)),
    "presence_penalty": Refused(_NO_PENALTY, (0,)),
}
CHAT: dict[str, Refused] = {
    **_BOTH,
    "n": Refused("is not supported above 1, because one answer is decoded at a time: send the request again.", (1,)),
    "best_of": Refused("is not supported, because one answer is decoded at a time: leave it out.", (1,)),
    "use_beam_search": Refused("is not supported, because beams would each need a cache: leave it out.", (False,)),
    "response_format": Refused(_NO_SHAPE, ({"type": "text"},)),
    "logit_bias": Refused(_NO_IDS, ({},)),
    "logprobs": Refused(NO_LOGPROBS, (False,)),
    "prompt_logprobs": Refused(NO_LOGPROBS),
    "functions": Refused(_NO_TOOLS, ([],)),
    "function_call": Refused(_NO_TOOLS, ("none", "auto")),
    "audio": Refused(_NO_AUDIO),
    "modalities": Refused(_NO_AUDIO, (["text"],)),
    "prediction": Refused("is not supported, because nothing is predicted ahead of decoding: leave it out."),
    "reasoning_effort": Refused(_NO_REASONING, ("none",)),
    "verbosity": Refused("is not supported, because the model has no such setting: ask for it in words.", ("medium",)),
    "web_search_options": Refused("is not supported, because nothing is searched here: leave it out."),
    "chat_template": Refused("is not supported, because the model has a template of its own: leave it out."),
    "chat_template_kwargs": Refused(
        "is not supported, because the model has a template of its own: leave it out.", ({},)
    ),
    "add_generation_prompt": Refused("is not supported: an answer is always a message of its own here.", (True,)),
    "continue_final_message": Refused("is not supported: an answer is always a message of its own here.", (False,)),
    "return_token_ids": Refused(_NO_IDS, (False,)),
    "return_tokens_as_token_ids": Refused(_NO_IDS, (False,)),
    "echo": Refused("is not supported, because a prompt with a film has no text to repeat: leave it out.", (False,)),
}
"""Of `POST /v1/chat/completions`."""
RESPONSES: dict[str, Refused] = {
    **_BOTH,
    "background": Refused("is not supported, because answers are not kept for later: use stream.", (False,)),
    "conversation": Refused("is not supported, because conversations are chains here: use previous_response_id."),
    "prompt": Refused("is not supported, because no templates are kept here: send the text as input."),
    "reasoning": Refused(_NO_REASONING, ({}, {"effort": None}, {"effort": "none"})),
    "text": Refused(_NO_SHAPE, ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"})),
    "truncation": Refused(_NO_TRUNCATION, ("disabled",)),
    "context_management": Refused(_NO_TRUNCATION, ([],)),
}
"""Of `POST /v1/responses`."""
IGNORED = frozenset((
    "user", "safety_identifier", "metadata", "store", "service_tier", "parallel_tool_calls", "max_tool_calls",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "include",
    "spaces_between_special_tokens", "request_id", "priority", "stream_options", "cache_salt",
))  # fmt: skip
"""They change nothing about an answer. (`store` of `POST /v1/responses` works; `include` can only ask for what there is
never: results of tools, or reasoning.)"""


def check_fields(given: Mapping[str, Any], refused: Mapping[str, Refused], known: Iterable[str]) -> None:
    """Raise `ApiError` for a field that would change the answer and does not work.

    given: the fields of a request that its model has not. known: those that it has, to correct spelling mistakes.
    """
    for name, value in given.items():
        if value is None or name in IGNORED:
            continue
        if name in refused:
            if not any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in refused[name].harmless
            ):
                raise ApiError(400, f"{name} {refused[name].reason}", code="unsupported", param=name)
            continue
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {close[0]}?" if close else "leave it out."
        raise ApiError(400, f"{name[:80]!r} is not a field of this request: {hint}", code="unknown_field", param=name)
