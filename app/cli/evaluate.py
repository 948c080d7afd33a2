"""`cde-server eval` and `agreement`: what a model is worth, what an approximation costs."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.table import Table

from app.agreement import measure
from app.cli.embed import context_payload
from app.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    SemanticsOption,
    progress,
    wide_console,
)
from app.corpora import BadCorpus, read_beir, read_records
from app.domain import InputType
from app.evaluation import Score
from app.evaluation import evaluate as evaluate_collection
from app.models.loading import LoadOptions
from app.offline import Offline


def evaluate(
    folder: Annotated[Path, typer.Argument(help="BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv")],
    *,
    model: ModelOption,
    seeds: Annotated[int, typer.Option(min=1, help="Own contexts to try, each from other documents")] = 3,
    foreign: Annotated[Path | None, typer.Option(help="Another folder, whose corpus makes the foreign context")] = None,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    semantics: SemanticsOption = "training",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """nDCG@10 and Recall@100 without, with its own, and with a foreign context; exact search."""
    collection = read_beir(folder)
    others = [record.text for record in read_records(foreign / "corpus.jsonl")] if foreign else None
    passes = 1 + seeds + (others is not None)
    options = LoadOptions(revision=revision, semantics=semantics, dtype=dtype, device=device)
    with Offline(model, options) as offline, progress() as bar:
        task = bar.add_task("embedding", total=passes * (len(collection.documents) + len(collection.queries)))
        scores = evaluate_collection(
            offline, collection, seeds=seeds, foreign=others, advance=lambda n: bar.advance(task, n)
        )
    if as_json:
        rows = [{"context": s.context, "ndcg@10": s.ndcg, "recall@100": s.recall, "spread": s.spread} for s in scores]
        typer.echo(orjson.dumps({"rows": rows}).decode())
    else:
        wide_console().print(_table(f"{model} on {folder.name}", scores, seeds))


def _table(title: str, scores: list[Score], seeds: int) -> Table:
    table = Table("context", "nDCG@10", "Recall@100", title=title)
    for score in scores:
        spread = f" ± {score.spread:.2f} ({seeds} seeds)" if score.context == "own" else ""
        table.add_row(score.context, f"{score.ndcg:.2f}{spread}", f"{score.recall:.2f}")
    return table


def agreement(
    *,
    model: ModelOption,
    context: Annotated[str, typer.Option(help="Documents, dataset embeddings, or a stored context")],
    input_: Annotated[Path, typer.Option("--input", help="Texts: .txt, .jsonl or .parquet")],
    input_type: Annotated[InputType, typer.Option(help="Which prompt stands before a text")] = InputType.DOCUMENT,
    limit: Annotated[int, typer.Option(min=1, help="Different texts to take, from the top")] = 500,
    as_json: JsonOption = False,
    revision: RevisionOption = None,
    semantics: SemanticsOption = "training",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    config: ConfigOption = None,
) -> None:
    """Exact against frozen context attention on your own texts: cosine, top-10 overlap, speed."""
    options = LoadOptions(revision=revision, semantics=semantics, dtype=dtype, device=device)
    texts = list(islice(_distinct(record.text for record in read_records(input_)), limit))
    if not texts:
        raise BadCorpus(f"{input_} holds no text")
    with Offline(model, options) as offline:
        arrays = context_payload(offline, context, 0, config).arrays
    found = asdict(measure(model, options, arrays, texts, input_type))
    if as_json:
        typer.echo(orjson.dumps(found).decode())
        return
    table = Table("", "", title=f"{model}: frozen (approximate) against exact context attention")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), "too few texts" if value is None else f"{value:.6g}")
    wide_console().print(table)


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    """Of equal texts, which are the nearest is decided by rounding: two runs would not agree about them."""
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text
