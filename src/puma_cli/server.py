"""The application of `puma serve`: OpenAI's routes for pictures and answers. Imports the libraries.

| route | what |
|---|---|
| `POST /v1/images/generations` | a picture from words |
| `POST /v1/images/edits` | a picture from words and pictures |
| `POST /v1/images/variations` | a picture encoded and decoded again; coarse scales vary it |
| `POST /v1/chat/completions` | answers about pictures, streamed if asked for |
| `GET /v1/models`, `GET /v1/models/{model}`, `GET /health` | what is served |

Beside OpenAI's fields, pictures take `scale`, `seed`, `steps` and `guidance`, as the commands do. A field that is not
known is refused, so nothing that is asked for is left out in silence; null counts as not asked for. The model runs one
request at a time, in a thread of its own, and a streamed answer ends when its client goes away.
"""

import argparse
import asyncio
import base64
import copy
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from threading import Event, Lock
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from transformers import BatchFeature

from diffusers_puma import PumaPipeline

from .answering import Answer, AnswerOptions, answer, prepare, read_messages, stream_answer
from .drawing import draw
from .errors import UserError, one_line, shown
from .options import MAX_SEED, check_best, scale_schedule_or_best
from .pictures import decode_picture
from .scoring import caption_scorer

MAX_PICTURES = 10  # of one request, as OpenAI's
# A side of a picture, in units of what the decoders were made for. Attention grows with the fourth power of it, up to
# all the memory that there is.
MAX_ENLARGEMENT = 2
MIN_TEMPERATURE = 1e-6  # scores divided by less could leave the range of float32


class NoSuchModel(ValueError):
    """A request for a model that is not the one served."""


def _parse_scale(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"must be a scale, all, best or a schedule such as '3:0.4,0', got {shown(value)}")
    try:
        return scale_schedule_or_best(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error


def _parse_size(value: Any) -> Any:
    """`WIDTHxHEIGHT` -> both, None for `auto`."""
    if value == "auto":
        return None
    parts = str(value).split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"must be auto or WIDTHxHEIGHT in pixels, got {shown(value)}")
    return parts


def _check_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0, for the likeliest answer, or from {MIN_TEMPERATURE} to 2, got {value}")
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class DrawRequest(_Fields):
    """Fields of the three routes for pictures."""

    model: str | None = None
    prompt: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] = 1
    size: Annotated[tuple[int, int] | None, BeforeValidator(_parse_size)] = None
    response_format: Literal["b64_json"] = "b64_json"
    scale: Annotated[Any, BeforeValidator(_parse_scale)] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    steps: Annotated[int | None, Field(ge=1)] = None
    guidance: Annotated[float | None, Field(ge=0, le=100)] = None


class ChatRequest(_Fields):
    """Fields of the route for answers."""

    model: str | None = None
    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2), AfterValidator(_check_temperature)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stream: bool = False


async def _read_form(request: Request) -> tuple[DrawRequest, list[Image.Image]]:
    """The fields and pictures of a form; clients send several pictures as `image[]`."""
    form = await request.form()
    files = [*form.getlist("image"), *form.getlist("image[]")]
    if not files or any(isinstance(file, str) for file in files):
        raise UserError("the form has no picture file: image is required")
    if len(files) > MAX_PICTURES:
        raise UserError(f"image: at most {MAX_PICTURES} pictures, got {len(files)}")
    fields = {name: value for name, value in form.items() if name not in ("image", "image[]")}
    # Decoding large pictures takes seconds, in which the event loop is to serve others.
    pictures = [await run_in_threadpool(decode_picture, file.file, file.filename) for file in files]
    return DrawRequest.model_validate(fields), pictures


