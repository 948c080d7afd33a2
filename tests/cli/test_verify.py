"""`verify` on a checkpoint, on a running server, and against the code that a checkpoint ships."""

import base64
import json
import re
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from app.api.auth import Keyring
from app.cli.main import app
from app.domain import InputType
from app.errors import CheckpointError, ConfigError
from app.models.loading import LoadOptions, options_named
from app.references import References, write
from app.selfcheck import SECOND, key_of
from tests.cli.conftest import Run
from tests.conftest import ANIMALS, BUILTIN
from tests.live import GOLDENS, V1, V2, live_server
from tests.models.conftest import load_golden, tokenized

WIDE = "v1-tiny-c512"
REMOTE_CODE = Path(__file__).parents[1] / "remote_code"


# --- a checkpoint --------------------------------------------------------------------------------------------------


def test_the_embedded_default_against_shipped_vectors(run: Run, tmp_path: Path) -> None:
    result = run("verify", "--model", BUILTIN)
    assert result.stdout.count(" ok ") == 2
    assert "held against" in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_against_what_it_gave_before(run: Run, tmp_path: Path) -> None:
    first = run("verify", "--model", GOLDENS / V1)
    assert "nothing was known" in first.stderr
    (file,) = (tmp_path / "data" / "selfcheck").iterdir()
    assert run("verify", "--model", GOLDENS / V1, "--dtype", "bfloat16").stdout.count(" ok ") == 2
    assert "nothing was known" in run("verify", "--model", GOLDENS / V1, "--semantics", "hub").stderr

    spec = load_golden(V1).model.spec
    known = References(file.parent).find(key_of(spec), {})
    assert known is not None
    write(file, {**known.arrays, SECOND: known.arrays[SECOND] * 1.1}, spec)
    differs = run("verify", "--model", GOLDENS / V1, code=1)
    assert differs.stdout.count(" ok ") == differs.stdout.count("DIFFERS") == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"semantics": "hub"},
        {"output_residual": False},
        {"semantics": "hub", "mask_instruction": True},
        {"context_attention": "frozen"},
        {"semantics": "hub", "output_residual": True, "context_attention": "frozen"},
    ],
)
@pytest.mark.parametrize("name", [V1, V2])
def test_semantics_name_the_options_they_come_from(name: str, options: dict[str, Any]) -> None:
    semantics = load_golden(name, **options).model.spec.semantics
    found = options_named(semantics)
    again = {f: getattr(found, f) for f in ("output_residual", "mask_instruction", "context_attention")}
    assert load_golden(name, found.semantics, **again).model.spec.semantics == semantics


def test_the_embedded_default_has_no_other_semantics() -> None:
    assert options_named("minilm-context") == LoadOptions()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--goldens", GOLDENS / V1, "--model", GOLDENS / V2], "does nothing for --goldens"),
        (["--goldens", GOLDENS / V1, "--url", "http://127.0.0.1:9"], "--goldens and --url"),
        (["--url", "http://127.0.0.1:9", "--model", GOLDENS / V1, "--reference"], "--url and --reference"),
        (["--model", GOLDENS / V1, "--input", "texts.txt"], "--input is for --reference, and does nothing for --model"),
        (["--model", GOLDENS / V1, "--output", "out.safetensors"], "--output is for --goldens, and"),
        (["--model", GOLDENS / V1, "--reference", "--dtype", "bfloat16"], "--dtype is for --model and --goldens"),
        (["--url", "http://127.0.0.1:9", "--semantics", "hub"], "does nothing for --url"),
    ],
)
def test_nothing_that_is_asked_for_is_passed_over(run: Run, arguments: list[str | Path], words: str) -> None:
    assert words in " ".join(run("verify", *arguments, code=2).output.replace("│", " ").split())


# --- a running server ----------------------------------------------------------------------------------------------


def test_a_server_against_local_copies(run: Run, server: str) -> None:
    for name in (V1, V2):
        result = run("verify", "--url", server, "--model", GOLDENS / name)
        assert (result.stdout.count(" ok "), result.stdout.count("DIFFERS")) == (11, 0)
        assert f"{name}, training, float32" in result.stdout


def test_a_server_against_shipped_vectors(run: Run, server: str) -> None:
    """All three models; of two of them nothing is known here."""
    result = run("verify", "--url", server)
    assert (result.stdout.count(" ok "), result.stdout.count("DIFFERS")) == (9 + 8 + 8, 0)
    assert "the vectors that this package ships" in result.stderr
    assert result.stderr.count("nothing: --model names a copy") == 2


def test_a_server_with_keys_and_in_other_precisions(run: Run, tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["keys", "create", "me", "--scope", "embed"])
    keys, secret = tmp_path / "keys.toml", made.stderr.split()[-1]
    keys.write_text(made.stdout)
    assert Keyring(keys).find(secret) is not None
    models: list[str | dict[str, Any]] = [
        {"name": str(GOLDENS / V1), "dtype": "bfloat16"},
        {"name": str(GOLDENS / V1), "first_stage": False, "served_name": "half"},
        {"name": str(GOLDENS / V2), "dtype": "int8", "semantics": "hub"},
        {"name": str(GOLDENS / WIDE), "context_attention": "frozen"},
    ]
    with live_server(tmp_path / "data", models, server={"keys_file": str(keys)}) as url:
        assert "didn't provide an API key" in run("verify", "--url", url, code=1).stderr
        for name in (V1, V2, WIDE):
            result = run("verify", "--url", url, "--api-key", secret, "--model", GOLDENS / name)
            assert (result.stdout.count(" ok "), result.stdout.count("DIFFERS")) == (11, 0)
            assert ("half is served without its first stage" in result.stderr) == (name == V1)


