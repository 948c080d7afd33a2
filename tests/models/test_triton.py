"""Triton's kernels between the products: interpreted, operation by operation, for what they compute; and compiled for
GPUs that are not here, as far as machine code."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from app.domain import DATASET_EMBEDDINGS, InputType
from app.models import pointwise
from app.models.attention import rotations
from app.models.contextual import ContextualModel
from app.models.kernels import Kernels
from app.models.trials import pointwise_is_right
from tests.models.conftest import load_golden, tokenized

pytest.importorskip("triton", reason="triton has no build for this platform")

CPU = torch.device("cpu")
IN_TRITON = Kernels(pointwise="triton")
DTYPES = (torch.float32, torch.bfloat16)
ONE_INTERPRETER = threading.Lock()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels, one at a time: Triton's interpreter is not for several threads."""
    kernels = pointwise.triton_kernels()

    def alone(run: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any, **options: Any) -> Any:
            with ONE_INTERPRETER:
                return run(*args, **options)

        return locked

    for name in ("gate", "add_norm", "rotate"):
        monkeypatch.setattr(kernels, name, alone(getattr(kernels, name)))
    return kernels


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Within an ulp: interpreted kernels cut bfloat16 off, where compiled ones round."""
    relative = 2**-7 if got.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), expected, rtol=relative, atol=1e-6)


shapes = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@shapes
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(DTYPES), st.sampled_from(["silu", "gelu"]))
def test_gates(interpreted: ModuleType, rows: int, inner: int, dtype: torch.dtype, activation: str) -> None:
    activated, gate = torch.randn(2, rows, inner).to(dtype)
    expected = getattr(F, activation)(activated.float()) * gate.float()
    before = activated.clone()
    assert_close(interpreted.gate(activated, gate, activation), expected)
    assert torch.equal(activated, before)


@shapes
@given(
    rows=st.integers(1, 9),
    width=st.integers(2, 300),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    post=st.booleans(),
)
def test_sums_and_norms(
    interpreted: ModuleType, *, rows: int, width: int, dtype: torch.dtype, bias: bool, post: bool
) -> None:
    norm = nn.LayerNorm(width, eps=1e-5, bias=bias).requires_grad_(requires_grad=False)
    for parameter in norm.parameters():
        parameter.normal_()
    x, plus = torch.randn(rows, width) + 3, torch.randn(rows, width).to(dtype)
    before = x.clone()
    stream, rows_ = interpreted.add_norm(x, plus, norm, post=post)
    normed = norm(x + plus.float())
    torch.testing.assert_close(stream, normed if post else x + plus.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows_.float(), normed, rtol=2**-7, atol=1e-4)
    assert rows_.dtype is dtype
    assert torch.equal(x, before)  # a context's rows are used again


@shapes
@given(
    rows=st.integers(1, 40),
    heads=st.integers(1, 5),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    both=st.booleans(),
)
def test_rotations(
    interpreted: ModuleType, *, rows: int, heads: int, half: int, dtype: torch.dtype, both: bool
) -> None:
    """Queries and keys of one product, or keys alone; values beside them stay."""
    product = torch.randn(rows, 3 if both else 2, heads, 2 * half).to(dtype)
    turns = rotations(2 * half, 1000.0, 40, 3, CPU)[torch.arange(rows)]
    x, turns = (product[:, :2], turns) if both else (product[:, :1], turns[:, 1:])
    turned = torch.complex(*x.float().chunk(2, dim=-1)) * turns
    values = product[:, -1].clone()
    assert_close(interpreted.rotate(x, turns), torch.cat((turned.real, turned.imag), dim=-1))
    assert torch.equal(product[:, -1], values)


def both_stages(model: ContextualModel, texts: list[Any]) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(0).standard_normal((model.spec.corpus_size, model.spec.hidden_size))
    context = model.load_context({DATASET_EMBEDDINGS: noise.astype(np.float32)})
    with torch.inference_mode():
        second = model.second_stage(texts, [context] * len(texts))
        return torch.cat((model.first_stage(texts, [{}] * len(texts)), second)).numpy()


@pytest.mark.parametrize("attention", ["exact", "frozen"])
@pytest.mark.parametrize("name", ["v1-tiny-c16", "v2-tiny-c16"])
def test_a_model_gives_the_same_vectors(name: str, attention: str) -> None:
    vectors = []
    for kernels in (Kernels(), IN_TRITON):
        loaded = load_golden(name, kernels=kernels, context_attention=attention)
        assert isinstance(loaded.model, ContextualModel)
        texts = tokenized(loaded, ["a", "three more words"], InputType.NONE)
        vectors.append(both_stages(loaded.model, texts))
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=2e-6 * np.abs(vectors[0]).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_ones_pass_the_trial(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert pointwise_is_right(Kernels(compute=dtype, pointwise="triton"), CPU)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("gate", lambda run: lambda a, g, _: run(a, g, "gelu")),
        ("add_norm", lambda run: lambda *given, **_: run(*given, post=False)),
        ("rotate", lambda run: lambda x, turns: run(x, turns.conj().resolve_conj())),
    ],
)
def test_a_wrong_one_does_not(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, spoilt: Any
) -> None:
    monkeypatch.setattr(interpreted, name, spoilt(getattr(interpreted, name)))
    assert not pointwise_is_right(IN_TRITON, CPU)
    assert "is not right" in caplog.text


def test_without_a_compiler_plain_operations_do(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(interpreted, "gate", fails)
    assert not pointwise_is_right(IN_TRITON, CPU)
    assert "does not run on cpu, another is used: RuntimeError: Failed to find C compiler" in caplog.text


COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from app.models import triton_kernels as ours

KERNELS = {
    ours._gate: ({"activated": "T", "gate": "T", "count": "i32"}, {"gelu": True, "block": 1024}),
    ours._add_norm: (
        {"x": "*fp32", "plus": "T", "weight": "*fp32", "bias": "*fp32", "stream": "*fp32", "rows": "T"}
        | {"columns": "i32", "eps": "fp32"},
        {"biased": True, "post": True, "block": 1024},
    ),
    ours._rotate: (
        {"x": "T", "turns": "*fp32", "x_stride": "i32", "turns_stride": "i32", "pairs": "i32", "heads": "i32"},
        {"half": 32, "block": 1024},
    ),
}
for capability in map(int, sys.argv[1:]):
    for kernel, (given, fixed) in KERNELS.items():
        # Addresses and strides are multiples of 16 here, which Triton finds out by itself where it launches.
        even = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in given if n not in ("eps", "heads")}
        for dtype in ("*bf16", "*fp32"):
            signature = {n: dtype if t == "T" else t for n, t in given.items()} | dict.fromkeys(fixed, "constexpr")
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=even)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            stores = [line for line in made.asm["ptx"].splitlines() if "st.global" in line]
            print(capability, kernel.__name__, dtype, len(made.asm["cubin"]), all(".v4." in line for line in stores))
"""


def test_they_compile_for_gpus_from_ampere_to_blackwell(tmp_path: Path) -> None:
    """To machine code, which stores 16 bytes at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED, "80", "90", "100", "120"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert len(lines) == 4 * 3 * 2
    for *_, size, wide in lines:
        assert int(size) > 0
        assert wide == "True"
