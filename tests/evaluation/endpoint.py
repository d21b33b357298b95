"""A small HTTP server that replies, or misbehaves, as a test says; right replies are tested with vLLM too."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from ema_scale.evaluation.judges.base import Judge, JudgeFailure, JudgeItem
from ema_scale.evaluation.records import Judgement

Reply = tuple[int, dict[str, str], bytes]
Raw = Callable[[BaseHTTPRequestHandler], None]  # writes to the connection what it likes


def completion(text: str | None, top: list[tuple[str, float]] | None = None) -> Reply:
    """A chat completion that says `text`, with these (token, log-probability) pairs for its first token."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
    }
    if top is not None:
        pairs = [{"token": t, "logprob": p, "bytes": None} for t, p in top]
        choice["logprobs"] = {"content": [{**pairs[0], "top_logprobs": pairs}], "refusal": None}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def error(status: int, message: str = "no", **headers: str) -> Reply:
    return (
        status,
        {"Content-Type": "application/json", **headers},
        json.dumps({"error": {"message": message}}).encode(),
    )


class Endpoint:
    """Answers POSTs with `respond(request body, how many came before)` and remembers bodies and headers.

    GETs are answered by path, with JSON or text, from `pages`.
    """

    def __init__(
        self,
        respond: Callable[[dict[str, Any], int], Reply | Raw],
        delay: float = 0.0,
        pages: Mapping[str, Any] | None = None,
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        lock, endpoint = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(body)
                    endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                time.sleep(delay)
                reply = respond(body, number)
                with lock:
                    endpoint.at_once -= 1
                if callable(reply):
                    self.close_connection = True
                    with contextlib.suppress(OSError):  # the client has hung up
                        reply(self)
                    return
                status, headers, data = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                page = (pages or {}).get(self.path)
                data = page.encode() if isinstance(page, str) else json.dumps(page).encode()
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # of connections not yet accepted; the default of 5 resets some on a busy machine

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def judge_all(judge: Judge, items: Iterable[JudgeItem]) -> list[Judgement | JudgeFailure]:
    """The outcomes of all items, as they came."""
    outcomes: list[Judgement | JudgeFailure] = []
    for item in items:
        judge.submit(item, outcomes.append)
    judge.finish()
    return outcomes
