"""The benchmark's numbers have their shape, and its load driver counts what it sees."""

import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from app.bench import compute, gpu
from app.bench.bound import best_rate, second_stage_flops
from app.bench.compute import Comparison, Row
from app.bench.gpu import GpuComparison, GpuRow
from app.bench.models import Family, random_checkpoint
from app.cli.bench import _gpu_table, _show, _table
from app.cli.main import app
from app.errors import CheckpointError


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More wait for one another where other tests' servers use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_variants_are_compared_to_the_reference(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "FIRST_STAGE", (4, 32))
    comparison = Comparison(
        random_checkpoint(family, layers=2, corpus_size=64), ["reference", "float32", "int8"], rounds=1
    )
    rows = comparison.second_stage(8)
    assert [row.variant for row in rows] == ["reference", "float32", "int8"]
    reference, exact, rounded = rows
    assert reference.ratio == 1
    assert exact.max_abs_diff is not None
    assert exact.max_abs_diff < 1e-5
    assert rounded.one_minus_cos is not None
    assert 0 < rounded.one_minus_cos < 5e-4
    assert all(row.cpu_ms_per_text > 0 for row in rows)
    assert comparison.first_stage()[1].max_abs_diff is not None


@pytest.mark.usefixtures("one_thread")
def test_variants_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where no graph is recorded."""
    monkeypatch.setattr(gpu, "GEMM_ROWS", 528)  # a GPU's size takes half a minute
    variants = ["reference", "float32", "bfloat16", "bfloat16-no-varlen", "frozen"]
    checkpoint = random_checkpoint("v1", layers=2, corpus_size=64)
    comparison = GpuComparison(checkpoint, variants, device=torch.device("cpu"), rounds=1)
    rows = comparison.second_stage(8, batch=2)
    assert [(row.variant, row.batch) for row in rows] == [(variant, 2) for variant in variants]
    reference, exact, rounded, _, frozen = rows
    assert reference.ratio == 1
    assert exact.max_abs_diff is not None
    assert exact.max_abs_diff < 1e-5
    assert reference.one_minus_cos is not None
    assert rounded.one_minus_cos is not None
    assert rounded.one_minus_cos < reference.one_minus_cos < 1e-4  # which rounds its residual stream, too
    assert rounded.bound_fraction is not None
    assert frozen.bound_fraction is None
    assert all(row.texts_per_second == pytest.approx(1000 / row.ms_per_text) for row in rows)
    few = GpuComparison(
        checkpoint, ["float32", "frozen"], device=torch.device("cpu"), rounds=1
    )  # bfloat16 is slow here
    assert [row.batch for row in few.mixed(batch=1) + few.first_stage(batch=2)] == [1] * 2 + [2] * 2


def test_a_chain_of_products_is_timed_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            launched.append(stream)

        def synchronize(self) -> None:
            launched.append("waited for")

        def elapsed_time(self, _: "Event") -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert gpu._device_seconds(lambda: launched.append("product"), torch.device("cuda:1")) == 0.25
    assert launched == ["stream of cuda:1", *["product"] * gpu.GEMM_CHAIN, "stream of cuda:1", "waited for"]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "gpu", "--random", "v1"])
    assert isinstance(result.exception, CheckpointError)
    assert "sees no CUDA device" in str(result.exception)


def test_the_table_of_a_gpu_fits_a_terminal() -> None:
    row = GpuRow("v1", "bfloat16-no-graphs", "mixed", 256, 123.456, 8.1, 10.25, 1e-5, 1e-5, 0.61)
    console = Console(width=80, record=True)
    console.print(_gpu_table([row, replace(row, model="v1 first stage", bound_fraction=None)]))
    text = console.export_text()
    for shown in ("bfloat16-no-graphs", "mixed", "256", "123.456", "10.25", "1.0e-05", "61%"):
        assert shown in text


def test_operations_of_a_text() -> None:
    """The figures of v1 and v2 by hand: one layer's rows are 2 * 768 * (4 * 768 + 3 * inner) operations."""
    assert second_stage_flops("v1", 8) / 1e9 == pytest.approx(119, rel=0.02)
    assert second_stage_flops("v1", 512) / 1e9 == pytest.approx(261, rel=0.02)
    assert second_stage_flops("v2", 512) / 1e9 == pytest.approx(252, rel=0.03)


def test_the_bound_of_a_precision_is_never_below_a_more_exact_ones() -> None:
    rates = {"float32 plain": 160.0, "float32": 140.0, "bfloat16": 30.0, "int8": 500.0}
    assert [best_rate(rates, v) for v in ("reference", "float32", "bfloat16", "int8")] == [160, 160, 160, 500]


@pytest.mark.parametrize("loop", [["--clients", "3"], ["--rate", "20"]])
def test_load_over_http(server: str, loop: list[str]) -> None:
    options = ["bench", "http", "--model", "v1-tiny-c16", "--seconds", "1", "--texts", "2", "--json"]
    result = CliRunner().invoke(app, [*options, *loop], env={"CDE_URL": f"{server}/v1"})
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["answered"] > 3
    assert report["refused"] == {}
    assert 0 < report["p50_ms"] <= report["p95_ms"] <= report["p99_ms"]
    assert report["texts_per_second"] > 0


def test_refusals_are_counted(server: str) -> None:
    options = ["bench", "http", "--url", server, "--model", "nope", "--seconds", "0.3", "--clients", "1", "--json"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    assert "model_not_found" in result.stderr
    report = json.loads(result.stdout)
    assert report["answered"] == 0
    assert report["refused"][str(int(httpx.codes.NOT_FOUND))] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--random", "v1", "--model", "x"],
        ["--random", "v1", "--variants", "fast"],
        ["gpu", "--device", "cpu"],
        ["gpu", "--random", "v1", "--variants", "int8"],
        ["--model", "builtin/minilm-context"],
        ["http", "--rate", "0"],
        ["http", "--rate", "1", "--clients", "2"],
        ["--random", "v1", "--lengths", "8,x"],
        ["--random", "v1", "--lengths", "0"],
        ["--random", "v1", "--lengths", "513"],
        ["gpu", "--random", "v1", "--batches", "4,"],
        ["--json", "http"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 2


def test_nothing_of_a_table_is_cut_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    row = Row("v1 first stage", "reference", "mixed", 1234.5, 12.34, 1.2e-05, 3.4e-06, 0.85)
    _show({"cpu": "any"}, [row], _table([row]), as_json=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if "1234.5" in line)
    for shown in ("v1 first stage", "mixed", "reference", "12.34", "1.2e-05", "3.4e-06", "85%"):
        assert shown in line