class _ClosingResponse(StreamingResponse):
    """Closes its generator when it ends. Starlette leaves that to garbage collection where a client goes away while
    something is sent to it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


Form = Annotated[tuple[DrawRequest, list[Image.Image]], Depends(_read_form)]


def build_app(pipe: PumaPipeline, name: str) -> FastAPI:
    """The application.

    Args:
        pipe: draws and answers.
        name: the model folder or its name on the Hub; a folder is served by its last part.
    """
    app = FastAPI(title="PUMA")
    worker = ThreadPoolExecutor(1)  # all that the model does: one request at a time
    # Of conversations, beside what is drawn: a tokenizer that two threads use takes text for special tokens at times.
    reader, reading = copy.deepcopy(pipe.processor), Lock()
    if Path(name).is_dir():
        name = Path(name).resolve().name
    sizes = [getattr(pipe, f"unet_{scale}").config.sample_size for scale in pipe.scales]
    max_side = MAX_ENLARGEMENT * max(sizes, default=0) * pipe.vae_scale_factor
    served = {"id": name, "object": "model", "created": 0, "owned_by": "puma"}

    def respond(request: DrawRequest, images: list[Image.Image]) -> dict[str, Any]:
        check_model(request.model)
        check_best(request.scale, request.prompt, images)
        if request.scale == "best" and request.n > 1:
            raise UserError(f"n: scale best gives the one picture that ranks first, got {request.n}")
        inputs: dict[str, Any] = {"prompt": request.prompt, "num_images_per_prompt": request.n}
        if images:
            inputs["image"] = [images]
        if request.scale == "best" and pipe.mllm is not None:
            inputs["scorer"] = caption_scorer(pipe.mllm, pipe.processor)
        if request.size is not None:
            if max(request.size) > max_side:
                size = shown("x".join(map(str, request.size)))
                raise UserError(f"size: neither side may have more than {max_side} pixels with this model, got {size}")
            inputs["width"], inputs["height"] = request.size
        pictures = worker.submit(draw, pipe, request, **inputs).result()
        if not isinstance(pictures, dict):
            data = [{"b64_json": _base64_png(picture)} for picture in pictures]
        else:
            data = [{"b64_json": _base64_png(item), "scale": k} for k, items in pictures.items() for item in items]
        return {"created": int(time.time()), "data": data}

    def check_model(model: str | None) -> None:
        if model not in (None, name):
            raise NoSuchModel(f"there is no model {shown(model)} here, only {name!r}")

    @app.post("/v1/images/generations")
    def generations(request: DrawRequest) -> dict[str, Any]:
        if request.prompt is None:
            raise UserError("prompt is required")
        return respond(request, [])

    @app.post("/v1/images/edits")
    def edits(form: Form) -> dict[str, Any]:
        request, images = form
        if request.prompt is None:
            raise UserError("prompt is required; /v1/images/variations takes pictures alone")
        return respond(request, images)

    @app.post("/v1/images/variations")
    def variations(form: Form) -> dict[str, Any]:
        request, images = form
        if request.prompt is not None or len(images) > 1:
            raise UserError("a variation is of one image, without a prompt; /v1/images/edits takes more")
        return respond(request, images)

    @app.post("/v1/chat/completions", response_model=None)
    def chat_completions(request: ChatRequest) -> dict[str, Any] | StreamingResponse:
        check_model(request.model)
        if pipe.mllm is None or pipe.processor is None:
            raise UserError(f"an answer needs a language model, and {name} has none")
        conversation = read_messages(request.messages)
        with reading:
            inputs = prepare(reader, conversation)
        options = AnswerOptions(
            request.max_completion_tokens or request.max_tokens, request.temperature, request.top_p
        )
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            return _ClosingResponse(chunks(head, inputs, options), media_type="text/event-stream")
        result = worker.submit(answer, pipe.mllm, pipe.processor, inputs, options).result()
        message = {"role": "assistant", "content": result.text}
        usage = {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.answer_tokens,
            "total_tokens": result.prompt_tokens + result.answer_tokens,
        }
        choice = {"index": 0, "message": message, "finish_reason": result.finish_reason}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}

    async def chunks(head: dict[str, Any], inputs: BatchFeature, options: AnswerOptions) -> AsyncIterator[str]:
        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

        loop, pieces, stop = asyncio.get_running_loop(), asyncio.Queue(), Event()

        def work() -> Answer:
            def write(piece: str) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            return stream_answer(pipe.mllm, pipe.processor, inputs, options, write, stop)

        working = loop.run_in_executor(worker, work)
        working.add_done_callback(lambda _: pieces.put_nowait(None))  # also if it fails
        try:
            yield chunk({"role": "assistant", "content": ""})
            while (piece := await pieces.get()) is not None:
                yield chunk({"content": piece})
            yield chunk({}, (await working).finish_reason)
            yield "data: [DONE]\n\n"
        finally:  # also if the client goes away
            stop.set()
            working.cancel()  # if its turn has not come

    # On the event loop, as none of them waits: the threads may all be busy with pictures.

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return served

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    def refuse_fields(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        return _refusal("; ".join(map(_fault, error.errors())))

    @app.exception_handler(ValueError)
    def refuse(_: Request, error: ValueError) -> JSONResponse:
        return _refusal(one_line(error), 404 if isinstance(error, NoSuchModel) else 400)

    @app.exception_handler(HTTPException)
    def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {shown(request.url.path)}"
        return _refusal(f"{where}: {error.detail}", error.status_code, error.headers)

    return app


def _fault(fault: dict[str, Any]) -> str:
    """What pydantic or FastAPI found wrong with a request, in a sentence."""
    if fault["type"] == "json_invalid":
        return f"the body is not valid JSON: {fault['ctx']['error']} at character {fault['loc'][-1]}"
    if fault["loc"] == ("body",):
        return "the body must be a JSON object, with the content type application/json"
    return f"{'.'.join(map(str, fault['loc'])).removeprefix('body.')}: {fault['msg'].removeprefix('Value error, ')}"


def _refusal(message: str, status: int = 400, headers: Mapping[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


def _base64_png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
