"""The tables of docs/capacity.md: `python -m tests.capacity` prints them; `--core`, `--a100`, `--h200` are prices.

What is measured comes from docs/benchmarks.md itself; what is a bound, from the operations a text cannot do without.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.bench.bound import CONTEXT_ROWS, WIDTH, second_stage_flops
from app.settings import ContextSettings

BENCHMARKS = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
LENGTHS = (8, 32, 128, 512)

PRICES = {"core": 0.04, "A100": 1.5, "H200": 3.5}
"""Dollars an hour, of one core with its share of memory, or of one GPU with its machine. Assumed."""
PEAK = {"A100": 312e12, "H200": 989e12}
"""Dense bfloat16 operations a second, as the maker gives them."""
SHARE = 0.6
"""Of a GPU's peak, what is aimed at. Not measured."""
HOSTED = 0.008
"""Dollars for a million tokens of a hosted embedding API."""
BUSY = 0.7
"""How much of a replica's time may be used, so that waiting stays short when requests come at random."""

TOKENIZED, SELECTED = 680_000, 580_000
"""Tokens a second of one core, and documents a second of one core through `random`: measured on an Intel Xeon."""
PRECISIONS = ("float32", "bfloat16", "int8", "frozen")


@dataclass(frozen=True, slots=True)
class Device:
    """Something to compute on. `seconds`: of one text of n tokens behind a context."""

    name: str
    price: float
    seconds: Callable[[float], float]

    def dollars(self, n: float) -> float:
        """Of a million tokens, in texts of n."""
        return 1e6 / n * self.seconds(n) * self.price / 3600


def measured_core(precision: str, price: float) -> Device:
    """One core, by the v2 rows of docs/benchmarks.md, straight lines between their lengths."""
    rows = re.findall(rf"^\| v2 \| (\d+) \| {precision} \| (\d+) \|", BENCHMARKS, re.MULTILINE)
    lengths, milliseconds = ([int(row[i]) for row in rows] for i in (0, 1))
    assert lengths == list(LENGTHS)
    return Device(
        f"CPU core, {precision}, measured", price, lambda n: float(np.interp(n, lengths, milliseconds)) / 1000
    )


def bound_gpu(name: str, price: float, share: float) -> Device:
    """A GPU at a share of its peak."""
    label = f"{name}, bound" if share == 1 else f"{name}, {share:.0%} of it"
    return Device(label, price, lambda n: second_stage_flops("v2", round(n)) / (PEAK[name] * share))


def devices(prices: dict[str, float]) -> list[Device]:
    cores = [measured_core(precision, prices["core"]) for precision in PRECISIONS]
    return cores + [bound_gpu(name, prices[name], share) for name in PEAK for share in (1, SHARE)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def short(number: float) -> str:
    """Two digits that count, no exponent."""
    if number == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(number))))
    return f"{round(number, 1 - math.floor(math.log10(abs(number)))):,.{digits}f}"


def cost_table(all_devices: Sequence[Device]) -> str:
    """Texts a second and dollars for a million tokens, by length, and from which length on a hosted price is met."""
    head = ["", *(f"n = {n}" for n in LENGTHS), *(f"$ at {n}" for n in LENGTHS), f"≤ {HOSTED} $ from"]
    rows = []
    for device in all_devices:
        met = next((n for n in range(8, 513) if device.dollars(n) <= HOSTED), None)
        speeds = [short(1 / device.seconds(n)) for n in LENGTHS]
        costs = [short(device.dollars(n)) for n in LENGTHS]
        rows.append([device.name, *speeds, *costs, f"{met} tokens" if met else "never"])
    return table(head, rows)


def replica_table(prices: dict[str, float]) -> str:
    """Replicas for queries of 32 tokens, and for pages of 512."""
    core = measured_core("bfloat16", prices["core"])
    eight = Device("8 cores, bfloat16", 8 * prices["core"], lambda n: core.seconds(n) / 8)
    replicas = [eight, bound_gpu("A100", prices["A100"], SHARE), bound_gpu("H200", prices["H200"], SHARE)]
    loads = [(32, rate) for rate in (1, 10, 100, 1000)] + [(512, rate) for rate in (10, 1000)]
    head = ["a replica", *(f"{rate} a second of {n}" for n, rate in loads), "$ a month at 100 of 32"]
    rows = []
    for replica in replicas:
        needed = [math.ceil(rate * replica.seconds(n) / BUSY) for n, rate in loads]
        month = needed[2] * replica.price * 730
        rows.append([replica.name, *(f"{count:,}" for count in needed), f"{month:,.0f}"])
    return table(head, rows)


def memory_table() -> str:
    """One context, and how many of them a default cache holds."""
    row = WIDTH * 4
    sizes = {
        "stored, and in the cache of arrays": 512 * row,
        "ready on the device, exact, float32": CONTEXT_ROWS * 4 * row,  # the row, and its first query, key and value
        "ready on the device, frozen, v1, float32": CONTEXT_ROWS * 12 * 2 * row,  # every layer's keys and values
        "ready on the device, frozen, v2, float32": CONTEXT_ROWS * 22 * 2 * row,
    }
    cache = ContextSettings().cache_bytes
    rows = [[name, f"{short(size / 1e6)} MB", str(cache // size)] for name, size in sizes.items()]
    return table(["a context", "size", f"in {cache // 2**20} MiB"], rows)


def corpus_lengths(texts: int = 100_000) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Tokens of simulated documents: log-normal around a median of 120, cut at 512."""
    drawn = np.random.default_rng(0).lognormal(math.log(120), 0.8, texts)
    return np.clip(np.round(drawn), 8, 512)


def growth_table(prices: dict[str, float]) -> str:
    """A corpus embedded once, by size."""
    lengths = corpus_lengths()
    distinct, counts = np.unique(lengths, return_counts=True)
    core, gpu = measured_core("bfloat16", prices["core"]), bound_gpu("H200", prices["H200"], SHARE)
    means = [float(np.average([device.seconds(n) for n in distinct], weights=counts)) / 3600 for device in (core, gpu)]
    tokens = float(lengths.mean())
    head = ["texts", "tokens", "core-hours", "$", "H200-hours", "$", "to tokenize", "to select", "vectors"]
    rows = []
    for texts in (10**6, 10**8, 10**9):
        cores, gpus = (texts * hours for hours in means)
        rows.append(
            [
                f"{texts:,}",
                f"{short(texts * tokens / 1e9)} G",
                f"{cores:,.0f}",
                f"{cores * prices['core']:,.0f}",
                short(gpus),
                short(gpus * prices["H200"]),
                short(texts * tokens / TOKENIZED / 3600) + " h",
                short(texts / SELECTED / 3600) + " h",
                f"{short(texts * WIDTH * 4 / 1e12)} TB",
            ]
        )
    return table(head, rows)


def tables(prices: dict[str, float]) -> list[str]:
    return [cost_table(devices(prices)), replica_table(prices), memory_table(), growth_table(prices)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, price in PRICES.items():
        parser.add_argument(f"--{name.lower()}", type=float, default=price, help="dollars an hour")
    given = vars(parser.parse_args())
    sys.stdout.write("\n\n".join(tables({name: given[name.lower()] for name in PRICES})) + "\n")


if __name__ == "__main__":
    main()
