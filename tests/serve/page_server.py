"""A server for the page without a model: a drawn film, answers that are known, and whatever goes wrong on demand."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from tieredkv.serve.page.routes import router
from tieredkv.tiny.scene import Scene, make_scene, questions
from tieredkv.tiny.video import write_video

SEED = 1_000_000


def draw_film(folder: Path, seconds: float = 96.0) -> tuple[Scene, Path]:
    """A film of the toy's kind and what is in it."""
    scene = make_scene(SEED, seconds, 12)
    return scene, write_video(scene, folder / "film.mp4")


@dataclass
class Behaviour:
    """What the server does from now on. Tests change it; `asked` are the bodies of the questions that came."""

    pause: float = 0.0
    """Seconds between two events."""
    error: tuple[int, str, str, int | None] | None = None
    """Status, code, sentence and Retry-After of the next questions."""
    errors: int = 1000
    """How many of them meet it."""
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Tokens with their moments, by question."""
    key: str | None = None
    unreadable: bool = False
    """Whether films can be uploaded but not decoded."""
    toy: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, tuple[str, Path]] = field(default_factory=dict)
    stopped: int = 0
    """Answers whose reader went away."""


def moment(start: float, end: float, weight: float) -> dict[str, Any]:
    return {"start": start, "end": end, "weight": weight, "peak": (start + end) / 2, "medium": 0}


def known_answers(scene: Scene) -> dict[str, list[dict[str, Any]]]:
    """The true answers of a scene's questions, each word with the card that it is read from."""
    found = {}
    for question in questions(scene, SEED, 12):
        tokens = []
        for place, (word, (start, end)) in enumerate(zip(question.words, question.spans, strict=True)):
            looked = [moment(start, end, 0.62), moment((start + 40) % 90, (start + 40) % 90 + 1.5, 0.05)]
            tokens.append({"text": ("" if place == 0 else " ") + word, "moments": looked})
        found[question.text] = tokens
    return found


