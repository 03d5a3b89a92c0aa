"""Prompts as tokens, whichever form they have."""

from __future__ import annotations

import asyncio

from manylora.errors import InvalidArgument
from manylora.server.engine.tokenizer import ChatMessage, Encoded, Tokenizer
from manylora.v1 import inference_pb2 as pb

MOST_CHARACTERS = 64  # of text for each token of context, or it is not even looked at


async def read_prompt(tokenizer: Tokenizer, prompt: pb.Prompt, max_context: int) -> Encoded:
    """Raises InvalidArgument if it is empty or longer than any text that could fit, and what the
    base's chat template raises."""
    _check_length(prompt, max_context)
    match prompt.WhichOneof("content"):
        case "text" if prompt.text:
            return await asyncio.to_thread(tokenizer.encode, prompt.text)
        case "token_ids" if prompt.token_ids.ids:
            return Encoded(list(prompt.token_ids.ids), list(prompt.token_ids.types))
        case "chat" if prompt.chat.messages:
            return await asyncio.to_thread(_chat, tokenizer, prompt.chat)
        case "pair":
            return await asyncio.to_thread(_pair, tokenizer, prompt.pair)
        case None:
            raise InvalidArgument("not set", field="prompt", wanted="text, token_ids, chat or pair")
        case form:
            raise InvalidArgument("empty", field=f"prompt.{form}")


def _check_length(prompt: pb.Prompt, max_context: int) -> None:
    ids, messages = prompt.token_ids, prompt.chat.messages
    _refuse_above(max_context, max(len(ids.ids), len(ids.types)), "tokens")
    _refuse_above(max_context, len(messages), "messages")
    texts = (prompt.text, prompt.pair.first, prompt.pair.second)
    length = sum(map(len, texts)) + sum(len(m.role) + len(m.content) for m in messages)
    _refuse_above(MOST_CHARACTERS * max_context, length, "characters")


def _refuse_above(most: int, found: int, what: str) -> None:
    if found > most:
        raise InvalidArgument(
            "longer than the context could hold",
            field="prompt",
            found=f"{found} {what}",
            wanted=f"at most {most}",
        )


def _pair(tokenizer: Tokenizer, pair: pb.TextPair) -> Encoded:
    for name in ("first", "second"):
        if not getattr(pair, name):
            raise InvalidArgument("empty", field=f"prompt.pair.{name}")
    return tokenizer.encode(pair.first, pair.second)


def _chat(tokenizer: Tokenizer, chat: pb.Chat) -> Encoded:
    return tokenizer.chat([_message(i, message) for i, message in enumerate(chat.messages)])


def _message(index: int, message: pb.ChatMessage) -> ChatMessage:
    if not message.role:
        raise InvalidArgument("not set", field=f"prompt.chat.messages[{index}].role")
    return ChatMessage(message.role, message.content)
