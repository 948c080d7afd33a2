"""The command line, run as its users run it, on small files and the tiny models."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from app.api.auth import Keyring
from app.cli.main import app, main
from app.embedding_files import PartialVectors
from tests.cli.conftest import Run
from tests.compare import assert_same
from tests.conftest import ANIMALS, COOKING
from tests.live import GOLDENS, V1, V2

MODEL = ["--model", str(GOLDENS / V1)]


def texts_file(path: Path, texts: list[str]) -> Path:
    suffix = path.suffix
    if suffix == ".txt":
        path.write_text("".join(f"{t}\n" for t in texts))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    else:
        pq.write_table(pa.table({"_id": [f"d{i}" for i in range(len(texts))], "text": texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", [".npy", ".safetensors", ".jsonl", ".parquet"])
def test_embed_reads_and_writes_every_format(run: Run, tmp_path: Path, suffix: str, out: str) -> None:
    file = texts_file(tmp_path / f"in{suffix}", ANIMALS)
    output = tmp_path / f"out{out}"
    run("embed", *MODEL, "--input", file, "--input-type", "document", "--context", file, "--output", output)
    readers = {
        ".npy": lambda: np.load(output),
        ".safetensors": lambda: load_file(output)["embeddings"],
        ".jsonl": lambda: np.array([json.loads(line)["embedding"] for line in output.read_text().splitlines()]),
        ".parquet": lambda: np.array(pq.read_table(output)["embedding"].to_pylist()),
    }
    vectors = readers[out]()
    assert vectors.shape == (12, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    if out in (".jsonl", ".parquet"):
        ids = (
            [json.loads(line)["_id"] for line in output.read_text().splitlines()]
            if out == ".jsonl"
            else pq.read_table(output)["_id"].to_pylist()
        )
        assert ids == [f"d{i}" if suffix != ".txt" else str(i) for i in range(12)]
    assert sorted(p.name for p in tmp_path.glob("out*")) == [output.name]


def test_embed_equals_the_server(run: Run, tmp_path: Path, http: httpx.Client) -> None:
    file = texts_file(tmp_path / "in.txt", ANIMALS)
    run("embed", *MODEL, "--input", file, "--input-type", "query", "--context", file, "--output", tmp_path / "o.npy")
    body = {"model": V1, "input": ANIMALS, "input_type": "query", "context": {"documents": ANIMALS}}
    served = [item["embedding"] for item in http.post("/v1/embeddings", json=body).json()["data"]]
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), served, atol=1e-5)


def test_embed_with_dataset_embeddings_and_with_a_stored_context(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = texts_file(tmp_path / "in.txt", ["one", "two"])
    rows = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    save_file({"dataset_embeddings": rows}, tmp_path / "c.safetensors")
    np.save(tmp_path / "c.npy", rows)
    for context in ("c.safetensors", "c.npy"):
        options = ["--input", file, "--input-type", "none", "--no-normalize", "--context", context]
        run("embed", *MODEL, *options, "--output", tmp_path / f"{context}.out.npy")
    assert_same(np.load("c.safetensors.out.npy"), np.load("c.npy.out.npy"))
    assert (np.abs(np.linalg.norm(np.load("c.npy.out.npy"), axis=1) - 1) > 1e-2).all()
    with pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr("sys.argv", ["cde-server", "embed", *MODEL, "--input", str(file), "--input-type", "none",
                                         "--context", "no-such", "--output", "x.npy"])  # fmt: skip
        main()
    assert stopped.value.code == 2


def test_embed_goes_on_where_it_was_cut_short(run: Run, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(600)]
    file = texts_file(tmp_path / "in.txt", texts)
    options = ["embed", *MODEL, "--input", file, "--input-type", "document"]
    run(*options, "--output", tmp_path / "whole.npy")
    whole = np.load(tmp_path / "whole.npy")

    long = texts_file(tmp_path / "long.txt", [*texts, "word " * 600])  # too long: fails after 512 texts are written
    cut = CliRunner().invoke(app, [str(o) for o in ("embed", *MODEL, "--input", long, "--input-type", "document",
                                                    "--output", tmp_path / "cut.npy")])  # fmt: skip
    assert cut.exit_code == 1
    assert not (tmp_path / "cut.npy").exists()
    partial = tmp_path / "cut.npy.partial"
    assert partial.stat().st_size == 512 * 64 * 4
    # Half a row more, as a crash would leave it; the input is now what the label says it was of.
    with partial.open("ab") as torn:
        torn.write(b"\0" * 100)
    result = run("embed", *MODEL, "--input", long, "--input-type", "document", "--output", tmp_path / "cut.npy", code=1)
    assert "going on behind the first 512 texts" in result.output
    again = run(*options, "--output", tmp_path / "cut.npy")  # other input: the partial file is not used
    assert "going on" not in again.output
    np.testing.assert_allclose(np.load(tmp_path / "cut.npy"), whole, atol=1e-6)  # batches fall differently


def test_embed_keeps_what_is_there_unless_told(run: Run, tmp_path: Path) -> None:
    file, output = texts_file(tmp_path / "in.txt", ANIMALS), tmp_path / "o.npy"
    output.write_bytes(b"of weeks")
    options = ["embed", *MODEL, "--input", file, "--input-type", "document", "--output", output]
    assert "--overwrite" in run(*options, code=2).output
    assert output.read_bytes() == b"of weeks"
    run(*options, "--overwrite")
    assert np.load(output).shape == (12, 64)


def test_embed_refuses_long_texts_unless_told(run: Run, tmp_path: Path) -> None:
    file = texts_file(tmp_path / "in.txt", ["word " * 600])
    options = ["embed", *MODEL, "--input", file, "--input-type", "document", "--output", tmp_path / "o.npy"]
    assert run(*options, code=1).exception is not None
    run(*options, "--truncate", "end")
    assert np.load(tmp_path / "o.npy").shape == (1, 64)


def test_contexts_against_a_server(run: Run, tmp_path: Path, server: str) -> None:
    documents = texts_file(tmp_path / "docs.jsonl", COOKING)
    there = ["--url", server, "--model", V1]
    made = json.loads(run("contexts", "create", "kitchen", documents, "--seed", "3", *there).stdout)
    assert (made["name"], made["documents"]["received"]) == ("kitchen", 12)
    assert "kitchen" in run("contexts", "list", *there).stdout
    assert json.loads(run("contexts", "show", "kitchen.1", *there).stdout) == made
    for file in ("k.safetensors", "k.npy"):
        run("contexts", "export", "kitchen", file, *there)
        assert "--overwrite" in run("contexts", "export", "kitchen", file, *there, code=2).output
        run("contexts", "export", "kitchen", file, "--overwrite", *there)
        copy = json.loads(run("contexts", "import", f"kitchen-{file[2:5]}", file, *there).stdout)
        assert copy["selection"]["method"] == "import"
    options = ["--input", documents, "--input-type", "document", "--context", "k.safetensors", "--output", "out.npy"]
    refused = run("embed", "--model", GOLDENS / V2, *options, code=1)
    assert "made with other weights" in str(refused.exception)
    run("embed", *MODEL, *options)
    there[1] += "/v1/"  # as OpenAI's clients are given it
    run("contexts", "create", "kitchen", documents, "--seed", "4", *there)
    rows = run("contexts", "versions", "kitchen", *there).stdout
    assert rows.index("│ 2 ") < rows.index("│ 1 ")
    assert json.loads(run("contexts", "rollback", "kitchen", "1", *there).stdout) == made
    run("contexts", "delete", "kitchen", *there)
    gone = run("contexts", "show", "kitchen", *there, code=1)
    assert "does not exist" in gone.output
    assert "does not answer" in run("contexts", "list", "--url", "http://127.0.0.1:9", code=1).output


def test_a_context_is_what_its_whole_name_says(run: Run, tmp_path: Path, server: str) -> None:
    documents = texts_file(tmp_path / "docs.jsonl", COOKING)
    there = ["--url", server, "--model", V1]
    run("contexts", "create", "whole", documents, *there)
    for ref in ("whole#2", "whole?version=2"):
        run("contexts", "delete", ref, *there, code=1)
        run("contexts", "show", ref, *there, code=1)
        run("contexts", "versions", ref, *there, code=1)
    run("contexts", "show", "whole", *there)
    run("contexts", "delete", "whole", *there)


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, {"Content-Type": "text/html"}, b"<html>"),
        (200, {"Content-Type": "application/json"}, b"{}"),
        (200, {"Content-Type": "application/json"}, b"[null]"),
        (301, {"Location": "https://elsewhere/"}, b"<html>"),
    ],
)
def test_what_answers_is_no_server_of_ours(
    run: Run, tmp_path: Path, status: int, headers: dict[str, str], body: bytes
) -> None:
    words = "is no cde-server" if status == 200 else f"HTTP {status}"
    kept = tmp_path / "kept.npy"
    kept.write_bytes(b"mine")

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_DELETE = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Nothing on the console."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        for command in ("contexts list", "contexts show x", "contexts versions x", "contexts delete x", "verify"):
            result = run(*command.split(), "--url", url, code=1)
            assert isinstance(result.exception, SystemExit)
            assert words in result.stderr
            assert headers.get("Location", "") in result.stderr
        assert words in run("contexts", "export", "x", kept, "--overwrite", "--url", url, code=1).stderr
        other.shutdown()
    assert kept.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [kept]


def test_refs_that_no_url_has_room_for(run: Run) -> None:
    for ref in ("", ".", ".."):
        assert "names no context" in run("contexts", "show", ref, code=2).output
    assert "999999999" in run("contexts", "rollback", "x", str(2**70), code=2).output


def test_eval_measures_what_it_says(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    (folder / "qrels").mkdir(parents=True)
    texts_file(folder / "corpus.jsonl", [*ANIMALS, *COOKING])
    texts_file(folder / "queries.jsonl", ["a sleeping fox in the wood", "fried rice", "not judged"])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd0\td0\t1\nd1\td18\t1\nd1\td19\t1\n")
    options = ["eval", folder, "--model", "builtin/minilm-context", "--seeds", "2", "--foreign", folder]
    rows = json.loads(run(*options, "--json").stdout)["rows"]
    assert [row["context"] for row in rows] == ["none", "own", "foreign"]
    for row in rows:
        assert row["recall@100"] == 100
        assert row["ndcg@10"] == pytest.approx(100, abs=0.1)
    assert rows[1]["ndcg@10"] == pytest.approx(rows[2]["ndcg@10"])
    table = run(*options).stdout
    assert "2 seeds" in table


def test_ndcg_of_a_known_ranking(run: Run, tmp_path: Path) -> None:
    """One relevant document, deliberately at rank 3: nDCG@10 = 1 / log2(4) = 50."""
    folder = tmp_path / "rank"
    (folder / "qrels").mkdir(parents=True)
    texts_file(folder / "corpus.jsonl", ["cats purr", "cats purr loudly", "stock markets fell"])
    (folder / "queries.jsonl").write_text('{"_id": "q0", "text": "cats purr"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td2\t1\n")
    rows = json.loads(run("eval", folder, "--model", "builtin/minilm-context", "--seeds", "1", "--json").stdout)["rows"]
    assert rows[0]["ndcg@10"] == pytest.approx(50)


@pytest.mark.parametrize("name", ["v1-tiny-c16", "v2-tiny-c16", "v1-tiny-c512", "v2-tiny-c512"])
def test_verify_goldens(run: Run, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out.safetensors"
    result = run("verify", "--goldens", GOLDENS / name, "--output", output)
    assert "0 beyond tolerance" in result.stdout
    expected = load_file(GOLDENS / name / "expected.safetensors")
    written = load_file(output)
    cases = json.loads((GOLDENS / name / "cases.json").read_text())["cases"]
    required = {n for c in cases if not c.get("optional") for names in c["expected"].values() for n in names.values()}
    assert set(written) == required
    assert max(float(np.abs(written[n] - expected[n]).max()) for n in written if n.endswith("/unit")) < 2e-5


def test_verify_notices_a_difference(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in (GOLDENS / V1).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    arrays = load_file(folder / "expected.safetensors")
    arrays["second_stage/hub/ss_empty/unit"] = arrays["second_stage/hub/ss_empty/unit"] + 1e-4
    save_file(arrays, folder / "expected.safetensors")
    result = run("verify", "--goldens", folder, "--variant", "hub", code=1)
    assert "FAIL second_stage/hub/ss_empty/unit" in result.stdout
    assert "1 beyond tolerance" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "--host", "0.0.0.0"], 2, "no keys are set"),
        (["serve", "--config", "nowhere.toml"], 2, "does not exist"),
        (["check-config", "--config", "nowhere.toml"], 2, "does not exist"),
        (["serve", "--config", "/"], 2, "is not a file"),
        (["serve", "--model", "./nowhere", "--port", "0"], 2, "neither a folder nor a Hub id"),
        (
            ["embed", "--model", "x", "--input", "no.txt", "--input-type", "none", "--output", "x.npy"],
            1,
            "error: no.txt: there is no such file, seen from /",
        ),
        (
            ["embed", "--model", "x", "--input", ".", "--input-type", "none", "--output", "x.npy"],
            1,
            "this is a folder; name a file of texts: .txt",
        ),
        (
            ["embed", "--model", "x", "--input", "in.txt", "--input-type", "none", "--output", "away/x.npy"],
            1,
            "there is no folder away; create it",
        ),
        (
            ["embed", "--model", "x", "--input", "in.txt", "--input-type", "none", "--output", "x.bin"],
            1,
            "known: .npy",
        ),
        (
            ["embed", "--model", "minilm", "--input", "in.txt", "--input-type", "none", "--output", "x.npy"],
            1,
            "builtin/",
        ),
        (["embed", "--model", "x", "--input", "empty.txt", "--input-type", "none", "--output", "x.npy"], 1, "no text"),
        (
            ["embed", "--model", "x", "--input", "in.txt", "--input-type", "none", "--output", "there.npy"],
            2,
            "--overwrite",
        ),
        (["eval", "nowhere", "--model", "x"], 1, "nowhere: no corpus.jsonl there; a folder in BEIR's layout has"),
        (["contexts", "import", "legal", "no.npy"], 1, "error: no.npy: No such file or directory"),
        (["contexts", "list", "--url", "http://host:port"], 2, "'http://host:port' is no address of a server"),
        (["contexts", "list", "--url", "localhost:8000"], 2, "one like http://127.0.0.1:8000"),
        (["bench", "http", "--url", "http://host:port"], 2, "'http://host:port' is no address of a server"),
        (["contexts", "export", "legal", "legal.bin"], 2, ".safetensors, .npy"),
        (["contexts", "list", "--api-key", "clé-secrète"], 2, "characters that no header carries"),
        (
            ["bench", "http", "--url", "http://127.0.0.1:9", "--seconds", "0.1"],
            1,
            "nothing was answered by http://127.0.0.1:9",
        ),
        (["verify", "--goldens", "nowhere"], 1, "no folder of golden cases"),
    ],
)
def test_what_goes_wrong_is_one_readable_message(  # noqa: PLR0917
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    Path("in.txt").write_text("one\n")
    for name in ("empty.txt", "there.npy"):
        Path(name).touch()
    monkeypatch.setattr("sys.argv", ["cde-server", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    message = capfd.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert "secrète" not in message


def test_keys_create_makes_a_file_the_server_takes(run: Run, tmp_path: Path) -> None:
    result = run("keys", "create", "team-a", "--scope", "embed")
    (tmp_path / "keys.toml").write_text(result.stdout)
    secret = result.stderr.split("once: ")[1].strip()
    key = Keyring(tmp_path / "keys.toml").find(secret)
    assert key is not None
    assert (key.name, key.scopes) == ("team-a", ("embed",))
    run("keys", "create", "team-a", "--scope", "root", code=2)


@pytest.mark.parametrize("name", ["v1-tiny-c16", "v2-tiny-c16"])
def test_agreement_of_frozen_and_exact(run: Run, tmp_path: Path, name: str) -> None:
    file = texts_file(tmp_path / "in.txt", [*ANIMALS, *COOKING])
    options = ["agreement", "--model", GOLDENS / name, "--context", file, "--input", file]
    found = json.loads(run(*options, "--json").stdout)
    assert found["texts"] == 24
    assert 0 < found["min_cosine"] <= found["mean_cosine"] < 1 - 1e-6
    assert 0 <= found["top10_overlap"] <= 1
    assert found["frozen_texts_per_second"] > 0
    assert "approximate" in run(*options).stdout


def test_of_few_texts_all_others_are_the_nearest(run: Run, tmp_path: Path) -> None:
    """Which says nothing of the two ways to compute."""
    file = texts_file(tmp_path / "in.txt", ANIMALS)
    options = ["agreement", "--model", GOLDENS / V1, "--context", file, "--input", file]
    assert json.loads(run(*options, "--limit", "11", "--json").stdout)["top10_overlap"] is None
    assert "too few texts" in run(*options, "--limit", "11").stdout
    assert json.loads(run(*options, "--limit", "12", "--json").stdout)["top10_overlap"] <= 1


def test_equal_texts_are_compared_once(run: Run, tmp_path: Path) -> None:
    """Their order among the nearest is rounding's."""
    file, often = texts_file(tmp_path / "in.txt", [*ANIMALS, *COOKING]), tmp_path / "often.txt"
    often.write_text(file.read_text() * 20)
    options = ["agreement", "--model", GOLDENS / V1, "--context", file, "--json", "--input"]
    once, repeated = (json.loads(run(*options, each).stdout) for each in (file, often))
    assert repeated["texts"] == once["texts"] == 24
    assert repeated["top10_overlap"] == pytest.approx(once["top10_overlap"], abs=0.01)


