"""A corpus cut into parts and read again, and the folder its vectors go into; without Ray."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from app.cli.main import app
from app.corpora import BadCorpus, read_records
from app.errors import ConfigError
from app.scale.folders import Output, absolute, text_files
from app.scale.parts import Corpus, cut, read
from tests.live import GOLDENS, V1

TEXTS = [f"Text {i} of many, é." for i in range(50)]
MADE_OF = {"fingerprint": "fp_1", "keep": ["n"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "_hidden").mkdir()
    lines = [json.dumps({"_id": f"d{i}", "text": text, "n": [i]}, ensure_ascii=False) for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\r\n\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS))
    pq.write_table(pa.table({"text": TEXTS, "n": range(50)}), tmp_path / "deep" / "c.parquet", row_group_size=7)
    for name in ("README.md", "_hidden/x.txt", "deep/.y.txt"):
        (tmp_path / name).write_text("x")
    return tmp_path


def corpus_of(location: str | Path, keep: tuple[str, ...] = (), part_rows: int = 8) -> Corpus:
    url = absolute(str(location))
    below, names = text_files(url)
    return Corpus(url, below, tuple(names), keep, part_rows)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a.jsonl", "b.txt", "deep/c.parquet"]),
        ("deep", ["c.parquet"]),
        ("b.txt", ["b.txt"]),
        ("*", ["a.jsonl", "b.txt"]),
        ("*/*.parquet", ["deep/c.parquet"]),
        ("deep/[a-c].*", ["c.parquet"]),
    ],
)
def test_files_of_a_folder_or_a_glob(folder: Path, pattern: str, names: list[str]) -> None:
    assert list(corpus_of(folder / pattern).names) == names
    assert list(corpus_of(f"file://{folder}/{pattern}").names) == names


@pytest.mark.parametrize("pattern", ["nowhere", "*.md", "README.md"])
def test_no_texts_are_an_error(folder: Path, pattern: str) -> None:
    with pytest.raises(BadCorpus, match="known"):
        for name in (corpus := corpus_of(folder / pattern)).names:
            list(cut(corpus, name))


@pytest.mark.parametrize("rows", [1, 8, 50, 1000])
@pytest.mark.parametrize("name", ["a.jsonl", "b.txt", "deep/c.parquet"])
def test_parts_hold_every_row_once(folder: Path, name: str, rows: int) -> None:
    corpus = corpus_of(folder, part_rows=rows)
    parts = list(cut(corpus, name))
    assert parts == list(cut(corpus, name))
    assert len({part.output for part in parts}) == len(parts) == -(-50 // rows)
    found = [read(corpus, part) for part in reversed(parts)]
    expected = list(read_records(folder / name))
    assert [text for texts, _ in reversed(found) for text in texts] == [record.text for record in expected] == TEXTS
    assert [i for _, columns in reversed(found) for i in columns["_id"].to_pylist()] == [r.id for r in expected]


def test_kept_columns_have_the_types_of_parquet_and_are_strings_from_json(folder: Path) -> None:
    corpus = corpus_of(folder, keep=("n",))
    kept = {name: read(corpus, next(cut(corpus, name)))[1]["n"] for name in corpus.names}
    assert (kept["deep/c.parquet"].type, kept["deep/c.parquet"][7].as_py()) == (pa.int64(), 7)
    assert (kept["a.jsonl"].type, kept["a.jsonl"][7].as_py()) == (pa.string(), "[7]")
    assert kept["b.txt"].null_count == 8
    with pytest.raises(BadCorpus, match="no column 'm'"):
        list(cut(replace(corpus, keep=("m",)), "deep/c.parquet"))


def test_a_part_is_named_by_what_is_in_it(folder: Path) -> None:
    corpus = corpus_of(folder)
    before = [part.output for part in cut(corpus, "b.txt")]
    copy = folder / "_hidden" / "copy"
    copy.mkdir()
    (copy / "b.txt").write_text("\n".join([*TEXTS[:20], "another", *TEXTS[21:]]))
    parts = list(cut(corpus_of(copy), "b.txt"))
    assert [part.output == old for part, old in zip(parts, before, strict=True)] == [i != 2 for i in range(7)]
    with pytest.raises(BadCorpus, match="has changed"):
        read(corpus, parts[2])
    assert before != [part.output for part in cut(replace(corpus, keep=("n",)), "b.txt")]


def test_an_output_is_of_one_run(tmp_path: Path) -> None:
    output = Output(f"file://{tmp_path}/new/out")
    assert output.begin(MADE_OF) == set()
    output.write("a.parquet", pa.table({"_path": ["a"]}))
    (tmp_path / "new/out/_writing-1").touch()
    os.utime(tmp_path / "new/out/_writing-1", (0, 0))
    (tmp_path / "new/out/_writing-2").touch()  # another run's, at work
    assert output.begin(MADE_OF) == {"a.parquet"}
    left = sorted(path.name for path in (tmp_path / "new/out").iterdir())
    assert left == ["_run.json", "_writing-2", "a.parquet"]
    output.complete({"rows": 1})
    assert json.loads((tmp_path / "new/out/_run.json").read_bytes()) == {**MADE_OF, "status": "completed", "rows": 1}
    with pytest.raises(ConfigError, match="fingerprint is fp_1 there and fp_2 now"):
        output.begin({**MADE_OF, "fingerprint": "fp_2"})
    (tmp_path / "theirs").write_text("x")
    with pytest.raises(ConfigError, match="not of a run"):
        Output(str(tmp_path)).begin(MADE_OF)


def test_addresses_nobody_knows() -> None:
    with pytest.raises(BadCorpus, match="no address"):
        Output("gopher://host/path")


def test_options_of_the_other_engine(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x")
    options = ["--model", GOLDENS / V1, "--input", tmp_path / "in.txt", "--input-type", "none", "--output", "x.npy"]
    command = ["embed", *map(str, options)]
    assert "for --engine ray only" in CliRunner().invoke(app, [*command, "--workers", "2"]).output
    assert "not for --engine ray" in CliRunner().invoke(app, [*command, "--engine", "ray", "--overwrite"]).output
    for column in ("_id", "_path", "_row", "embedding"):
        kept = CliRunner().invoke(app, [*command, "--engine", "ray", "--keep", column])
        assert f"--keep {column} is a column of the output itself" in str(kept.exception)
    if importlib.util.find_spec("ray") is None:
        refused = CliRunner().invoke(app, [*command, "--engine", "ray"]).exception
        assert "pip install -e '.[ray]'" in str(refused)
