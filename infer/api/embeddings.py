"""POST /v1/embeddings: the final hidden states of a text, as one vector of length 1."""

import base64
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HttpRequest

from infer.api.errors import ApiError
from infer.api.schemas import EmbeddingRequest
from infer.api.server import Server, unless_gone


def router(server: Server) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, http: HttpRequest) -> dict[str, Any]:
        """Vectors of one text or several: the mean over its tokens, or the last token's."""
        with server.admitted(http):
            return await unless_gone(http, lambda: embedded(server, body))

    return routes


async def embedded(server: Server, body: EmbeddingRequest) -> dict[str, Any]:
    """The answer to a body. Raises ApiError 400."""
    model, texts = server.check_model(body.model), body.input
    if isinstance(texts, str) or isinstance(texts[0], int):
        texts = [texts]
    width = server.engine.cfg.embed_dim
    if body.dimensions not in (None, width):
        raise ApiError(f"dimensions={body.dimensions}: this model has {width}", param="dimensions")
    requests = await server.requests(model, texts, server.defaults)
    prompts = [request.result.prompt_tokens for request in requests]
    embed = partial(server.engine.embed, pooling=body.pooling or "mean", adapter=server.adapter(model))
    # One at a time, so that the others' tokens go on in between.
    vectors = [await server.worker.call(partial(embed, prompt)) for prompt in prompts]
    num_tokens = sum(map(len, prompts))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _encoded(vector: np.ndarray, encoding: str | None) -> str | list[float]:
    vector = vector.astype("<f4")
    return base64.b64encode(vector.tobytes()).decode() if encoding == "base64" else vector.tolist()
