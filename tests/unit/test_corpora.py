"""Files of texts, and what is wrong with some."""

from pathlib import Path

import pytest

from app.corpora import BadCorpus, Record, place_of, read_records


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good\ncaf\xe9\n", ":2: not UTF-8"),
        ("a.jsonl", b'"good"\n{"text"\n', ":2: not valid JSON"),
        ("a.jsonl", b'"good"\n\n{"title": "x"}\n', ":3: neither"),
        ("a.parquet", b"nonsense", "Parquet"),
        ("a.csv", b"a,b", "unknown kind"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadCorpus, match=words) as raised:
        list(read_records(path))
    assert str(path) in str(raised.value)


def test_lines_of_any_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\nthree")
    assert [record.text for record in read_records(path)] == ["one", "two", "three"]


def test_an_id_that_is_null_is_none_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"_id": null, "text": "one"}\n{"_id": null, "text": "two"}\n')
    assert list(read_records(lines)) == [Record("0", "one"), Record("1", "two")]
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfone\n")
    assert list(read_records(text)) == [Record("0", "one")]


def test_a_place_is_the_line_and_not_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"one"\n\n"two"\n')
    assert [place_of(path, i) for i in range(3)] == [f"{path}:1", f"{path}:3", str(path)]
