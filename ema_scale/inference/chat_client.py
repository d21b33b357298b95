"""One call to an OpenAI-compatible endpoint, within stated limits, and what it says when it fails.

A server is not trusted. Every attempt has a time-out from its first byte to its last, every call a deadline over all
its attempts and waits, and every reply a largest size, unpacked. A redirect is followed on the same host only, so that
neither the key nor a prompt reaches another one.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ema_scale.core.io import whole_characters
from ema_scale.inference.completion import CONTENT_FILTER, Completion, SaidError, read_completion, read_object
from ema_scale.inference.context_room import room_for_reply

if TYPE_CHECKING:
    from ema_scale.config.endpoints import CallsRecipe

MAX_RETRIES = 8
MAX_REDIRECTS = 3
REDIRECTED, CIRCLE, TOO_LARGE = 421, 508, 413  # stand for replies that are not handed on
_TOO_LONG = re.compile(r"context[ _](length|size|window)|maximum (context|model)|too (long|many tokens)", re.I)
_REPLY_TOO_LONG = re.compile(
    r"max_(completion_)?tokens.{0,30}(too large|cannot be greater)|fewer output tokens|max_new_tokens\W{0,3}must be",
    re.I,
)
_FILTERED = re.compile(r"content management policy|violating our usage policy|ContentPolicyViolation|input was flagged")


class CallError(Exception):
    """A call that gave no completion.

    status: of the reply; None if there was none, or one that is no completion.
    room: see `room_for_reply`.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None, whole: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.room = room_for_reply(whole or message) if status in (400, 413, 422) else None

    @property
    def refused(self) -> bool:
        """The key is refused, the model unknown or the address another host's: no later call can succeed."""
        return self.status in (401, 403, 404, REDIRECTED)

    @property
    def bad_request(self) -> bool:
        return self.status == 400

    @property
    def too_long(self) -> bool:
        """The server says that the prompt, alone or with the reply, does not fit into the model's context."""
        return self._unfit and (self.room is not None or bool(_TOO_LONG.search(str(self))))

    @property
    def no_room(self) -> bool:
        """A shorter reply may fit: the prompt and the reply are too long together, or the reply for this server."""
        if self.room is not None:
            return self.room > 0
        return self.too_long or (self._unfit and bool(_REPLY_TOO_LONG.search(str(self))))

    @property
    def _unfit(self) -> bool:
        return self.status in (400, 413, 422)

    @property
    def filtered(self) -> bool:
        """OpenAI, Azure or a proxy says that this prompt is never answered."""
        if not (self.bad_request or self.refused):
            return False
        return self.code in (CONTENT_FILTER, "content_policy_violation") or bool(_FILTERED.search(str(self)))


@dataclass(frozen=True)
class CallLimits:
    """timeout: seconds for one attempt; deadline: seconds for one call with its retries; max_bytes: of a reply."""

    timeout: float = 120.0
    deadline: float = 600.0
    max_bytes: int = 16_000_000
    max_retries: int = MAX_RETRIES

    @classmethod
    def of(cls, settings: CallsRecipe, max_retries: int = MAX_RETRIES) -> CallLimits:
        return cls(settings.timeout, settings.deadline, round(settings.max_reply_mb * 1e6), max_retries)


@dataclass
class ChatClient:
    """Calls one endpoint. Close it with `aclose`. Used from one event loop.

    trouble: what the last attempt met, in words, while the client waits and tries again; "" if nothing.
    """

    base_url: str | None
    api_key: str
    limits: CallLimits = CallLimits()
    trouble: str = ""
    _client: Any = field(init=False)
    _http: Any = field(init=False)

    def __post_init__(self) -> None:
        import openai

        self._http = _bounded_client(self)
        try:
            self._client = openai.AsyncOpenAI(
                base_url=self.base_url,
                api_key=self.api_key,
                timeout=self.limits.timeout,
                max_retries=self.limits.max_retries,
                http_client=self._http,
            )
        except Exception as error:  # an address that is none
            raise CallError(f"{type(error).__name__}: {error}") from None

    async def complete(self, **request: Any) -> Completion:
        """One chat completion. Rate limits, server errors and broken connections are tried again. Raises CallError."""
        body = await self._call(self._client.chat.completions.with_raw_response.create, **request)
        try:
            return read_completion(body)
        except SaidError as error:
            raise CallError(str(error), error.status, whole=error.whole) from None
        except ValueError as error:
            raise CallError(str(error)) from None

    async def models(self) -> list[dict[str, Any]]:
        """What the endpoint says of the models that it serves. Raises CallError."""
        body = await self._call(self._client.models.with_raw_response.list)
        try:
            entries = read_object(body).get("data")
        except ValueError as error:
            raise CallError(str(error)) from None
        found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        return [entry for entry in found if isinstance(entry.get("id"), str)]

    async def metrics(self) -> str:
        """The server's metrics in Prometheus's text format; "" if it gives none."""
        address = str(self._client.base_url).rstrip("/").removesuffix("/v1")
        try:
            async with asyncio.timeout(self.limits.timeout):
                reply = await self._http.send(self._http.build_request("GET", f"{address}/metrics"))
        except Exception:  # it is only another source
            return ""
        return str(reply.text) if reply.status_code == 200 else ""

    async def _call(self, method: Any, **request: Any) -> bytes:
        import openai

        try:
            async with asyncio.timeout(self.limits.deadline):
                return bytes((await method(**request)).content)
        except TimeoutError:
            why = f" ({self.trouble})" if self.trouble else ""
            raise CallError(f"no reply within the deadline of {self.limits.deadline:g} s{why}") from None
        except openai.APIStatusError as error:
            code = error.code if isinstance(error.code, str) else None
            hint = f"; most servers want /v1 at the end of {self.base_url}" if self._may_lack_v1(error) else ""
            raise CallError(self._short(error) + hint, error.status_code, code, str(error)) from None
        except Exception as error:  # whatever a server does must not end the evaluation
            raise CallError(self._short(error)) from None

    def _may_lack_v1(self, error: Any) -> bool:
        address = str(self.base_url or "").rstrip("/")
        return bool(address) and error.status_code == 404 and not address.endswith("/v1")

    def _short(self, error: Exception) -> str:
        text = whole_characters(" ".join(str(error).split()))
        if len(self.api_key) > 6:
            text = text.replace(self.api_key, "***")
        why = f" ({self.trouble})" if self.trouble and self.trouble not in text else ""
        return f"{type(error).__name__}: {text[:300]}{why}"

    async def aclose(self) -> None:
        await self._client.close()


