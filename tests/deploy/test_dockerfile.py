"""The Dockerfile as text; `make test-image` builds it and runs what comes of it."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from config.weights import main as bake

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here: pip install -e '.[deploy]'")
def test_hadolint_has_nothing_to_say() -> None:
    hadolint = str(HADOLINT)
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_its_versions_are_the_projects() -> None:
    assert f'image.version="{PROJECT["version"]}"' in TEXT
    assert re.findall(r"torch==[\d.]+", TEXT) == [d for d in PROJECT["dependencies"] if d.startswith("torch==")]


def test_what_it_copies_is_let_in() -> None:
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE) for word in line.split()]
    assert len(copied) > 5
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch(source.split("/")[0], pattern) for pattern in allowed)


def test_what_runs_is_not_root_and_says_when_it_is_ready() -> None:
    runtime = TEXT.split(" AS runtime\n")[1]
    for stage in re.split(r"^FROM ", runtime, flags=re.MULTILINE):
        users = re.findall(r"^USER (\d+):\d+$", stage, re.MULTILINE)
        assert all(int(user) > 0 for user in users[-1:])
    assert re.search(r"^USER [1-9]", runtime, re.MULTILINE)
    assert "/ready" in runtime.split("HEALTHCHECK")[1].split("ENTRYPOINT")[0]


def test_weights_are_baked_at_a_commit_only(tmp_path: Path) -> None:
    bake(tmp_path, "", "")
    assert (tmp_path / "cde-server.toml").read_text() == ""
    with pytest.raises(SystemExit, match="40 hexadecimal digits, not 'main'"):
        bake(tmp_path, "jxm/cde-small-v2", "main")
