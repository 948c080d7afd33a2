"""Retrieval quality of a model on a collection: without a context of its own, with its own, and with a foreign one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import pytrec_eval

from app.corpora import Collection, Record
from app.domain import FloatArray, InputType, Payload, Selection
from app.offline import Offline
from app.vectors import normalized

DEPTH = 100

Advance = Callable[[int], None]
"""Called with the number of texts just embedded."""


@dataclass(frozen=True, slots=True)
class Score:
    """nDCG@10 and Recall@100, 0 to 100; with several seeds their means, and `spread` the sample standard
    deviation of nDCG."""

    context: str
    ndcg: float
    recall: float
    spread: float = 0.0


def evaluate(
    offline: Offline, collection: Collection, *, seeds: int, foreign: Sequence[str] | None, advance: Advance
) -> list[Score]:
    """Rows `none`, `own` and, with documents of another corpus, `foreign`."""
    texts = [record.text for record in collection.documents]
    none = _measure(offline, collection, offline.default_context(), advance)
    own = [_measure(offline, collection, offline.context_of(texts, Selection(seed=s)), advance) for s in range(seeds)]
    ndcgs = [ndcg for ndcg, _ in own]
    spread = stdev(ndcgs) if len(ndcgs) > 1 else 0.0
    scores = [Score("none", *none), Score("own", fmean(ndcgs), fmean(recall for _, recall in own), spread)]
    if foreign is not None:
        scores.append(
            Score("foreign", *_measure(offline, collection, offline.context_of(foreign, Selection()), advance))
        )
    return scores


def _measure(offline: Offline, collection: Collection, context: Payload, advance: Advance) -> tuple[float, float]:
    """nDCG@10 and Recall@100 of exact search by cosine."""
    documents = _vectors(offline, (d.text for d in collection.documents), context, InputType.DOCUMENT, advance)
    queries = _vectors(offline, (q.text for q in collection.queries), context, InputType.QUERY, advance)
    run: dict[str, dict[str, float]] = {}
    for query, scores in zip(collection.queries, queries @ documents.T, strict=True):
        best = np.argsort(-scores, kind="stable")[: DEPTH + 1]
        others = [i for i in best if not _is_itself(query, collection.documents[i])]
        run[query.id] = {collection.documents[i].id: float(scores[i]) for i in others[:DEPTH]}
    evaluator = pytrec_eval.RelevanceEvaluator(collection.qrels, {"ndcg_cut.10", f"recall.{DEPTH}"})
    results = evaluator.evaluate(run).values()
    return 100 * fmean(r["ndcg_cut_10"] for r in results), 100 * fmean(r[f"recall_{DEPTH}"] for r in results)


def _is_itself(query: Record, document: Record) -> bool:
    """Where queries are documents, as in ArguAna, each finds itself first, which BEIR does not count. Other collections
    number both alike; a document's text has its title in front."""
    return query.id == document.id and document.text.endswith(query.text)


def _vectors(
    offline: Offline, texts: Iterable[str], context: Payload, input_type: InputType, advance: Advance
) -> FloatArray:
    chunks = []
    for chunk in offline.embed(texts, context, input_type, truncate=True):
        chunks.append(normalized(chunk))
        advance(len(chunk))
    return np.concatenate(chunks)
