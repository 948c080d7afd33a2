"""A Ray cluster of this process's own, for the tests that want one."""

import os
import tempfile
from collections.abc import Iterator

import pytest

CORES = 2

# Before Ray is imported: nothing is told to anybody, nothing is left in the home folder, no other cluster is joined.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ADDRESS"] = "local"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Two cores, each a worker process at most."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    # Unix sockets are in it, whose paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=CORES,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
