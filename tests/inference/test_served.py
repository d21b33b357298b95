"""What a server says it serves, over HTTP, against what it is taken for; and the settings that are sent to it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from ema_scale.config.sections import EndpointRecipe, EvaluationRecipe, ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.inference.base import NEUTRAL_SAMPLING, SampleRequest, SamplerOptions
from ema_scale.inference.make import make_sampler, sampler_cache_key
from tests.evaluation.endpoint import Endpoint, completion, error

ASKED = ({"role": "user", "content": "q"},)


def adapter(folder: Path, weights: bytes = b"1") -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def ask(endpoint: Endpoint, *adapters: str, **settings: Any) -> Any:
    recipe = EndpointRecipe(base_url=endpoint.url, **settings)
    sampler = make_sampler("openai", SamplerOptions(ModelRecipe(path="org/base"), adapters, endpoint=recipe))
    list(sampler.sample([SampleRequest("k", ASKED, adapters[0] if adapters else None)]))
    return sampler


def card(name: str, root: Any, parent: str | None = None) -> dict[str, Any]:
    return {"id": name, "object": "model", "root": root, "parent": parent}


def serving(*cards: dict[str, Any], started: float | None = None) -> Endpoint:
    pages: dict[str, Any] = {"/v1/models": {"object": "list", "data": list(cards)}}
    if started is not None:
        pages["/metrics"] = f"# TYPE x gauge\nprocess_start_time_seconds {started}\n"
    return Endpoint(lambda b, n: completion("yes"), pages=pages)


BASE = card("org/base", "org/base")


def test_what_the_server_serves_is_asked_and_kept(tmp_path: Path) -> None:
    mine = adapter(tmp_path / "kl" / "adapter")
    with serving(BASE, card("kl", mine, "org/base")) as endpoint:
        sampler = ask(endpoint, mine)
    assert sampler.describe()["models"] == {
        "org/base": {"root": "org/base", "parent": None},
        "kl": {"root": mine, "parent": "org/base"},
    }


def test_a_name_that_is_another_model_is_an_error_before_anything_is_asked(tmp_path: Path) -> None:
    mine = adapter(tmp_path / "kl" / "adapter")
    others = adapter(tmp_path / "other", b"2")
    copy = adapter(tmp_path / "copy")
    model, different = tmp_path / "model", tmp_path / "different"
    for folder in (model, different):
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"name": "{folder.name}"}}')
    for cards, message in (
        ([BASE], "does not serve 'kl'; it serves 'org/base'"),
        ([BASE, card("kl", "org/base")], "'kl' is the base model at the server"),
        ([BASE, card("kl", others, "org/base")], "'kl' was loaded from .*other, whose weights differ"),
    ):
        with serving(*cards) as endpoint:
            with pytest.raises(UserError, match=message):
                ask(endpoint, mine)
        assert endpoint.requests == []
    with serving(BASE, card("kl", copy, "org/base")) as endpoint:  # the same weights in another place
        ask(endpoint, mine)
    recipe = EndpointRecipe(base_url="http://x", served="base")
    with serving(card("base", str(different))) as endpoint:
        recipe = recipe.model_copy(update={"base_url": endpoint.url})
        sampler = make_sampler("openai", SamplerOptions(ModelRecipe(path=str(model)), endpoint=recipe))
        with pytest.raises(UserError, match="'base' is .*different at the server; expected .*model"):
            list(sampler.sample([SampleRequest("k", ASKED)]))


def test_what_is_not_said_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = adapter(tmp_path / "kl" / "adapter")
    with caplog.at_level(logging.WARNING):
        with serving({"id": "org/base"}, {"id": "kl"}) as endpoint:
            ask(endpoint, mine)
        assert "does not say which weights it serves as kl" in caplog.text
        with Endpoint(lambda b, n: completion("yes")) as endpoint:
            ask(endpoint, mine)
        assert "does not list its models" in caplog.text
        caplog.clear()
        written = Path(mine, "adapter_model.safetensors")
        os.utime(written, (2000, 2000))
        with serving(BASE, card("kl", mine, "org/base"), started=3000) as endpoint:
            ask(endpoint, mine)
        assert caplog.text == ""
        with serving(BASE, card("kl", mine, "org/base"), started=1000) as endpoint:
            ask(endpoint, mine)
        assert "was written after the server started" in caplog.text


def test_all_settings_are_sent_and_refusals_of_them_are_said() -> None:
    with serving(BASE) as endpoint:
        ask(endpoint)
        assert {name: endpoint.requests[0][name] for name in NEUTRAL_SAMPLING} == NEUTRAL_SAMPLING
        ask(endpoint, send_all_settings=False, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert not NEUTRAL_SAMPLING.keys() & endpoint.requests[1].keys()
        assert endpoint.requests[1]["chat_template_kwargs"] == {"enable_thinking": False}
    refuses = Endpoint(lambda b, n: error(400, "Unrecognized request argument supplied: top_k"))
    with refuses as endpoint, pytest.raises(UserError, match="refuses top_k.*send_all_settings: false"):
        ask(endpoint)


def test_settings_that_change_answers_are_part_of_their_key() -> None:
    def key(**settings: Any) -> dict[str, Any]:
        recipe = EvaluationRecipe(sampler="openai", endpoint=EndpointRecipe(**settings))
        return sampler_cache_key("openai", recipe, "org/base", None)

    assert key() == key(timeout=5, deadline=9, price_input=1) == {}  # as ever
    keys = [key(), key(send_all_settings=False), key(extra_body={"x": 1}), key(served="b")]
    assert all(one != other for i, one in enumerate(keys) for other in keys[:i])