def test_nothing_to_freeze_in_the_embedded_default(run: Run, tmp_path: Path) -> None:
    file = texts_file(tmp_path / "in.txt", ANIMALS)
    result = CliRunner().invoke(
        app, ["agreement", "--model", "builtin/minilm-context", "--context", str(file), "--input", str(file)]
    )
    assert "no context rows to freeze" in str(result.exception)


def test_keys_create_takes_a_namespace(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["keys", "create", "team", "--namespace", "team-a", "--scope", "embed"])
    assert result.exit_code == 0
    file = tmp_path / "keys.toml"
    file.write_text(result.stdout)
    key = Keyring(file).find(result.stderr.split()[-1])
    assert key is not None
    assert (key.namespace, key.scopes) == ("team-a", ("embed",))
    for namespace in ("Not OK", ""):  # of a variable that is not set, say: it must not be the one that all share
        assert CliRunner().invoke(app, ["keys", "create", "team", "--namespace", namespace]).exit_code == 2
    assert CliRunner().invoke(app, ["keys", "create", "a-b_c"]).exit_code == 0
    assert CliRunner().invoke(app, ["keys", "create", "\u00bd"]).exit_code == 2


def test_an_output_is_written_by_one_process_alone(run: Run, tmp_path: Path) -> None:
    file = texts_file(tmp_path / "in.txt", ANIMALS)
    options = ["embed", *MODEL, "--input", file, "--input-type", "none", "--output", tmp_path / "out.npy"]
    with PartialVectors(tmp_path / "out.npy", dimensions=64, made_of="something else"):
        assert "another process" in str(run(*options, code=1).exception)
    run(*options)
    assert np.load(tmp_path / "out.npy").shape == (12, 64)
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.npy"]


def test_a_query_that_is_a_document_does_not_find_itself(run: Run, tmp_path: Path) -> None:
    """As BEIR has it for ArguAna; a document of the same number with another text is found as any other."""
    folder = tmp_path / "self"
    (folder / "qrels").mkdir(parents=True)
    texts_file(folder / "corpus.jsonl", ["stock markets fell", "cats purr", "cats purr loudly"])
    (folder / "queries.jsonl").write_text('{"_id": "d1", "text": "cats purr"}\n{"_id": "d0", "text": "markets"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nd1\td2\t1\nd0\td0\t1\n")
    rows = json.loads(run("eval", folder, "--model", "builtin/minilm-context", "--seeds", "1", "--json").stdout)["rows"]
    assert rows[0]["ndcg@10"] == pytest.approx(100)
