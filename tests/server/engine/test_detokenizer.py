"""Streamed text against the tokenizer's own decoding of everything, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from manylora.server.engine.detokenizer import MOST_HELD, REPLACEMENT, Detokenizer, StopStrings

SPECIAL = "<|end|>"
WORDS = ("he", "hello", "the", " the", " world", "  ", "né", "日本", " 日", "\n\n", "don't")
# no lone surrogates: they are not text; U+FFFD has tests of its own
CHARACTERS = st.one_of(
    st.sampled_from([*WORDS, "é", "€", "本", "😀", "👩\u200d👩\u200d👧", "e\u0301", " ", "▁"]),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters=REPLACEMENT), max_size=3),
)
TEXTS = st.lists(CHARACTERS, max_size=12).map("".join)


@dataclass(frozen=True)
class Language:
    """A tokenizer, and every way to write a piece of text in its tokens."""

    tokenizer: Tokenizer
    split: Callable[[bytes], list[int]]

    @property
    def special(self) -> int:
        return int(self.tokenizer.token_to_id(SPECIAL))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def tokens(self, text: str, cuts: Iterable[int]) -> list[int]:
        """Tokens of the text's UTF-8, cut at any bytes."""
        data = text.encode()
        ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
        return [t for a, b in pairwise(ends) for t in self.split(data[a:b])]


@cache
def byte_level() -> Language:
    """As GPT-2, Llama 3, Qwen: tokens are strings of bytes."""
    as_character = dict(zip(range(256), _byte_characters(), strict=True))
    pieces = list(as_character.values())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        letters = [as_character[byte] for byte in word.encode()]
        for end in range(2, len(letters) + 1):
            left, right = "".join(letters[: end - 1]), letters[end - 1]
            if left + right not in pieces:
                pieces.append(left + right)
                merges.append((left, right))
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])

    def split(data: bytes) -> list[int]:
        return [t.id for t in tokenizer.model.tokenize("".join(as_character[b] for b in data))]

    return Language(tokenizer, split)


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


