"""POST /v1/contexts/{ref}/compatibility: two contexts compared."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from app.api.auth import CanReadContexts
from app.api.body import json_body
from app.api.context_schemas import CompatibilityRequest, compatibility_body
from app.api.dependencies import CallerOf, Embedder, ModelQuery, Namespace, RegistryOf, admitted, model_named
from app.api.openapi import takes
from app.api.presence import while_connected
from app.api.schemas import ORJSONResponse
from app.compatibility import compare
from app.embed_request import EmbedRequest

router = APIRouter(tags=["contexts"], dependencies=[Depends(admitted)])


@router.post("/v1/contexts/{ref}/compatibility", openapi_extra=takes(CompatibilityRequest))
async def compare_contexts(
    request: Request,
    _key: CanReadContexts,
    embedder: Embedder,
    *,
    registry: RegistryOf,
    namespace: Namespace,
    caller: CallerOf,
    ref: str,
    body: Annotated[CompatibilityRequest, Depends(json_body(CompatibilityRequest))],
    model: ModelQuery = None,
) -> Response:
    """How far two contexts part on the given texts: cosine of the two vectors, and overlap of nearest neighbours."""
    served = model_named(registry, body.model, model)
    asked = EmbedRequest(
        model=served.id,
        texts=body.texts,
        input_types={} if body.input_type is None else {"input_type": body.input_type},
        truncate="end",
        namespace=namespace,
        caller=caller,
    )
    found = await while_connected(request, compare(embedder, asked, ref, body.with_, body.top_k))
    return ORJSONResponse(compatibility_body(found))