def page_app(behaviour: Behaviour, folder: Path) -> FastAPI:
    """The routes that the page uses."""
    app = FastAPI()
    app.include_router(router)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Response:
        key, path = behaviour.key, request.url.path
        cookie = request.method == "GET" and request.cookies.get("k") == key
        open_to_all = not path.startswith("/v1/") or path == "/v1/tieredkv"
        if key is None or cookie or open_to_all or request.headers.get("authorization") == f"Bearer {key}":
            return await call_next(request)
        return refuse(401, "invalid_api_key", "this server needs a key: send it as Authorization: Bearer KEY.")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/tieredkv")
    async def facts() -> dict[str, Any]:
        demo = (
            {"file_id": "file-demo", "questions": list(behaviour.answers)} if "file-demo" in behaviour.files else None
        )
        limits = {"upload_bytes": 4 * 2**30}
        name = "tieredkv/toy" if behaviour.toy else "Qwen/Qwen3.5-9B"
        return {
            "model": name,
            "toy": behaviour.toy,
            "demo": demo,
            "version": "0.9",
            "key_needed": bool(behaviour.key),
        } | {"limits": limits}

    @app.post("/v1/tieredkv/login")
    async def login() -> Response:
        response = Response(status_code=204)
        response.set_cookie("k", behaviour.key or "", httponly=True, samesite="strict")
        return response

    def described(file_id: str) -> dict[str, Any]:
        name, path = behaviour.files[file_id]
        return {"id": file_id, "object": "file", "bytes": path.stat().st_size, "filename": name, "purpose": "user_data"}

    @app.get("/v1/files")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [described(one) for one in behaviour.files]}

    @app.post("/v1/files")
    async def upload(file: UploadFile) -> dict[str, Any]:
        file_id = f"file-{len(behaviour.files)}"
        path = folder / f"{file_id}.mp4"
        path.write_bytes(await file.read())
        behaviour.files[file_id] = (file.filename or "film", path)
        return described(file_id)

    @app.get("/v1/files/{file_id}")
    async def one(file_id: str) -> Any:
        return described(file_id) if file_id in behaviour.files else missing(file_id)

    @app.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> dict[str, Any]:
        del behaviour.files[file_id]
        return {"id": file_id, "deleted": True}

    @app.get("/v1/files/{file_id}/content")
    async def content(file_id: str) -> Response:
        return FileResponse(behaviour.files[file_id][1]) if file_id in behaviour.files else missing(file_id)

    @app.get("/v1/files/{file_id}/frame")
    def frame(file_id: str, time: float, width: int) -> Response:
        if behaviour.unreadable:
            return refuse(400, "video", "not a readable video file.")
        return Response(_jpeg(behaviour.files[file_id][1], time), media_type="image/jpeg")

    @app.post("/v1/files/{file_id}/ingest")
    async def ingest(file_id: str) -> Response:
        if behaviour.unreadable:
            return refuse(400, "video", "not a readable video file.")
        return StreamingResponse(_ingest(behaviour), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        behaviour.asked.append(await request.json())
        if behaviour.error and behaviour.errors > 0:
            behaviour.errors -= 1
            return refuse(*behaviour.error)
        return StreamingResponse(_answer(behaviour, behaviour.asked[-1], request), media_type="text/event-stream")

    return app


def refuse(status: int, code: str, message: str, retry_after: int | None = None) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return JSONResponse(body, status, headers)


def missing(file_id: str) -> JSONResponse:
    return refuse(404, "no_film", f"there is no film {file_id!r}: upload it.")


def _event(value: Any) -> str:
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


async def _ingest(behaviour: Behaviour) -> AsyncIterator[str]:
    yield _event({"stage": "queued", "done": 0, "total": None, "seconds": 0.0})
    for done in range(0, 769, 96):
        yield _event({"stage": "ingest", "done": done, "total": 768, "seconds": 0.8 + done * behaviour.pause / 96})
        await asyncio.sleep(behaviour.pause)
    yield ": still here\n\n"
    yield _event({"reused": False, "tokens": 781, "seconds": 96.0})


async def _answer(behaviour: Behaviour, body: dict[str, Any], request: Request) -> AsyncIterator[str]:
    def chunk(delta: dict[str, Any] | None, **ours: Any) -> str:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
        return _event({"object": "chat.completion.chunk", "choices": choices, **({"tieredkv": ours} if ours else {})})

    content = body["messages"][-1]["content"]
    question = content if isinstance(content, str) else content[-1]["text"]
    tokens = behaviour.answers.get(question, [{"text": "I do not know.", "moments": []}])
    try:
        yield chunk(None, progress={"stage": "question", "done": 0, "total": 9, "seconds": 0.0})
        yield chunk({"role": "assistant", "content": ""})
        for token in tokens:
            await asyncio.sleep(behaviour.pause)
            yield chunk({"content": token["text"]})
    except (asyncio.CancelledError, GeneratorExit):
        behaviour.stopped += 1
        raise
    looked = sorted((one for token in tokens for one in token["moments"]), key=lambda one: -one["weight"])
    seen = {(one["start"], one["end"]): one for one in reversed(looked)}
    best = sorted(seen.values(), key=lambda one: -one["weight"])[:12]
    total = sum(one["weight"] for one in best) or 1
    evidence = [{**one, "weight": one["weight"] / total} for one in best]
    yield chunk(None, evidence=evidence, token_evidence=tokens, reused=len(body["messages"]) > 1, stats={})
    yield _event("[DONE]")


def _jpeg(path: Path, time: float) -> bytes:
    with av.open(str(path)) as container:
        container.seek(int(time * 1_000_000))
        frame = next(one for one in container.decode(video=0) if one.time >= time - 0.25)
        buffer = io.BytesIO()
        frame.to_image().save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of a server that listens, on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            threading.Event().wait(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
