"""The Grafana dashboard and the alert rules ask for metrics that there are, with labels that they have, in PromQL."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "config" / "grafana" / "cde-server.json").read_text(encoding="utf-8"))
GROUPS = yaml.safe_load((ROOT / "config" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
FROM_PROMETHEUS = {"up", "instance", "job", "le"}

Selected = dict[str, set[str]]
"""Labels that are asked for, by metric."""


def listed() -> Selected:
    """The metrics of docs/metrics.md and their labels."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram) \| (.*?) \|", page, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def selected(expression: str) -> Selected:
    """What a query selects. Raises ValueError for one that is no PromQL."""
    plain = expression.replace("$__rate_interval", "5m").replace("$instance", ".*")
    found: Selected = {}

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            family = re.sub(r"_(bucket|sum|count)$", "", node.name or "")
            found.setdefault(family, set()).update(matcher.name for matcher in node.matchers.matchers)
        for part in ("expr", "lhs", "rhs", "vector_selector"):
            if hasattr(node, part):
                walk(getattr(node, part))
        for argument in getattr(node, "args", ()):
            walk(argument)

    walk(promql_parser.parse(plain))
    return found


def grouped(expression: str) -> set[str]:
    """The labels in `by` and `on`."""
    return {label for labels in re.findall(r"\b(?:by|on) \((.*?)\)", expression) for label in labels.split(", ")}


QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]


@pytest.mark.parametrize("expression", QUERIES)
def test_queries_ask_for_metrics_and_labels_that_there_are(expression: str) -> None:
    known, asked = listed(), selected(expression)
    assert asked
    assert set(asked) <= set(known) | FROM_PROMETHEUS
    for metric, labels in asked.items():
        assert labels <= known.get(metric, set()) | FROM_PROMETHEUS, metric
    assert grouped(expression) <= set().union(*(known.get(metric, set()) for metric in asked)) | FROM_PROMETHEUS


def test_what_a_query_selects_is_found() -> None:
    expression = (
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{b="c"}[$__rate_interval]))) > 1 and on (x) (d or -e)'
    )
    assert selected(expression) == {"a": {"b"}, "d": set(), "e": set()}
    assert grouped(expression) == {"le", "x"}
    with pytest.raises(ValueError, match="parenthesis"):
        selected("sum(rate(a)")


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = set().union(*(selected(target["expr"]) for panel in PANELS for target in panel["targets"]))
    unseen = {name for name in listed() if name.startswith("cde_")} - shown
    assert unseen == {"cde_model_info", "cde_queue_jobs"}


def test_panels_have_titles_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_legends_name_labels_that_their_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = grouped(target["expr"]) | FROM_PROMETHEUS
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


def test_alerts_say_how_bad_and_where() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) == 17
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        of_one = "absent(" not in rule["expr"]
        assert ("{{ $labels.instance }}" in rule["annotations"]["summary"]) is of_one
        assert f"`{rule['alert']}`" in page, "what to do"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_rules_fire_on_made_up_series() -> None:
    subprocess.run(["promtool", "check", "rules", "config/alerts.yml"], cwd=ROOT, check=True, timeout=60)
    subprocess.run(["promtool", "test", "rules", "tests/telemetry/alerts.yml"], cwd=ROOT, check=True, timeout=60)
