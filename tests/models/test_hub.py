"""Checkpoints from the Hub, through the real `huggingface_hub`, against a Hub on loopback.

`huggingface_hub` reads its environment once, at import: the loads run in processes of their own, which are this module
run as a program (`_answer_calls`).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from app.domain import InputType
from app.errors import CheckpointError
from app.models.loading import LoadedModel, LoadOptions, load_model
from tests.compare import assert_same
from tests.hub_server import HubServer
from tests.models.conftest import GOLDENS, context_of, embed, load_golden, tokenized

WEIGHTS = ("config.json", "model.safetensors", "backbone_config.json")
V1, V2 = "v1-tiny-c16", "v2-tiny-c16"


class Loader:
    """A process that loads models with its own Hub, cache folder and environment."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.cache = home / "hub"
        self.waited = 0.0
        """Seconds the last load would have waited before trying again."""
        self._log = home.with_suffix(f".{id(self)}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.models.test_hub"],
                cwd=GOLDENS.parents[1],
                env={**kept, **settings, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def loaded(self, name: str, revision: str | None = None) -> dict[str, Any]:
        """The spec of a model that must load, and the vector it gives."""
        answer = self._call(load=name, revision=revision)
        assert "spec" in answer, answer
        return answer

    def refused(self, name: str, revision: str | None = None) -> str:
        """The message for a model that must not load; one for an operator to read."""
        answer = self._call(load=name, revision=revision)
        assert answer.get("error") == "CheckpointError", answer
        message: str = answer["message"]
        assert "\n" not in message, message
        assert len(message) < 800, message
        return message

    def fetch(self, repo: str, *files: str) -> None:
        """What `hf download repo file...` does."""
        assert self._call(fetch=repo, files=files) == {}

    def forget(self, repo: str) -> None:
        shutil.rmtree(self.cache / f"models--{repo.replace('/', '--')}", ignore_errors=True)

    def _call(self, **call: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text()
        answer: dict[str, Any] = json.loads(line)
        self.waited = answer.pop("waited")
        return answer


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two of `Loader.loaded`."""
    assert found["spec"] == expected["spec"]
    assert_same(found["vector"], expected["vector"])


def _answer_calls() -> None:
    waits: list[float] = []
    time.sleep = lambda seconds: waits.append(float(seconds))  # tries again, without the wait in between
    for line in sys.stdin:
        call = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "fetch" in call:
                for file in call["files"]:
                    hf_hub_download(call["fetch"], file)
            else:
                options = LoadOptions(revision=call["revision"], device="cpu", dtype="float32")
                answer = _description(load_model(call["load"], options))
        except Exception as error:  # noqa: BLE001 - told to the test
            kind = CheckpointError if isinstance(error, CheckpointError) else type(error)
            answer = {"error": kind.__name__, "message": str(error)}
        answer["waited"] = sum(waits)
        waits.clear()
        print(json.dumps(answer), flush=True)  # noqa: T201


def _description(loaded: LoadedModel) -> dict[str, Any]:
    context = context_of(loaded, [f"Letter {i}." for i in range(loaded.model.spec.corpus_size)])
    vectors = embed(loaded, tokenized(loaded, ["A small bakery measured rye."], InputType.QUERY), [context])
    names = ("id", "source", "revision", "tokenizer_revision", "family", "corpus_size", "fallback_documents")
    return {"spec": {name: getattr(loaded.model.spec, name) for name in names}, "vector": vectors[0].tolist()}


def folder(at: Path, golden: str, names: tuple[str, ...] = WEIGHTS, scale: float | None = None, **config: Any) -> Path:
    """Some files of a golden checkpoint; `scale` makes other weights of them, `config` replaces values."""
    at.mkdir(parents=True)
    for name in names:
        shutil.copyfile(GOLDENS / golden / name, at / name)
    if scale is not None:
        tensors = load_file(at / "model.safetensors")
        save_file({key: tensor * scale for key, tensor in tensors.items()}, at / "model.safetensors")
    if config:
        known = json.loads((at / "config.json").read_text())
        (at / "config.json").write_text(json.dumps({**known, **config}))
    return at


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Loader, Loader]]:
    """The Hub, and two processes on one cache: with network, and with HF_HUB_OFFLINE."""
    home = tmp_path_factory.mktemp("hub") / "home"
    with (
        HubServer() as hub,
        Loader(hub.endpoint, home) as online,
        Loader(hub.endpoint, home, HF_HUB_OFFLINE="1") as offline,
    ):
        yield hub, online, offline


@pytest.fixture
def hub(processes: tuple[HubServer, Loader, Loader], tmp_path: Path) -> Iterator[HubServer]:
    """The Hub, running, with the backbones' tokenizers."""
    server = processes[0]
    server.start()
    server.broken = server.dies_after = None
    server.add("answerdotai/ModernBERT-base", folder(tmp_path / "modern", V2, ("config.json", "tokenizer.json")))
    server.add("bert-base-uncased", folder(tmp_path / "bert", V1, ("config.json", "tokenizer.json")))
    server.requests.clear()
    yield server
    server.start()
    server.broken = server.dies_after = None


@pytest.fixture
def online(processes: tuple[HubServer, Loader, Loader]) -> Loader:
    return processes[1]


@pytest.fixture
def offline(processes: tuple[HubServer, Loader, Loader]) -> Loader:
    return processes[2]


@pytest.mark.parametrize(
    ("golden", "repo", "tokenizer"),
    [(V2, "jxm/cde-small-v2", "answerdotai/ModernBERT-base"), (V1, "jxm/cde-small-v1", "bert-base-uncased")],
)
def test_weights_from_one_repository_tokenizer_from_the_backbones(
    hub: HubServer, online: Loader, tmp_path: Path, *, golden: str, repo: str, tokenizer: str
) -> None:
    online.forget(tokenizer)
    commit = hub.add(repo, folder(tmp_path / "repo", golden))
    found = online.loaded(repo)
    local = _description(load_golden(golden))
    assert found["spec"]["id"] == repo
    assert found["spec"]["source"] == f"{repo}@{commit}"
    for same in ("revision", "tokenizer_revision", "family", "corpus_size"):
        assert found["spec"][same] == local["spec"][same]
    np.testing.assert_allclose(found["vector"], local["vector"], atol=1e-6)
    assert hub.count("GET", f"/{tokenizer}/resolve/main/tokenizer.json") == 1
    assert hub.count("GET", "/cdn/") == 1


def test_a_tokenizer_beside_the_weights_wins(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    hub.add("me/own-tokenizer", folder(tmp_path / "repo", V2, (*WEIGHTS, "tokenizer.json"), embedder="me/nowhere"))
    assert online.loaded("me/own-tokenizer")["spec"]["tokenizer_revision"]
    assert hub.count("GET", "/me/nowhere/") == hub.count("HEAD", "/me/nowhere/") == 0


@pytest.mark.parametrize("bert", ["no repository", "no tokenizer"])
def test_v1s_tokenizer_second_choice(hub: HubServer, online: Loader, tmp_path: Path, bert: str) -> None:
    online.forget("bert-base-uncased")
    hub.remove("bert-base-uncased")
    if bert == "no tokenizer":
        hub.add("bert-base-uncased", folder(tmp_path / "empty", V1, ("config.json",)))
    hub.add("nomic-ai/nomic-bert-2048", folder(tmp_path / "nomic", V1, ("config.json", "tokenizer.json")))
    hub.add("me/second-choice", folder(tmp_path / "repo", V1))
    assert online.loaded("me/second-choice")["spec"]["family"] == "cde-v1"
    hub.remove("nomic-ai/nomic-bert-2048")
    for repo in ("nomic-ai/nomic-bert-2048", "bert-base-uncased"):
        online.forget(repo)
    message = online.refused("me/second-choice")
    assert "tokenizer.json" in message
    assert "bert-base-uncased" in message


def test_branches_tags_and_commits(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    """Each revision gives its own weights, and `main` is looked up anew each time."""
    old = hub.add("me/versions", folder(tmp_path / "old", V2), ("main", "v1.0", "refs/pr/1"))
    first = online.loaded("me/versions")["spec"]
    new = hub.add("me/versions", folder(tmp_path / "new", V2, scale=1.5), ("main", "experiment"))
    second = online.loaded("me/versions")["spec"]
    assert first["source"] == f"me/versions@{old}"
    assert second["source"] == f"me/versions@{new}"
    assert first["revision"] != second["revision"]
    for revision in ("v1.0", "refs/pr/1", old):
        assert online.loaded("me/versions", revision)["spec"] == first
    for revision in ("main", "experiment", new):
        assert online.loaded("me/versions", revision)["spec"] == second


def test_all_files_come_from_one_commit(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    commit = hub.add("me/one-commit", folder(tmp_path / "repo", V2))
    online.loaded("me/one-commit")
    asked = {line.split("/resolve/")[1] for line in hub.requests if "/me/one-commit/" in line}
    assert {name.split("/")[1] for name in asked if name.startswith("main/")} == {"config.json"}
    assert f"{commit}/model.safetensors" in asked
    assert f"{commit}/random_strings.txt" in asked


def test_documents_of_the_default_context(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    repo = folder(tmp_path / "repo", V2)
    (repo / "random_strings.txt").write_text("one\ntwo\n")
    hub.add("me/documents", repo)
    assert online.loaded("me/documents")["spec"]["fallback_documents"] == ["one", "two"]


def test_unknown_repository(hub: HubServer, online: Loader) -> None:
    message = online.refused("jxm/cde-medium")
    assert "jxm/cde-medium" in message
    assert hub.endpoint in message
    assert "HF_TOKEN" in message


def test_unknown_revision(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    hub.add("me/revisions", folder(tmp_path / "repo", V2))
    message = online.refused("me/revisions", "v9")
    assert "me/revisions" in message
    assert "'v9'" in message
    assert "no revision" in online.refused("me/revisions", "0" * 40)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(hub: HubServer, online: Loader, tmp_path: Path, missing: str) -> None:
    hub.add(f"me/no-{missing}", folder(tmp_path / "repo", V2, tuple(name for name in WEIGHTS if name != missing)))
    message = online.refused(f"me/no-{missing}")
    assert f"has no {missing}" in message
    assert "checkpoint" in message


def test_pickle_files_are_not_even_downloaded(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    repo = folder(tmp_path / "repo", V2, ("config.json", "backbone_config.json"))
    (repo / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    hub.add("me/pickle", repo)
    assert "has no model.safetensors" in online.refused("me/pickle")
    assert not [line for line in hub.requests if ".bin" in line]


def test_gated_repository(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    hub.add("me/restricted", folder(tmp_path / "repo", V2), gated=True)
    message = online.refused("me/restricted")
    assert "gated: accept its terms" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize(
    "name", ["cde-small-v2", "a/b/c", "./nowhere", "me/with space", "me/double--dash", "builtin/minilm"]
)
def test_what_is_no_name(hub: HubServer, online: Loader, name: str) -> None:
    assert "neither a folder nor a Hub id" in online.refused(name)
    assert not hub.requests


def test_a_hub_that_only_fails(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    hub.add("me/failing", folder(tmp_path / "repo", V2))
    hub.broken = HTTPStatus.INTERNAL_SERVER_ERROR
    assert "500" in online.refused("me/failing")
    hub.broken = HTTPStatus.UNAUTHORIZED
    assert "401" in online.refused("me/failing")
    hub.broken = HTTPStatus.NO_CONTENT  # not a Hub at all
    assert hub.endpoint in online.refused("me/failing")
    hub.broken = None
    known = online.loaded("me/failing")
    hub.broken = HTTPStatus.BAD_GATEWAY
    assert_alike(online.loaded("me/failing"), known)


def test_second_start_fetches_nothing(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    commit = hub.add("me/twice", folder(tmp_path / "repo", V2))
    first = online.loaded("me/twice")
    hub.requests.clear()
    assert_alike(online.loaded("me/twice"), first)
    assert hub.count("GET") == 0
    assert len(hub.requests) <= 2, hub.requests  # what are main's commits, of the checkpoint and of the tokenizer?
    hub.requests.clear()
    assert_same(online.loaded("me/twice", commit)["vector"], first["vector"])
    assert hub.count("HEAD", "/me/twice/") == 0


def test_network_down(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    for golden, repo in ((V1, "me/warm-v1"), (V2, "me/warm-v2")):
        hub.start()
        hub.add(repo, folder(tmp_path / repo, golden))
        known = online.loaded(repo)
        hub.stop()
        assert_alike(online.loaded(repo), known)
        assert online.waited == 0
        assert_alike(online.loaded(repo, known["spec"]["source"].split("@")[1]), known)
    message = online.refused("me/cold")
    assert f"{hub.endpoint} cannot be reached" in message
    assert "me/cold" in message
    assert "hf download" in message
    assert "folder" in message


@pytest.mark.parametrize("state", ["down", "offline"])
def test_cache_filled_by_another_program(
    hub: HubServer, online: Loader, offline: Loader, tmp_path: Path, state: str
) -> None:
    """Nobody has asked for the optional files before, so the cache does not know that they do not exist."""
    repo = f"me/filled-{state}"
    hub.add(repo, folder(tmp_path / "repo", V2))
    online.fetch(repo, *WEIGHTS)
    online.fetch("answerdotai/ModernBERT-base", "tokenizer.json")
    hub.stop()
    loader = online if state == "down" else offline
    found = loader.loaded(repo)
    assert loader.waited <= (23 if state == "down" else 0)  # the client library's patience, once and not for each file
    assert found["spec"]["revision"] == load_golden(V2).model.spec.revision


def test_half_a_cache_is_not_a_checkpoint(hub: HubServer, online: Loader, offline: Loader, tmp_path: Path) -> None:
    """Without the weights nothing is concluded from other files that are not there."""
    hub.add("me/half", folder(tmp_path / "repo", V2, embedder="me/some-backbone"))
    online.fetch("me/half", "config.json")
    message = offline.refused("me/half")
    assert "not in the local cache" in message
    assert "HF_HUB_OFFLINE" in message


def test_offline_with_a_warm_cache(hub: HubServer, online: Loader, offline: Loader, tmp_path: Path) -> None:
    commit = hub.add("me/offline", folder(tmp_path / "repo", V1))
    known = online.loaded("me/offline")
    hub.requests.clear()
    assert_alike(offline.loaded("me/offline"), known)
    assert_alike(offline.loaded("me/offline", commit), known)
    assert not hub.requests


def test_offline_with_a_cold_cache(hub: HubServer, offline: Loader, tmp_path: Path) -> None:
    hub.add("me/never-fetched", folder(tmp_path / "repo", V2))
    message = offline.refused("me/never-fetched")
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download me/never-fetched" in message
    assert str(offline.cache) in message
    assert not hub.requests


def test_offline_without_the_tokenizer(hub: HubServer, online: Loader, offline: Loader, tmp_path: Path) -> None:
    hub.add("me/no-tokenizer", folder(tmp_path / "repo", V2, embedder="me/its-backbone"))
    online.fetch("me/no-tokenizer", *WEIGHTS)
    message = offline.refused("me/no-tokenizer")
    assert "tokenizer.json" in message
    assert "hf download me/its-backbone" in message


def test_hub_dies_in_the_middle_of_the_weights(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    hub.add("me/dying", folder(tmp_path / "repo", V2))
    hub.dies_after = 100_000
    message = online.refused("me/dying")
    assert "model.safetensors" in message
    assert "me/dying" in message
    hub.start()
    assert online.loaded("me/dying")["spec"]["revision"] == load_golden(V2).model.spec.revision


def test_weights_damaged_in_the_cache(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    hub.add("jxm/damaged", folder(tmp_path / "v1", V1))
    online.loaded("jxm/damaged")
    (weights,) = online.cache.glob("models--jxm--damaged/snapshots/*/model.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1  # still a whole safetensors file, of another number
    weights.resolve().write_bytes(raw)
    message = online.refused("jxm/damaged")
    assert "is damaged" in message
    assert str(weights.resolve()) in message
    weights.resolve().unlink()
    online.loaded("jxm/damaged")


def test_a_folder_needs_no_hub(hub: HubServer, online: Loader, tmp_path: Path) -> None:
    path = folder(tmp_path / "local", V1, (*WEIGHTS, "tokenizer.json"))
    assert online.loaded(str(path))["spec"]["source"] == str(path)
    assert not hub.requests


def test_messages_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(str(tmp_path))


if __name__ == "__main__":
    _answer_calls()
