"""docker-compose.yml: whole, locked down, and true to the service, as far as that shows without a Docker engine."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli.draining import longest_end
from app.settings import LimitSettings, ServerSettings
from app.settings_sources import load_settings

compose_spec = pytest.importorskip("compose_spec", reason="pip install -e '.[deploy]'")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
SERVERS = ("server", "cpu", "gpu")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """As Compose reads it where nothing is set in the environment."""
    parsed = yaml.safe_load(FILE.read_text())
    return {key: _interpolated(value) for key, value in parsed.items() if not key.startswith("x-")}


@pytest.fixture
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def _interpolated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_interpolated(inner) for inner in value]
    if not isinstance(value, str):
        return value
    given = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    return int(given) if given.isdigit() else given


def test_it_follows_the_compose_specification(compose: dict[str, Any]) -> None:
    assert "${" not in str(compose)
    read = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose))
    read.validate()
    assert set(read.to_spec().services or {}) >= {*SERVERS, "gateway", "postgres"}


def test_nothing_but_limits_of_cpu_and_digests_is_left_to_whoever_runs_it() -> None:
    command = [str(Path(sys.executable).with_name("compose-lint")), "check", "--format", "json", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    findings = json.loads(done.stdout)["findings"]
    left = {"CL-0019", "CL-0026"}
    assert [f for f in findings if f["rule_id"] not in left and not f.get("suppressed")] == []


def test_up_alone_is_one_server_that_needs_nothing_else(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "profiles" not in service] == ["server"]
    assert "depends_on" not in services["server"]


def test_ports_are_open_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) > 5
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_what_services_name_is_there(compose: dict[str, Any], services: dict[str, Any]) -> None:
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        volumes = {mount.split(":")[0] for mount in service.get("volumes", []) if not mount.startswith("./")}
        assert volumes <= set(compose["volumes"])


def test_every_mounted_file_is_there(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", []) if mount.startswith("./")]
    sources = {mount.split(":")[0].removeprefix("./") for mount in mounts}
    assert len(sources) > 4
    assert [source for source in sources if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_settings_are_settings(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDE__SERVER__HOST", "0.0.0.0")  # as the image sets it
    for variable, value in services[name]["environment"].items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    assert settings.database_url.startswith("sqlite" if name == "server" else "postgresql")


def test_replicas_end_before_docker_ends_them(services: dict[str, Any]) -> None:
    server = ServerSettings(host="0.0.0.0", allow_unauthenticated=True)
    for name in SERVERS:
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > longest_end(server)


def test_the_gateway_knows_the_services_limits() -> None:
    nginx = {path.name: path.read_text() for path in (ROOT / "config" / "nginx").glob("*.conf")}
    (body,) = re.findall(r"client_max_body_size (\d+)m;", nginx["locations.conf"])
    assert int(body) * 2**20 == LimitSettings().max_body_bytes
    (idle,) = re.findall(r"keepalive_timeout (\d+)s;", nginx["upstream.conf"])
    assert int(idle) < LimitSettings().idle_seconds


def test_gateway_and_prometheus_ask_the_names_that_replicas_have(services: dict[str, Any]) -> None:
    names = {alias for name in SERVERS for alias in _aliases(services[name])} | {"server"}
    (upstream,) = re.findall(r"server (\w+):8000", (ROOT / "config/nginx/upstream.conf").read_text())
    assert upstream in names
    (job,) = yaml.safe_load((ROOT / "config/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert set(job["dns_sd_configs"][0]["names"]) == names
    assert f'job="{job["job_name"]}"' in (ROOT / "config/alerts.yml").read_text()


def _aliases(service: dict[str, Any]) -> list[str]:
    networks = service["networks"]
    return [] if isinstance(networks, list) else networks["front"]["aliases"]