def test_weights_that_are_not_served(run: Run, server: str) -> None:
    result = run("verify", "--url", server, "--model", GOLDENS / WIDE, code=1)
    assert isinstance(result.exception, ConfigError)
    assert "are not served there, but builtin/minilm-context (53aa51172d14…), v1-tiny-c16" in str(result.exception)


class Meddler(ThreadingHTTPServer):
    """Stands before a server and changes its answers to /v1/embeddings."""

    def __init__(self, upstream: str, how: str) -> None:
        super().__init__(("127.0.0.1", 0), Meddling)
        self.http = httpx.Client(base_url=upstream)
        self.how = how
        self.seen = 0

    def server_close(self) -> None:
        super().server_close()
        self.http.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Meddling(BaseHTTPRequestHandler):
    server: Meddler

    def do_GET(self) -> None:
        self._pass_on(b"")

    def do_POST(self) -> None:
        self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *args: object) -> None:
        """Nothing on the console."""

    def _pass_on(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        answer = self.server.http.request(self.command, self.path, content=body, headers=headers)
        content, headers = answer.json(), dict(answer.headers)
        if self.path == "/v1/embeddings":
            self.server.seen += 1
            _meddle(self.server.how, json.loads(body), content["data"], headers, self.server.seen)
        raw = json.dumps(content).encode()
        self.send_response(answer.status_code)
        for name in ("x-embedding-fingerprint", "x-context-id"):
            if name in headers:
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def _meddle(how: str, asked: dict[str, Any], data: list[Any], headers: dict[str, str], seen: int) -> None:
    as_floats = asked["encoding_format"] == "float"
    if how == "order" and len(data) > 1 and asked["input"][0].startswith("Naïve"):
        data[0]["embedding"], data[1]["embedding"] = data[1]["embedding"], data[0]["embedding"]
    if how == "indices":
        data[-1]["index"] = 7
    if how == "floats" and as_floats:
        data[0]["embedding"][5] += 1e-3
    if how in ("fingerprint", "context") and seen == 3:
        headers["x-embedding-fingerprint" if how == "fingerprint" else "x-context-id"] = "another"
    if how == "length" and len(data) == 1:
        longer = 1.01 * np.frombuffer(base64.b64decode(data[0]["embedding"]), "<f4")
        data[0]["embedding"] = base64.b64encode(longer.astype("<f4").tobytes()).decode()
    if how == "batch" and len(data) > 1:
        for item in data:
            item["embedding"] = data[0]["embedding"]


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("order", ["texts in another order"]),
        ("indices", ["indices that are out of order"]),
        ("floats", ["as base64, and as floats"]),
        (
            "length",
            [
                "length of a vector, away from 1",
                "a text alone, and in a batch",
                "texts in another order",
                "distance from the known vectors",
            ],
        ),
        ("fingerprint", ["fingerprints, beyond the first"]),
        ("context", ["context ids, beyond the first"]),
        ("batch", ["a text alone, and in a batch", "texts in another order"]),
    ],
)
def test_what_a_server_does_wrong_is_seen(run: Run, server: str, how: str, rows: list[str]) -> None:
    with Meddler(server, how) as meddler:
        thread = Thread(target=meddler.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            result = run("verify", "--url", meddler.url, "--model", GOLDENS / V1, code=1)
        finally:
            meddler.shutdown()
            thread.join()
    wrong = [line for line in result.stdout.splitlines() if "DIFFERS" in line]
    assert [re.split(r" {2,}|│", line)[1].strip() for line in wrong] == rows


# --- the code that a checkpoint ships ------------------------------------------------------------------------------


@pytest.fixture
def shipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A golden checkpoint with code of its own; what it computes is still to be written into its config.json."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CDE_API_KEY", "hunter2")
    folder = tmp_path / "shipping"
    shutil.copytree(GOLDENS / V2, folder)
    shutil.copyfile(REMOTE_CODE / "model.py", folder / "model.py")
    yield folder


