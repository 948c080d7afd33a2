"""The short life of a fleet; `python -m tests.deploy.twin` is the long one, with a rolling restart and a table."""

from pathlib import Path

from tests.deploy.gateway import needs_nginx
from tests.deploy.twin import KEY, PASSWORD, TEXTS, live, started_twin
from tests.postgres import new_database


@needs_nginx
def test_a_fleet_loses_nothing(postgres: str, tmp_path: Path) -> None:
    with started_twin(tmp_path, new_database(postgres)) as twin:
        shares = live(twin, seconds=7, roll=False)
        assert twin.check_vectors() > 100
        logs = twin.logs()
    assert twin.load.failures == []
    assert len(twin.load.answers) == twin.load.sent
    assert len(shares) == 3
    assert min(shares.values()) > sum(shares.values()) / 12, "the least busy is asked first, so a slow one gets less"
    assert len(logs) > 1000
    assert [secret for secret in (KEY, PASSWORD, *TEXTS) if secret in logs] == []
