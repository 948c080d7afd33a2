"""The images, built from the Dockerfile and run as they are meant to be: `python -m tests.deploy.image`.

Wants Docker or Podman. Where the base image cannot be had, `--stand-in` makes one with debootstrap (Debian's Python in
the place of the official image's); `--engine` and `--build-options` carry what an unusual machine needs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hub_server import HubServer
from tests.live import GOLDENS, V1

ROOT = Path(__file__).parents[2]
STAND_IN = "localhost/python-stand-in"
TAG = "localhost/cde-server-under-test"
REPO = "tiny/cde"
SECRET = "hf_a_token_that_must_stay_out_of_the_image"
READY_SECONDS = 120
GZIP = b"\x1f\x8b"

ASK = """
import json, sys, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:8000" + sys.argv[1], sys.argv[2].encode() or None)
request.add_header("Content-Type", "application/json")
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(answer.read().decode())
except urllib.error.URLError:
    sys.exit(1)
"""


class Engine:
    """Docker's command line, or one like it."""

    def __init__(self, command: str, build_options: str) -> None:
        self._command, self._build_options = shlex.split(command), shlex.split(build_options)

    def run(self, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run([*self._command, *words], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def build(self, target: str, tag: str, *options: str) -> None:
        self.run("build", "--target", target, "-t", tag, *self._build_options, *options, str(ROOT))

    def refused_build(self, target: str, reason: str, *options: str) -> bool:
        """Whether the build fails, which must be for that reason."""
        words = ("build", "--target", target, *self._build_options, *options, str(ROOT))
        done = self.run(*words, check=False)
        assert done.returncode == 0 or reason in done.stdout + done.stderr, (done.stdout + done.stderr)[-3000:]
        return done.returncode != 0

    def bytes_of(self, tag: str) -> Iterator[bytes]:
        """Everything in the image, every layer and its description, unpacked."""
        with (
            subprocess.Popen([*self._command, "save", tag], stdout=subprocess.PIPE) as saving,
            tarfile.open(fileobj=saving.stdout, mode="r|") as archive,
        ):
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                unpack: Callable[[bytes], bytes] | None = None
                while content is not None and (block := content.read(1 << 24)):
                    unpack = unpack or (zlib.decompressobj(31).decompress if block.startswith(GZIP) else bytes)
                    yield unpack(block)

    @contextmanager
    def container(self, tag: str) -> Iterator["Container"]:
        """As the compose file and the chart run it: no network but loopback, nothing writable but /data and /tmp."""
        locked = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
        open_to_all = ("--env", "CDE__SERVER__ALLOW_UNAUTHENTICATED=true")
        name = self.run("run", "--detach", "--network", "none", *locked, *open_to_all, tag).stdout.strip()
        try:
            yield Container(self, name)
        finally:
            self.run("rm", "--force", "--volumes", name)


class Container:
    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name

    def execute(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self._engine.run("exec", self._name, *words, check=False)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON; None where there was none, or an error."""
        done = self.execute("python", "-c", ASK, path, json.dumps(body) if body else "")
        return json.loads(done.stdout) if done.returncode == 0 else None

    def wait_ready(self) -> float:
        """The seconds it took."""
        begun = time.monotonic()
        while self.ask("/ready") is None:
            if time.monotonic() > begun + READY_SECONDS:
                raise AssertionError(self._engine.run("logs", self._name).stderr[-3000:])
            time.sleep(0.2)
        return time.monotonic() - begun

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._engine.run("stop", "--time", "60", self._name)
        return int(self._engine.run("inspect", "--format", "{{.State.ExitCode}}", self._name).stdout)


def check_image(engine: Engine, tag: str, model: str, dimensions: int) -> None:
    """Ready, right, locked down, and gone when told to."""
    with engine.container(tag) as container:
        seconds = container.wait_ready()
        for texts in (["The fox sleeps in the barn."], [[791, 39935, 74264]]):  # as text, and as cl100k_base's ids
            answer = container.ask("/v1/embeddings", {"model": model, "input": texts})
            assert answer is not None, "no embedding"
            assert len(answer["data"][0]["embedding"]) == dimensions
        image = json.loads(engine.run("image", "inspect", tag).stdout)[0]
        health = image.get("Healthcheck") or image["Config"]["Healthcheck"]  # Podman's place, and Docker's
        assert container.execute(*health["Test"][1:]).returncode == 0, "the HEALTHCHECK fails on a ready server"
        assert container.execute("id", "-u").stdout.strip() == "10001"
        assert container.execute("touch", "/opt/venv/x").returncode != 0
        assert container.execute("python", "-m", "pip", "--version").returncode != 0
        assert container.stop() == 0
    size = int(image["Size"]) / 2**20
    sys.stdout.write(f"{tag}: {size:.0f} MiB, ready in {seconds:.1f} s, {model} answers with {dimensions} numbers\n")


def check_baked(engine: Engine, base: list[str]) -> None:
    """Weights of one commit, served without a network; the token that fetched them is nowhere in the image."""
    with HubServer() as hub, tempfile.NamedTemporaryFile("w") as token:
        token.write(SECRET)
        token.flush()
        commit = hub.add(REPO, GOLDENS / V1)
        named = ("--build-arg", f"MODEL={REPO}", "--build-arg", f"HF_ENDPOINT={hub.endpoint}")
        secret = ("--secret", f"id=hf_token,src={token.name}")
        assert engine.refused_build("cpu", "REVISION must be the commit", *base, *named, "--build-arg", "REVISION=main")
        engine.build("cpu", f"{TAG}:baked", *base, *named, *secret, "--build-arg", f"REVISION={commit}")
    tail, size = b"", 0
    for block in engine.bytes_of(f"{TAG}:baked"):
        assert SECRET.encode() not in tail + block, "the token is in the image"
        tail, size = block[-len(SECRET) :], size + len(block)
    assert size > 1 << 30, "that was not the whole image"
    check_image(engine, f"{TAG}:baked", REPO, 64)


def make_stand_in(engine: Engine) -> None:
    """Debian's own Python under the name that the official image gives it."""
    packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        made = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        archive = Path(folder) / "root.tar"
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
        engine.run("import", str(archive), STAND_IN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="docker", help="docker, podman, or either with options of its own")
    parser.add_argument("--build-options", default="", help="options for `build`, such as --build-arg TORCH_INDEX=URL")
    parser.add_argument("--stand-in", action="store_true", help="make the base image with debootstrap")
    given = parser.parse_args()
    engine = Engine(given.engine, given.build_options)
    base = ["--build-arg", f"PYTHON_IMAGE={STAND_IN}"] if given.stand_in else []
    if given.stand_in and engine.run("image", "inspect", STAND_IN, check=False).returncode:
        make_stand_in(engine)
    engine.build("cpu", f"{TAG}:cpu", *base)
    check_image(engine, f"{TAG}:cpu", "minilm-context", 384)
    check_baked(engine, base)
    refused = engine.refused_build("cuda", "AssertionError: This torch has no CUDA", *base)
    sys.stdout.write(f"target cuda: {'refused, as this torch has no CUDA' if refused else 'built'}\n")


if __name__ == "__main__":
    main()
