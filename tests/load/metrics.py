"""What a server says of itself at /metrics, and what passed between two readings."""

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families


class Metrics:
    """One reading. Labels that are not named are summed over; a metric that is not there is 0."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def __call__(self, name: str, **labels: str) -> float:
        return sum(value for given, value in self._samples[name] if labels.items() <= given.items())

    def largest(self, name: str) -> float:
        """Of all label values."""
        return max((value for _, value in self._samples[name]), default=0.0)

    def since(self, before: "Metrics", name: str, **labels: str) -> float:
        """How much a counter grew."""
        return self(name, **labels) - before(name, **labels)

    def mean(self, before: "Metrics", name: str, **labels: str) -> float:
        """Of what a histogram observed since `before`; NaN where that is nothing."""
        number = self.since(before, f"{name}_count", **labels)
        return self.since(before, f"{name}_sum", **labels) / number if number else float("nan")

    def quantile(self, before: "Metrics", q: float, name: str, **labels: str) -> float:
        """Of what a histogram observed since `before`, linear between the bounds of a bucket, as Prometheus reckons."""
        bounds = sorted({given["le"] for given, _ in self._samples[f"{name}_bucket"]}, key=float)
        seen = [self.since(before, f"{name}_bucket", le=bound, **labels) for bound in bounds]
        if not seen or not seen[-1]:
            return float("nan")
        rank, low, below = q * seen[-1], 0.0, 0.0
        for bound, number in zip(map(float, bounds), seen, strict=True):
            if number >= rank:
                return low if bound == float("inf") else low + (bound - low) * (rank - below) / (number - below)
            low, below = bound, number
        return low
