"""Starting, serving, stopping: what the process promises at each turn, seen from outside."""

from pathlib import Path

import pytest

from app.cli.main import main
from app.errors import SelfCheckError
from app.references import References, write
from app.selfcheck import SECOND, key_of
from tests.compare import assert_same
from tests.live import GOLDENS, V1, live_server
from tests.models.conftest import load_golden


def test_a_model_that_fails_its_self_check_is_never_ready(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with live_server(data_dir):
        pass
    spec = load_golden(V1).model.spec
    folder, key = data_dir / "selfcheck", key_of(spec)
    known = References(folder).find(key, {})
    assert known is not None
    with live_server(data_dir):  # a second start agrees with the first, and leaves its file alone
        again = References(folder).find(key, {})
    assert again is not None
    assert_same(again.arrays[SECOND], known.arrays[SECOND])

    write(known.path, {name: array + 0.01 for name, array in known.arrays.items()}, spec)
    with pytest.raises(SelfCheckError), live_server(data_dir):
        pass
    options = ["--model", str(GOLDENS / V1), "--data-dir", str(data_dir), "--port", "0"]
    monkeypatch.setattr("sys.argv", ["cde-server", "serve", *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    told = [line for line in capfd.readouterr().err.splitlines() if "self-check" in line]
    assert len(told) == 1
    assert told[0].startswith("error: The self-check of v1-tiny-c16 (float32 on cpu) failed")
    assert str(known.path) in told[0]
