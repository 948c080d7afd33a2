"""Tables of README and docs/metrics.md and the OpenAPI page, made from the code, printed by
`python -m tests.docs [openapi|metrics]`."""

import asyncio
import json
import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import httpx
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.api.openai_errors import FRAMEWORK, INVALID, TABLE
from app.engine import metrics as engine_metrics
from app.main import create_app
from app.settings import ModelSettings, Settings
from app.telemetry import metrics


def settings_rows() -> list[str]:
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            rows += [_row(f"{name}.{part}", inner) for part, inner in type(default).model_fields.items()]
        elif name == "models":
            rows += [_row(f"models[].{part}", inner) for part, inner in ModelSettings.model_fields.items()]
        else:
            rows.append(_row(name, field))
    return rows


def _row(name: str, field: FieldInfo) -> str:
    default = field.default
    shown = (
        ""
        if default is None or default == ()
        else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    )
    return f"| `{name}` | {shown} | {field.description} |"


def error_rows() -> list[str]:
    """One row a status and code, with the first lines of all classes that have them."""
    rows: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for cls, (status, kind, code) in TABLE.items():
        rows[status, code or "", kind].append((cls.__doc__ or "").splitlines()[0])
    for status, (framework_code, when) in FRAMEWORK.items():
        rows[status, framework_code, INVALID].append(when)
    lines = [f"| {s} | `{k}` | {f'`{c}`' if c else 'null'} | {' '.join(rows[s, c, k])} |" for s, c, k in sorted(rows)]
    return ["| status | type | code | when |", "|---|---|---|---|", *lines]


def metric_rows(module: ModuleType = metrics) -> list[str]:
    """One row for each metric of app/telemetry/metrics.py, or of the engine's module, in its order."""
    rows = ["| metric | type | labels | |", "|---|---|---|---|"]
    for metric in vars(module).values():
        if isinstance(metric, MetricWrapperBase):
            name = f"{metric._name}_total" if metric._type == "counter" else metric._name
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            rows.append(f"| `{name}` | {metric._type} | {labels} | {metric._documentation} |")
    return rows


def openapi_page() -> str:
    """/openapi.json as it is committed."""

    async def page() -> Any:
        transport = httpx.ASGITransport(app=create_app(Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.get("/openapi.json")).json()

    return json.dumps(asyncio.run(page()), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    tables = "\n".join([*settings_rows(), "", *error_rows(), ""])
    pages = {
        "openapi": openapi_page,
        "metrics": lambda: "\n".join([*metric_rows(), "", *metric_rows(engine_metrics), ""]),
    }
    sys.stdout.write(pages[sys.argv[1]]() if sys.argv[1:] else tables)
