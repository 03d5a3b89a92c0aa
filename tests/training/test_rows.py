from __future__ import annotations

from pathlib import Path

import pytest

from manylora.errors import InvalidArgument
from manylora.training.rows import Chat, Completion, Message, read_rows


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "x.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_both_kinds_of_row_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt": "1 + 1 =", "completion": " 2"}\r\n'
        "\n"
        '{"messages": [{"role": "system", "content": "Be brief."},'
        ' {"role": "user", "content": "naïve?"}, {"role": "assistant", "content": "Oui."}]}',
    )
    assert read_rows(path) == [
        Completion("x.jsonl:1", "1 + 1 =", " 2"),
        Chat(
            "x.jsonl:3",
            (
                Message("system", "Be brief."),
                Message("user", "naïve?"),
                Message("assistant", "Oui."),
            ),
        ),
    ]


GOOD = '{"prompt": "a", "completion": "b"}\n'
USER = '{"role": "user", "content": "a"}'
ANSWER = '{"role": "assistant", "content": "b"}'


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("[1]", "x.jsonl:2"),
        ("{", "x.jsonl:2"),
        (b'{"prompt": "\xff", "completion": "b"}', "x.jsonl:2"),
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', "x.jsonl:2"),
        ('{"prompt": "a"}', "x.jsonl:2"),
        ("{}", "x.jsonl:2"),
        ('{"prompt": "a", "completion": "b", "weight": 2}', "x.jsonl:2"),
        (f'{{"prompt": "a", "messages": [{USER}, {ANSWER}]}}', "x.jsonl:2"),
        ('{"prompt": "", "completion": "b"}', "x.jsonl:2: prompt"),
        ('{"prompt": "a", "completion": ""}', "x.jsonl:2: completion"),
        ('{"prompt": "a", "completion": 5}', "x.jsonl:2: completion"),
        ('{"prompt": "a", "completion": "\\ud800"}', "x.jsonl:2: completion"),
        ('{"messages": []}', "x.jsonl:2: messages"),
        ('{"messages": "hi"}', "x.jsonl:2: messages"),
        (f'{{"messages": [{USER}]}}', "x.jsonl:2: messages[0].role"),
        (f'{{"messages": [{USER}, {ANSWER}, {USER}]}}', "x.jsonl:2: messages[2].role"),
        (f'{{"messages": ["a", {ANSWER}]}}', "x.jsonl:2: messages[0]"),
        (f'{{"messages": [{{"role": "user"}}, {ANSWER}]}}', "x.jsonl:2: messages[0]"),
        (
            f'{{"messages": [{{"role": "tool", "content": "a"}}, {ANSWER}]}}',
            "x.jsonl:2: messages[0].role",
        ),
        (
            f'{{"messages": [{{"role": ["user"], "content": "a"}}, {ANSWER}]}}',
            "x.jsonl:2: messages[0].role",
        ),
        (
            f'{{"messages": [{{"role": "user", "content": null}}, {ANSWER}]}}',
            "x.jsonl:2: messages[0].content",
        ),
    ],
)
def test_a_wrong_row_is_refused_by_line_and_field(
    tmp_path: Path, line: str | bytes, field: str
) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(InvalidArgument) as caught:
        read_rows(write(tmp_path, GOOD.encode() + raw))
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="no row"):
        read_rows(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