@cache
def byte_fallback() -> Language:
    """As Llama 2, Mistral, Gemma: words with ▁ for a space, bytes for what has no word."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    pieces += [w.replace(" ", "▁") for w in WORDS if w.strip(" ")]
    pieces += [chr(c) for c in range(33, 127)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])

    def split(data: bytes) -> list[int]:
        """A word if the piece is one, else its ASCII characters, and bytes for the rest."""
        word = data.decode(errors="replace").replace(" ", "▁")
        if word in vocabulary:
            return [vocabulary[word]]
        return [
            vocabulary.get(chr(b).replace(" ", "▁"), vocabulary[f"<0x{b:02X}>"])
            if b < 128
            else vocabulary[f"<0x{b:02X}>"]
            for b in data
        ]

    return Language(tokenizer, split)


@cache
def metaspace() -> Language:
    """As T5 and XLNet: sentencepiece words, no bytes; text outside of them cannot be written."""
    pieces = ["<unk>", "▁", *(w.replace(" ", "▁") for w in WORDS if w.strip(" "))]
    pieces += [f"▁{chr(c)}" for c in range(97, 123)] + [chr(c) for c in range(33, 127)]
    vocabulary = [(piece, -1.0) for piece in dict.fromkeys(pieces)]
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])

    def split(data: bytes) -> list[int]:
        word = data.decode(errors="ignore").replace(" ", "▁")
        return [ids[word]] if word in ids else [ids[c] for c in word if c in ids]

    return Language(tokenizer, split)


LANGUAGES = pytest.mark.parametrize("language", [byte_level, byte_fallback, metaspace])
CUTS = st.lists(st.integers(0, 60), max_size=20)


def stream(language: Language, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(language.decode, prompt)
    return [*(detokenizer.push(token) for token in answer), detokenizer.flush()]


@LANGUAGES
@given(prompt=TEXTS, answer=TEXTS, prompt_cuts=CUTS, cuts=CUTS, specials=CUTS)
@example(prompt="", answer="😀😀😀😀", prompt_cuts=[], cuts=range(16), specials=[])
@example(prompt="x 😀😀", answer="😀 y", prompt_cuts=range(12), cuts=range(8), specials=[])
@example(prompt="hello", answer=" world" * 3, prompt_cuts=[], cuts=[], specials=[0] * 9)
def test_the_pieces_are_the_whole(
    language: Callable[[], Language],
    prompt: str,
    answer: str,
    prompt_cuts: list[int],
    cuts: list[int],
    specials: list[int],
) -> None:
    """Whatever the split, and with special tokens anywhere among them."""
    spoken = language()
    before, after = spoken.tokens(prompt, prompt_cuts), spoken.tokens(answer, cuts)
    for at in specials:
        after.insert(min(at, len(after)), spoken.special)
    prompt_ids = [spoken.special, *before]
    pieces = stream(spoken, prompt_ids, after)
    wanted = spoken.decode([*prompt_ids, *after])[len(spoken.decode(prompt_ids)) :]
    assert "".join(pieces) == wanted
    assert REPLACEMENT not in "".join(pieces)


@given(ids=st.lists(st.integers(0, 400), max_size=30), prompt=TEXTS)
def test_any_bytes_stream_as_they_decode(ids: list[int], prompt: str) -> None:
    spoken = byte_level()
    before = spoken.tokens(prompt, [])
    answer = [i % spoken.tokenizer.get_vocab_size() for i in ids]
    wanted = spoken.decode([*before, *answer])[len(prompt) :]
    assert "".join(stream(spoken, before, answer)) == wanted


@pytest.mark.parametrize("language", [byte_level, byte_fallback])
@given(ids=st.lists(st.integers(0, 400), max_size=30), prompt=st.lists(st.integers(0, 400)))
def test_bytes_that_are_no_text_do_not_stop_what_follows(
    language: Callable[[], Language], ids: list[int], prompt: list[int]
) -> None:
    spoken = language()
    size = spoken.tokenizer.get_vocab_size()
    words = spoken.tokens("the", []) * 2
    answer = [i % size for i in ids]
    text = "".join(stream(spoken, [i % size for i in prompt] or [0], [*answer, *words]))
    assert text.endswith("thethe")


def test_each_character_comes_with_its_last_token() -> None:
    spoken = byte_level()
    ids = spoken.tokens("a😀é", range(8))
    assert stream(spoken, spoken.tokens("x", []), ids) == ["a", "", "", "", "😀", "", "é", ""]


@pytest.mark.parametrize("language", [byte_level, byte_fallback])
def test_half_a_character_at_the_end_is_shown_as_such(
    language: Callable[[], Language],
) -> None:
    spoken = language()
    ids = spoken.tokens("the😀", range(3, 8))[:-1]
    *pieces, rest = stream(spoken, [spoken.special], ids)
    assert "".join(pieces) == "the"
    assert set(rest) == {REPLACEMENT}


@pytest.mark.parametrize("language", [byte_level, byte_fallback])
def test_a_character_that_the_prompt_began(language: Callable[[], Language]) -> None:
    """The answer that completes it has it, whole."""
    spoken = language()
    ids = spoken.tokens("the😀he", [3, 4, 5, 6, 7])
    for cut in range(2, len(ids) - 1):
        assert "".join(stream(spoken, ids[:cut], ids[cut:])) == "😀he"


@pytest.mark.parametrize("language", [byte_level, byte_fallback])
def test_the_replacement_character_itself_is_text(language: Callable[[], Language]) -> None:
    spoken = language()
    sign = spoken.tokens(REPLACEMENT, [])
    word = spoken.tokens("the", [])
    assert "".join(stream(spoken, word, [*sign, *word])) == f"{REPLACEMENT}the"
    assert "".join(stream(spoken, word, sign)) == REPLACEMENT
    assert "".join(stream(spoken, [*word, *sign], word)) == "the"
    assert "".join(stream(spoken, [*word, *sign], [])) == ""


@pytest.mark.parametrize("language", [byte_level, byte_fallback])
@pytest.mark.parametrize("garbage", ["special", "bytes"])
def test_no_token_takes_long_whatever_came_before(
    language: Callable[[], Language], garbage: str
) -> None:
    """Neither special tokens nor bytes that are no text make the window longer and longer."""
    spoken = language()
    windows: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        windows.append(len(ids))
        return spoken.decode(ids)

    noise = [spoken.special] if garbage == "special" else spoken.split(b"\xff")
    word = spoken.tokens("the", [])
    detokenizer = Detokenizer(decode, word)
    text = "".join(detokenizer.push(token) for token in [*noise * 2000, *word, *word])
    assert max(windows) <= 2 * MOST_HELD
    assert text.strip(REPLACEMENT) + detokenizer.flush() == "thethe"


STOP_TEXT = st.text(st.sampled_from("ab \n"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=5), min_size=1, max_size=3)


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Read letter by letter; of two stop strings that end with the same letter the longer."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(text=STOP_TEXT, stops=STOPS, cuts=CUTS)
def test_stop_strings_anywhere(text: str, stops: list[str], cuts: list[int]) -> None:
    """The same text however it is cut into pieces, and never a letter of a stop string."""
    wanted, stopping = until_stop(text, stops)
    if len(stops) == 1:
        assert wanted == text.split(stops[0], maxsplit=1)[0]
    watcher, out = StopStrings(stops), ""
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    for start, end in pairwise(ends):
        piece, stopped = watcher.push(text[start:end])
        out += piece
        assert wanted.startswith(out), "text went out that a stop string takes back"
        if stopped:
            break
    else:
        assert not stopping
        out += watcher.flush()
    assert out == wanted


def test_text_that_begins_no_stop_string_is_not_held_back() -> None:
    watcher = StopStrings(["END", "\n\n"])
    assert [watcher.push(piece) for piece in ("one ", "E", "N", " two\n", "three")] == [
        ("one ", False),
        ("", False),
        ("", False),
        ("EN two", False),
        ("\nthree", False),
    ]
    assert watcher.flush() == ""


def test_without_stop_strings_everything_passes() -> None:
    watcher = StopStrings([])
    assert watcher.push("text") == ("text", False)
    assert watcher.flush() == ""