def computes(folder: Path, **what: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    colon = tokenized(load_golden(V2), [": "], InputType.NONE)[0].input_ids[1]
    config["backbone"] = json.loads((folder / "backbone_config.json").read_text())
    config["computes"] = {"colon": colon, **what}
    (folder / "config.json").write_text(json.dumps(config))


def texts_of(folder: Path) -> Path:
    file = folder / "texts.txt"
    file.write_text("\n".join(ANIMALS))
    return file


def test_which_semantics_the_checkpoints_own_code_computes(run: Run, shipping: Path) -> None:
    computes(shipping, residual=True, mask=False)
    options = ("--reference", "--trust-remote-code", "--input", texts_of(shipping), "--limit", "4")
    result = run("verify", "--model", shipping, *options)
    assert result.stdout.count("second stage") == 4
    assert result.stdout.count("same") == 2  # the first stage, and one of the second's
    assert re.search(r"first stage .* same", result.stdout)
    assert re.search(r"second stage │ training +│ true +│ false +│ .* same", result.stdout)
    assert 'computes semantics = "training", output_residual = true, mask_instruction = false, to ' in result.stderr


def interpreter(folder: Path, script: str) -> Path:
    """Stands in for the Python that runs a checkpoint's code."""
    program = folder / "python"
    program.write_text(script)
    program.chmod(0o755)
    return program


def test_code_that_computes_something_else(run: Run, shipping: Path) -> None:
    answers = """import sys, numpy, safetensors.numpy
rows = numpy.random.default_rng(0).standard_normal((4, 64)).astype("float32")
safetensors.numpy.save_file({"first_stage": rows[:2], "second_stage": rows}, sys.argv[5], {"made_by": "chance"})"""
    python = interpreter(shipping, f"#!{sys.executable}\n{answers}\n")
    options = ("--reference", "--trust-remote-code", "--input", texts_of(shipping), "--limit", "2", "--python", python)
    result = run("verify", "--model", shipping, *options, code=1)
    assert result.stdout.count("second stage") == 4
    assert "same" not in result.stdout
    assert "none of our semantics" in result.stderr
    assert "(chance)" in result.stderr


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("", "left no vectors that can be read"),
        ("open(sys.argv[5], 'wb').write(b'junk')", "left no vectors that can be read"),
        ("save({'first_stage': rows[:2], 'second_stage': rows[:1]})", "vectors of (1, 64) in the second stage"),
        ("save({'first_stage': rows[:2, :8], 'second_stage': rows})", "vectors of (2, 8) in the first stage"),
        ("save({'first_stage': rows[None], 'second_stage': rows})", "vectors of (1, 4, 64) in the first stage"),
        ("save({'first_stage': rows[:2] * numpy.nan, 'second_stage': rows})", "NaN or infinite values in the first"),
    ],
)
def test_code_that_gives_no_vectors_to_compare(
    run: Run, shipping: Path, monkeypatch: pytest.MonkeyPatch, answers: str, words: str
) -> None:
    """And says on stderr what is no text; the interpreter is named from where the user is."""
    script = f"""#!{sys.executable}
import sys, numpy, safetensors.numpy
sys.stderr.buffer.write(bytes([255]))
rows = numpy.ones((4, 64), "float32")
save = lambda arrays: safetensors.numpy.save_file(arrays, sys.argv[5])
{answers}
"""
    interpreter(shipping, script)
    monkeypatch.chdir(shipping)
    options = ("--reference", "--trust-remote-code", "--input", texts_of(shipping), "--limit", "2")
    refused = run("verify", "--model", shipping, *options, "--python", "./python", code=1)
    assert isinstance(refused.exception, CheckpointError)
    assert words in str(refused.exception)


def test_code_that_does_not_run(run: Run, shipping: Path) -> None:
    options = ("--reference", "--trust-remote-code", "--input", texts_of(shipping))
    python = interpreter(shipping, "#!/bin/sh\necho 'ImportError: no transformers' >&2\nexit 3\n")
    for chosen, words in (
        (python, "did not run (exit code 3): ImportError: no transformers."),
        ("/no", "cannot be run"),
    ):
        refused = run("verify", "--model", shipping, *options, "--python", chosen, code=1)
        assert isinstance(refused.exception, CheckpointError)
        assert words in str(refused.exception)


def test_the_other_process_gets_no_settings_and_no_keys(run: Run, shipping: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    python = interpreter(shipping, f"#!/bin/sh\nenv > {seen}\nexit 3\n")
    options = ("--reference", "--trust-remote-code", "--input", texts_of(shipping), "--python", python)
    run("verify", "--model", shipping, *options, code=1)
    variables = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    assert variables["HF_HOME"] == str(tmp_path / "home")
    assert not [name for name in variables if name.startswith("CDE_")]


def test_without_consent_nothing_of_it_runs(run: Run, shipping: Path, tmp_path: Path) -> None:
    (shipping / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused = run("verify", "--model", shipping, "--reference", "--input", texts_of(shipping), code=1)
    assert isinstance(refused.exception, ConfigError)
    assert "add --trust-remote-code" in str(refused.exception)
    assert not (tmp_path / "ran").exists()
    assert "--input" in run("verify", "--model", shipping, "--reference", "--trust-remote-code", code=2).output


def test_what_verify_must_be_told(run: Run, tmp_path: Path) -> None:
    assert "--model, --url and --goldens" in run("verify", code=2).output
    blank = tmp_path / "blank.txt"
    blank.touch()
    options = ("--reference", "--trust-remote-code", "--input", blank)
    assert "holds no text" in str(run("verify", "--model", GOLDENS / V1, *options, code=1).exception)
    blank.write_text("a text\n")
    assert "ships no code" in str(run("verify", "--model", BUILTIN, *options, code=1).exception)
