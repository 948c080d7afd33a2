"""The Helm chart: linted, rendered, checked against Kubernetes' own schemas, and true to the service."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli.draining import longest_end
from app.domain import Lane
from app.settings_sources import load_settings

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[deploy]'")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "cde-server"
HELM = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
pytestmark = pytest.mark.skipif(HELM is None, reason="no helm here: python tests/deploy/fetch_helm.py .venv/bin/helm")

KUBERNETES = ("1.29", "1.37")
SHARED = {"database.existingSecret": "pg", "persistence.enabled": False}
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "fixed fleet": {**SHARED, "replicas": 3, "hubToken.existingSecret": "hub", "networkPolicy.enabled": True},
    "autoscaled GPUs": {
        **SHARED,
        "autoscaling.enabled": True,
        "gpus": 2,
        "serviceMonitor.enabled": True,
        "ingress.enabled": True,
        "ingress.tlsSecret": "tls",
        "ingress.className": "nginx",
    },
    "CPU alone, weights baked, no keys": {
        **SHARED,
        "autoscaling.enabled": True,
        "autoscaling.queueAgeSeconds": None,
        "config": "",
        "keys.existingSecret": "",
        "allowUnauthenticated": True,
    },
    "one volume for all": {
        **SHARED,
        "replicas": 2,
        "persistence.enabled": True,
        "persistence.accessMode": "ReadWriteMany",
        "persistence.storageClass": "nfs",
    },
}


def helm(*words: str, values: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    assert HELM is not None
    given = [option for key, value in values.items() for option in ("--set-json", f"{key}={json.dumps(value)}")]
    return subprocess.run([HELM, *words, *given], capture_output=True, text=True, timeout=60, check=False)


def rendered(values: dict[str, Any]) -> dict[str, Any]:
    """Every object by its kind; hooks left out."""
    done = helm("template", "release", str(CHART), "--no-hooks", values=values)
    assert done.returncode == 0, done.stderr
    objects = [found for found in yaml.safe_load_all(done.stdout) if found]
    assert len({found["kind"] for found in objects}) == len(objects)
    return {found["kind"]: found for found in objects}


def container(objects: dict[str, Any]) -> dict[str, Any]:
    (only,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_it_lints_and_every_object_follows_its_schema(values: dict[str, Any]) -> None:
    linted = helm("lint", "--strict", str(CHART), values=values)
    assert linted.returncode == 0, linted.stdout
    with_hooks = helm("template", "release", str(CHART), values=values).stdout
    objects = [found for found in yaml.safe_load_all(with_hooks) if found]
    assert len(objects) >= 4
    for found in objects:
        for version in KUBERNETES:
            if found["kind"] != "ServiceMonitor":  # the Prometheus operator's own
                kubernetes_validate.validate(found, version, strict=True)


def test_what_is_there_and_what_is_not() -> None:
    kinds = {name: set(rendered(values)) for name, values in CASES.items()}
    always = {"Deployment", "Service"}
    assert kinds["as it comes"] == always | {"ConfigMap", "PersistentVolumeClaim"}
    assert kinds["fixed fleet"] == always | {"ConfigMap", "PodDisruptionBudget", "NetworkPolicy"}
    scaled = always | {"PodDisruptionBudget", "HorizontalPodAutoscaler"}
    assert kinds["autoscaled GPUs"] == scaled | {"ConfigMap", "ServiceMonitor", "Ingress"}
    assert kinds["CPU alone, weights baked, no keys"] == scaled


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"keys.existingSecret": ""}, "Nothing would check callers"),
        ({"replicas": 2}, "Several replicas need one database"),
        ({"replicas": 2, "database.existingSecret": "pg"}, "Several replicas need one volume"),
        ({"persistence.enabled": False}, "Contexts would be lost"),
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({**SHARED, "autoscaling": {"enabled": True, "queueAgeSeconds": None, "cpuUtilization": None}}, "needs"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    done = helm("template", "release", str(CHART), values=values)
    assert done.returncode != 0
    assert reason in done.stderr


@pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())
def test_the_servers_settings_are_settings(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the mounted files where this machine can have them."""
    objects = rendered(values)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDE__SERVER__HOST", "0.0.0.0")  # as the image sets it
    (tmp_path / "keys.toml").touch()
    for entry in container(objects)["env"]:
        value = entry.get("value", "postgresql://user:password@host/database")
        if value.startswith("/etc/"):
            value = str(tmp_path / Path(value).name)
        monkeypatch.setenv(entry["name"], value)
    if "ConfigMap" in objects:
        (tmp_path / "cde-server.toml").write_text(objects["ConfigMap"]["data"]["cde-server.toml"])
    settings = load_settings()
    assert settings.engine.devices == (("cuda:0", "cuda:1") if values.get("gpus") else ())
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > longest_end(settings.server)
    assert (settings.server.keys_file is None) is bool(values.get("allowUnauthenticated"))
    assert settings.database_url.startswith("postgresql" if "database.existingSecret" in values else "sqlite")


def test_pods_are_locked_down() -> None:
    objects = rendered(CASES["as it comes"])
    pod, server = objects["Deployment"]["spec"]["template"]["spec"], container(objects)
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert server["securityContext"]["readOnlyRootFilesystem"]
    assert server["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_gpus_and_the_image_that_can_use_them() -> None:
    server = container(rendered(CASES["autoscaled GPUs"]))
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert server["image"].endswith("-cuda")


def test_a_new_pod_starts_beside_the_old_one_where_both_can_have_the_store_and_the_volume() -> None:
    rolling = {
        name: "rollingUpdate" in rendered(values)["Deployment"]["spec"]["strategy"] for name, values in CASES.items()
    }
    assert rolling == {name: name != "as it comes" for name in CASES}
    with_claim = {"database.existingSecret": "pg"}
    assert rendered(with_claim)["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


def test_traces_can_be_sent() -> None:
    collector = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}
    rule = {"ports": [{"port": 4318, "protocol": "TCP"}]}
    objects = rendered({"env": [collector], "networkPolicy.enabled": True, "networkPolicy.egress": [rule]})
    assert collector in container(objects)["env"]
    assert rule in objects["NetworkPolicy"]["spec"]["egress"]
    kubernetes_validate.validate(objects["Deployment"], KUBERNETES[0], strict=True)
    kubernetes_validate.validate(objects["NetworkPolicy"], KUBERNETES[0], strict=True)


def test_prometheus_finds_the_job_under_the_name_that_the_alert_rules_have() -> None:
    objects = rendered(CASES["autoscaled GPUs"])
    label = objects["ServiceMonitor"]["spec"]["jobLabel"]
    assert objects["Service"]["metadata"]["labels"][label] == "cde-server"


def test_the_autoscaler_looks_at_the_queue_and_at_the_cpu() -> None:
    metrics = rendered(CASES["autoscaled GPUs"])["HorizontalPodAutoscaler"]["spec"]["metrics"]
    metric = metrics[0]["pods"]["metric"]
    assert metric == {"name": "cde_queue_age_seconds", "selector": {"matchLabels": {"lane": Lane.INTERACTIVE}}}
    assert metrics[0]["pods"]["target"]["averageValue"] == "500m"
    assert metrics[1]["resource"]["name"] == "cpu"


def test_its_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (project, project)
