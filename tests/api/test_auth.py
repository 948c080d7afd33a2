"""Keys: who may do what, and a keys file that changes while the server runs."""

import hashlib
import os
from pathlib import Path

import httpx
import openai
import pytest

from app.api.auth import Keyring
from app.errors import ConfigError
from tests.live import V1, live_server


def entry(name: str, secret: str, *scopes: str) -> str:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = {list(scopes)}\n'


def auth(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_keys_and_scopes(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        entry("reader", "k-reader", "embed", "contexts:read") + entry("writer", "k-writer", "contexts:write")
    )
    with live_server(tmp_path / "data", server={"keys_file": file}) as url, httpx.Client(base_url=url) as http:
        body = {"model": V1, "input": "x"}
        for given in (b"", b"Bearer wrong", b"Basic k-reader", b"Bearer", b"Bearer caf\xc3\xa9", b"k-reader"):
            response = http.post("/v1/embeddings", json=body, headers={b"Authorization": given})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert "k-reader" not in response.text
            assert ("Authorization header is not as expected" in response.text) == (
                given in (b"Basic k-reader", b"Bearer", b"k-reader")
            )
        assert http.post("/v1/embeddings", json=body, headers=auth("k-reader")).is_success
        assert http.get("/v1/models", headers=auth("k-writer")).is_success
        assert http.get("/v1/contexts", headers=auth("k-reader")).is_success
        for method, path, secret in (
            ("POST", "/v1/embeddings", "k-writer"),
            ("GET", "/v1/contexts", "k-writer"),
            ("POST", "/v1/contexts", "k-reader"),
            ("DELETE", "/v1/contexts/default", "k-reader"),
            ("PUT", "/v1/contexts/x/embeddings", "k-reader"),
        ):
            response = http.request(method, path, headers=auth(secret), json=body if method == "POST" else None)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "insufficient_scope")
        for path in ("/health", "/ready", "/metrics"):
            assert http.get(path).is_success
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.embeddings.create(model=V1, input="x")


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "one"))
    keyring = Keyring(file)
    assert keyring.find("one")
    file.write_text(entry("b", "two") + "# longer\n")
    assert keyring.find("one") is None
    found = keyring.find("two")
    assert found is not None
    assert found.name == "b"
    file.write_text("rubbish = [")
    os.utime(file, ns=(1, 1))
    assert keyring.find("two"), "a broken file leaves the keys as they were"


def test_a_file_of_the_same_size_and_time_is_another_one(tmp_path: Path) -> None:
    """As some tools put it there: the key that is gone must not go on working."""
    file, other = tmp_path / "keys.toml", tmp_path / "new.toml"
    file.write_text(entry("a", "one"))
    keyring = Keyring(file)
    other.write_text(entry("a", "two"))
    before = file.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert keyring.find("one") is None
    assert keyring.find("two")


def test_a_digest_in_capitals_and_an_editors_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"one").hexdigest()
    file.write_text("\ufeff" + entry("a", "one").replace(digest, digest.upper()), encoding="utf-8")
    assert Keyring(file).find("one")


def test_one_key_has_one_set_of_rights(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("old", "one") + entry("old", "two"))
    assert Keyring(file).find("two"), "a key and its successor may have one name"
    file.write_text(entry("a", "one") + entry("b", "one", "embed"))
    with pytest.raises(ConfigError, match="a, b are the same key"):
        Keyring(file)


@pytest.mark.parametrize(
    "content", ["", "keys = 3", '[[keys]]\nname = "a"\nsha256 = "short"\n', "[[", "a = " + "[" * 100_000]
)
def test_a_bad_file_stops_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        Keyring(file)