def _bounded_client(owner: ChatClient) -> Any:
    """The HTTP client below openai's, which reads each reply within the limits before it is handed on."""
    import openai

    base: Any = openai.DefaultAsyncHttpxClient
    # openai has changed from httpx to httpx2; the exceptions that it tries again are those of its own.
    httpx: Any = importlib.import_module(next(c for c in base.__mro__ if c.__name__ == "AsyncClient").__module__)
    limits = owner.limits

    class BoundedClient(base):
        async def send(self, request: Any, **options: Any) -> Any:
            owner.trouble = ""
            try:
                async with asyncio.timeout(limits.timeout):
                    reply = await self._follow(request, options | {"stream": True, "follow_redirects": False})
            except TimeoutError:
                owner.trouble = f"no whole reply within {limits.timeout:g} s"
                raise httpx.ReadTimeout(owner.trouble, request=request) from None
            except httpx.RequestError as error:
                owner.trouble = f"{type(error).__name__} {error}".strip()
                raise
            if reply.status_code >= 400:
                owner.trouble = f"status {reply.status_code}"
            return reply

        async def _follow(self, request: Any, options: dict[str, Any]) -> Any:
            for _ in range(MAX_REDIRECTS + 1):
                reply = await super().send(request, **options)
                try:
                    following = reply.next_request
                    if not reply.is_redirect or following is None:
                        return await self._read(reply)
                finally:
                    await reply.aclose()
                if not _same_host(request.url, following.url) or following.method != request.method:
                    where = f"{following.url.scheme}://{following.url.host}"
                    return self._refused(
                        request, REDIRECTED, f"the endpoint redirects to {where}; nothing was sent there"
                    )
                request = following
            return self._refused(request, CIRCLE, "the endpoint redirects in a circle")

        async def _read(self, reply: Any) -> Any:
            too_large = f"the reply is larger than {limits.max_bytes / 1e6:g} MB (max_reply_mb)"
            packing = reply.headers.get("content-encoding", "identity").lower()
            if packing not in ("identity", "gzip", "deflate"):
                return self._refused(reply.request, TOO_LARGE, f"the reply is packed as {packing[:20]}, expected gzip")
            unpack = None if packing == "identity" else zlib.decompressobj(47 if packing == "gzip" else 15)
            body = bytearray()
            async for part in reply.aiter_raw():
                try:
                    body += part if unpack is None else unpack.decompress(part, limits.max_bytes + 1 - len(body))
                except zlib.error as error:
                    return self._refused(reply.request, TOO_LARGE, f"the reply is not {packing}: {error}")
                if len(body) > limits.max_bytes:
                    return self._refused(reply.request, TOO_LARGE, too_large)
            headers = {k: v for k, v in reply.headers.items() if k not in ("content-encoding", "content-length")}
            return type(reply)(reply.status_code, headers=headers, content=bytes(body), request=reply.request)

        def _refused(self, request: Any, status: int, why: str) -> Any:
            """An error reply in place of one that is not handed on; the client above does not try it again."""
            headers = {"content-type": "application/json", "x-should-retry": "false"}
            body = json.dumps({"error": {"message": why}}).encode()
            return httpx.Response(status, headers=headers, content=body, request=request)

    # As little packing as possible: what is unpacked here is bounded.
    return BoundedClient(headers={"accept-encoding": "gzip, deflate"})


def _same_host(one: Any, other: Any) -> bool:
    """The same host and port, or the step from http to https there."""
    if one.host != other.host:
        return False
    upgraded = one.scheme == "http" and other.scheme == "https" and one.port is None and other.port is None
    return upgraded or (one.scheme, one.port) == (other.scheme, other.port)
