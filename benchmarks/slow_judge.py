"""A judge's endpoint with a fixed latency, in its own process: `python -m benchmarks.slow_judge SECONDS`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator


def _reply() -> bytes:
    """An HTTP response with the score 85 and the 20 likeliest tokens."""
    numbers = [85, 90, 80, 75, 95, 70, 100, 88, 60, 50, 92, 65, 78, 82, 40, 30, 98, 20, 10, 0]
    top = [{"token": str(n), "logprob": math.log(0.5**k), "bytes": None} for k, n in enumerate(numbers, start=1)]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "85"},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}], "refusal": None},
    }
    usage = {"prompt_tokens": 400, "completion_tokens": 1, "total_tokens": 401}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "slow", "choices": [choice], "usage": usage}
    data = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data


async def _serve(seconds: float) -> None:
    reply = _reply()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                await asyncio.sleep(seconds)
                writer.write(reply)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def slow_judge(seconds: float) -> Iterator[str]:
    """The base URL of an endpoint that answers every request after `seconds`."""
    command = [sys.executable, "-m", "benchmarks.slow_judge", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(float(sys.argv[1])))
