"""Files of texts, and what is wrong with some."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.corpora import BadCorpus, Record, place_of, read_beir, read_records, read_rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"good\ncaf\xe9\n", ":2: not UTF-8"),
        ("a.jsonl", b'"good"\n{"text"\n', ":2: not valid JSON"),
        ("a.jsonl", b'"good"\n"caf\xe9"\n', ":2: not UTF-8"),
        ("a.jsonl", b'"good"\n"\\ud83e', ":2: not valid JSON"),
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


def test_half_an_emoji_is_what_it_is_to_the_server(tmp_path: Path) -> None:
    """Everywhere in a line, as ids and kept columns are written, too; a whole one stays what it is."""
    path = tmp_path / "a.jsonl"
    lines = [
        r'"half \ud83e"',
        r'{"_id": "\udd8a", "text": "backslash \\ud83e"}',
        r'{"text": "\ud83e\udd8a", "note": ["\ud83e\udd8a \udd8a"]}',
    ]
    path.write_text("\n".join(lines))
    expected = [Record("0", "half \ufffd"), Record("\ufffd", r"backslash \ud83e"), Record("2", "🦊")]
    assert list(read_records(path)) == expected
    with path.open("rb") as file:
        (*_, last) = read_rows(file, "a.jsonl")
    assert last.raw == {"text": "🦊", "note": ["🦊 \ufffd"]}


def test_bytes_in_a_parquet_file_that_are_no_text(tmp_path: Path) -> None:
    text = pa.array([b"good", b"caf\xe9"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(BadCorpus, match=r"a\.parquet: not a Parquet file that can be read: .*utf-8"):
        list(read_records(tmp_path / "a.parquet"))


def test_a_place_is_the_line_and_not_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('"one"\n\n"two"\n')
    assert [place_of(path, i) for i in range(3)] == [f"{path}:1", f"{path}:3", str(path)]


JUDGED = b"query-id\tcorpus-id\tscore\nq\td\t1\n"


def beir(folder: Path, *, qrels: bytes = JUDGED, corpus: str = '{"_id": "d", "text": "x"}\n') -> Path:
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_bytes(qrels)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "y"}\n')
    return folder


def test_judgements_behind_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_beir(beir(tmp_path, qrels=b"\xef\xbb\xbf" + JUDGED)).qrels == {"q": {"d": 1}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (b"q\tcaf\xe9\t1\n", "not UTF-8"),
        (b"q\td2\thigh\n", ":3: columns query-id, corpus-id and score, a whole number"),
        (b"q\td2\n", ":3: columns"),
        (b"q\t" + b"d" * 200_000 + b"\t1\n", r"test\.tsv:2: columns"),
    ],
)
def test_judgements_that_cannot_be_read(tmp_path: Path, more: bytes, words: str) -> None:
    with pytest.raises(BadCorpus, match=words) as raised:
        read_beir(beir(tmp_path, qrels=JUDGED + more))
    assert str(tmp_path / "qrels" / "test.tsv") in str(raised.value)


def test_an_id_that_is_there_twice_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match=r"corpus\.jsonl: the _id 'd' is there twice"):
        read_beir(beir(tmp_path, corpus='{"_id": "d", "text": "x"}\n{"_id": "d", "text": "z"}\n'))
