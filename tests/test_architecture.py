"""Imports run one way, modules stay small, and one of them reads the environment."""

import ast
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "app"
MODULES = sorted(p for p in APP.rglob("*.py") if "migrations" not in p.parts)

# What needs a package that is not everywhere, and must not be imported before it is to run.
OPTIONAL = {"models.triton_kernels"}

# Each room sees the ones before it in its list, never one behind.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "domain": set(),
    "telemetry": {"telemetry", "errors"},
    "vectors": {"domain"},
    "machine": set(),
    "settings": {"machine"},
    "settings_sources": {"errors", "settings"},
    "json_text": set(),
    "tokenization": {"domain", "errors", "json_text"},
    "selection": {"domain", "json_text", "vectors"},
    "payloads": {"domain"},
    "corpora": {"json_text"},
    "token_ids": set(),
    "tokenizer_threads": set(),
    "models": {"models", "domain", "errors", "machine", "tokenization"},
    "engine": {"engine", "domain", "errors", "telemetry", "models.base", "models.device"},
    "stores": {"stores", "domain", "errors", "payloads", "telemetry"},
    "context_refs": {"domain", "errors"},
    "registry": {"domain", "errors", "models.base", "tokenization"},
    "building": {
        "domain",
        "errors",
        "payloads",
        "registry",
        "selection",
        "engine",
        "telemetry",
        "tokenizer_threads",
    },
    "builds": {"building", "domain", "errors", "registry", "stores.base", "stores.threads", "telemetry"},
    "names": {"domain", "errors", "stores.base", "stores.errors", "stores.threads", "telemetry"},
    "contexts": {
        "building",
        "domain",
        "errors",
        "names",
        "registry",
        "selection",
        "stores.base",
        "stores.errors",
        "stores.threads",
        "telemetry",
    },
    "catalog": {
        "building",
        "builds",
        "context_refs",
        "contexts",
        "domain",
        "errors",
        "payloads",
        "registry",
        "selection",
        "models.base",
        "stores.base",
        "stores.threads",
    },
    "vector_cache": {"domain", "engine", "errors", "registry", "telemetry"},
    "embed_request": {"domain", "errors", "registry"},
    "service": {
        "building",
        "embed_request",
        "context_refs",
        "contexts",
        "domain",
        "errors",
        "registry",
        "telemetry",
        "token_ids",
        "tokenization",
        "tokenizer_threads",
        "vector_cache",
        "vectors",
    },
    "batches": {
        "batches",
        "domain",
        "errors",
        "json_text",
        "stores.batch_base",
        "stores.batches",
        "stores.errors",
        "stores.files",
        "stores.threads",
        "telemetry",
    },
    "references": {"domain"},
    "selfcheck": {"domain", "engine", "errors", "models.base", "references", "registry", "vectors"},
    "compatibility": {"embed_request", "errors", "service", "vectors"},
    "offline": {
        "building",
        "catalog",
        "domain",
        "errors",
        "payloads",
        "registry",
        "selection",
        "settings",
        "engine",
        "models",
        "tokenizer_threads",
    },
    "embedding_files": {"corpora", "domain"},
    "agreement": {"domain", "models", "offline", "vectors"},
    "evaluation": {"corpora", "domain", "offline", "vectors"},
    "goldens": {"domain", "errors", "models", "offline", "vectors"},
    "verification": {
        "verification",
        "domain",
        "errors",
        "models",
        "offline",
        "references",
        "selection",
        "selfcheck",
        "vectors",
    },
    "bench": {"bench", "domain", "errors", "models"},
    "api": {
        "api",
        "batches",
        "catalog",
        "compatibility",
        "context_refs",
        "contexts",
        "domain",
        "embed_request",
        "errors",
        "json_text",
        "payloads",
        "registry",
        "selection",
        "service",
        "settings",
        "stores.base",
        "stores.batch_base",
        "telemetry",
    },
    "serving": {"api.protocol", "settings"},
    "scale": {
        "corpora",
        "domain",
        "errors",
        "main",
        "models.loading",
        "offline",
        "scale",
        "settings",
        "settings_sources",
        "telemetry",
        "vectors",
    },
}
ANYTHING = {"main", "lifecycle", "preflight", "assembly", "cli", "__init__"}


def _room(path: Path) -> str:
    return path.relative_to(APP).with_suffix("").parts[0]


def _imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, module below app, whether inside a function) of each import of our own."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "app":
            modules = [node.module or ""] if node.module != "app" else [f"app.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "app"]
        else:
            continue
        found += [(node.lineno, module.removeprefix("app."), id(node) not in top) for module in modules]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(APP)))
def test_imports_run_one_way(path: Path) -> None:
    room = _room(path)
    for line, module, local in _imports(path):
        assert not local or module in OPTIONAL, f"{path}:{line} imports {module} inside a function"
        if room not in ANYTHING:
            parts = module.split(".")
            names = {".".join(parts[: i + 1]) for i in range(len(parts))}
            assert names & ALLOWED[room], f"{path}:{line}: {room} may not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(APP)))
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_one_module_reads_the_environment() -> None:
    """Another one sets what oneDNN reads there."""
    told = {p.name: p.read_text().replace("os.environ.setdefault(", "") for p in MODULES}
    assert [name for name, text in told.items() if "os.environ" in text or "getenv" in text] == ["settings_sources.py"]
