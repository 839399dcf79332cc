"""The routes of the server, as an application of ASGI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from keras_openllama.serving.chat import ChatReply
from keras_openllama.serving.completions import CompletionReply
from keras_openllama.serving.errors import ApiError
from keras_openllama.serving.events import (
    EventStream,
    time_limit_error,
    until_disconnect,
)
from keras_openllama.serving.generation import RequestGeneration
from keras_openllama.serving.json_body import parse_json_object
from keras_openllama.serving.metrics import CONTENT_TYPE, ServerMetrics
from keras_openllama.serving.page import page_response
from keras_openllama.serving.protocol import (
    GenerationOptions,
    parse_chat,
    parse_completion,
)
from keras_openllama.serving.replies import Reply
from keras_openllama.serving.security import (
    AccessControl,
    error_response,
    read_json_body,
)
from keras_openllama.serving.served_model import ServedModel
from keras_openllama.serving.settings import ServerSettings


def make_app(model: ServedModel, settings: ServerSettings | None = None) -> Starlette:
    """Makes the application of a server.

    Args:
        model: The model, whose engine the caller starts and stops.
        settings: Who may use it, and how much; `None` for the defaults.

    Returns:
        An application of ASGI.

    Example:
        >>> from keras_openllama.generation.continuous_batching.engine import Engine
        >>> app = make_app(ServedModel(lm, Engine(lm), "nano"))
        >>> [route.path for route in app.routes][-2:]
        ['/v1/completions', '/v1/chat/completions']
    """
    settings = settings or ServerSettings()
    server = _Server(model, settings)
    middleware = [
        Middleware(
            AccessControl,
            allowed_hosts=settings.allowed_hosts,
            api_keys=settings.api_keys,
        )
    ]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            # The clients of OpenAI send headers of their own.
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/", page_response),
            Route("/health", server.health),
            Route("/metrics", server.read_metrics),
            Route("/v1/models", server.list_models),
            Route("/v1/models/{name:path}", server.show_model),
            Route("/v1/completions", server.complete, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _unexpected_error,
        },
    )


async def _api_error(request, error):
    return error_response(error)


async def _http_error(request, error):
    message = f"{error.detail}: {request.method} {request.url.path[:200]}"
    api_error = ApiError(message, error.status_code, headers=error.headers)
    return error_response(api_error)


async def _unexpected_error(request, error):
    # The traceback is in the log of the server.
    return error_response(ApiError("An unexpected error occurred.", status=500))


class _Server:
    """The functions behind the routes."""

    def __init__(self, model: ServedModel, settings: ServerSettings) -> None:
        self._model = model
        self._settings = settings
        self._metrics = ServerMetrics(_engine_gauges(model.engine))

    async def health(self, request: Request) -> Response:
        if self._model.engine.error is not None:
            message = "The engine stopped after an error. Start the server again."
            raise ApiError(message, status=503)
        return JSONResponse({"status": "ok"})

    async def read_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def list_models(self, request: Request) -> Response:
        data = [self._model.description(name) for name in self._model.names]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        name = self._model.checked_name(request.path_params["name"])
        return JSONResponse(self._model.description(name))

    async def complete(self, request: Request) -> Response:
        return await self._measured(request, self._complete)

    async def chat(self, request: Request) -> Response:
        return await self._measured(request, self._chat)

    async def _complete(self, request, on_end):
        body = await read_json_body(request, self._settings.max_body_bytes)
        parsed = parse_completion(parse_json_object(body))
        name = self._model.checked_name(parsed.options.model)
        prompts = await asyncio.to_thread(self._model.completion_ids, parsed)
        echoes = self._model.prompt_texts(parsed) if parsed.echo else None
        has_logprobs = parsed.options.top_logprobs is not None
        token_names = self._model.token_names if has_logprobs else ()
        reply = CompletionReply(name, token_names, has_logprobs)
        return await self._respond(
            request, prompts, parsed.options, reply, on_end, echoes
        )

    async def _chat(self, request, on_end):
        body = await read_json_body(request, self._settings.max_body_bytes)
        parsed = parse_chat(parse_json_object(body))
        name = self._model.checked_name(parsed.options.model)
        prompt = await asyncio.to_thread(self._model.chat_ids, parsed)
        has_logprobs = parsed.options.top_logprobs is not None
        token_names = self._model.token_names if has_logprobs else ()
        reply = ChatReply(name, token_names, has_logprobs)
        return await self._respond(request, [prompt], parsed.options, reply, on_end)

    async def _respond(
        self,
        request: Request,
        prompts: list[list[int]],
        options: GenerationOptions,
        reply: Reply,
        on_end: Callable[[bool], None],
        echoes: list[str] | None = None,
    ) -> Response:
        # Grammars of large schemas take a while.
        grammar = await asyncio.to_thread(self._model.grammar, options)
        generation = self._model.generate(
            prompts, options, self._metrics, grammar, echoes
        )
        num_texts = len(prompts) * options.num_choices
        if options.stream:
            events = self._events(generation, num_texts, options, reply)
            return EventStream(events, self._settings.time_limit, on_end)
        limit = self._settings.time_limit
        try:
            async with asyncio.timeout(limit):
                work = _collect(generation, num_texts)
                texts = await until_disconnect(request.receive, work)
        except TimeoutError as error:
            raise time_limit_error(limit) from error
        finally:
            generation.cancel()
        choices = [reply.choice(i, pieces) for i, pieces in enumerate(texts)]
        usage = self._count(generation, options)
        return JSONResponse({**reply.envelope(choices), "usage": usage})

    async def _events(
        self,
        generation: RequestGeneration,
        num_texts: int,
        options: GenerationOptions,
        reply: Reply,
    ) -> AsyncIterator[dict[str, Any]]:
        def chunk(*choices, usage=None):
            data = reply.envelope(list(choices), stream=True)
            return {**data, "usage": usage} if options.include_usage else data

        try:
            for index in range(num_texts):
                yield chunk(reply.opening(index))
            async for index, piece in generation.pieces():
                yield chunk(reply.delta(index, piece))
            usage = self._count(generation, options)
            if options.include_usage:
                yield chunk(usage=usage)
        finally:
            generation.cancel()

    def _count(self, generation, options):
        usage = generation.usage(options.num_choices)
        self._metrics.prompt_tokens.add(usage["prompt_tokens"])
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self._metrics.cached_tokens.add(cached)
        return usage

    async def _measured(self, request, respond):
        """Counts a request, whose response may be a stream that ends later."""
        start = time.monotonic()

        def on_end(disconnected, status=200):
            if disconnected:
                self._metrics.disconnects.add(1)
                status = 499
            path = request.scope["route"].path
            self._metrics.requests.add(1, path=path, status=str(status))
            self._metrics.request_time.observe(time.monotonic() - start)

        try:
            response = await respond(request, on_end)
        except ApiError as error:
            on_end(False, error.status)
            raise
        except ClientDisconnect:
            on_end(True)
            return Response(status_code=499)
        except Exception:
            on_end(False, 500)
            raise
        if not isinstance(response, EventStream):
            on_end(False)
        return response


async def _collect(generation, num_texts):
    texts = [[] for _ in range(num_texts)]
    async for index, piece in generation.pieces():
        texts[index].append(piece)
    return texts


def _engine_gauges(engine):
    """The gauges of an engine, for `ServerMetrics`."""
    stats = engine.stats
    return [
        ("requests_waiting", "Texts that wait for a slot.", lambda: stats.queued),
        ("requests_running", "Slots in use.", lambda: stats.active),
    ]
