"""A finished run for other tools: its card, the merged model, the upload to a hub (a local server in its place)."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_scale.cli.share import merge, push
from ema_scale.core.errors import UserError
from ema_scale.core.hashing import folder_identity
from ema_scale.core.run_dir import RunDir
from ema_scale.recipe import build_recipe
from ema_scale.report.model_card import write_card
from ema_scale.training.run import train
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b c"}]}
    (folder / "secret place.jsonl").write_text((json.dumps(row) + "\n") * 8)
    recipe = build_recipe(
        {
            "name": "run",
            "output": str(folder / "runs"),
            "model": {"path": save_tiny(folder / "base"), "dtype": "float32"},
            "data": {"train": str(folder / "secret place.jsonl"), "max_length": 64},
            "adapter": {"r": 4, "alpha": 8},
            "defenses": [{"kind": "kl", "strength": 0.3}],
            "training": {
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "save_steps": 2,
                "learning_rate": 0.05,
                "warmup_steps": 0,
                "report_to": [],
            },
        }
    )
    return train(recipe, RunDir(recipe.run_path)).path


def test_the_card_says_what_the_adapter_was_made_from_and_no_folder(run: Path) -> None:
    before = folder_identity(str(run / "adapter"))
    path = write_card(RunDir(run))
    assert path is not None
    text = path.read_text()
    for part in (
        "library_name: peft",
        "under KL 0.3",
        "kl | strength=0.3",
        "secret place.jsonl",
        "learning_rate",
        "Seed 0",
    ):
        assert part in text, part
    assert "Not measured yet." in text and str(run.parent.parent) not in text
    assert folder_identity(str(run / "adapter")) == before, "answers must not be asked anew for a card"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 12)[None]).logits


def test_the_merged_model_says_what_base_and_adapter_say(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    base = run.parent.parent / "base"
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter"))
    merge(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), expected, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert AutoConfig.from_pretrained(tmp_path / "merged").vocab_size == merged.config.vocab_size
    before = (tmp_path / "merged" / "model.safetensors").stat()
    merge(run, tmp_path / "merged")  # the same again: nothing to do
    assert (tmp_path / "merged" / "model.safetensors").stat() == before
    with pytest.raises(UserError, match="holds other files already"):
        merge(run, tmp_path / "merged", checkpoint=2)
    merge(run, tmp_path / "early", checkpoint=2)
    early = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "early"))
    assert not torch.allclose(early, expected, atol=1e-3), "a checkpoint is not the end"


def test_what_cannot_be_merged_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="holds other files already"):
        merge(run, tmp_path / "full")
    with pytest.raises(UserError, match="no run here"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="checkpoint-9: no adapter there"):
        merge(run, tmp_path / "out", checkpoint=9)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload needs. It keeps what was committed."""

    committed: dict[str, bytes] = {}
    created: list[dict[str, Any]] = []
    refuse: int | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if Hub.refuse:
            return self._answer({"error": "no"}, Hub.refuse)
        if self.path == "/api/repos/create":
            Hub.created.append(json.loads(body))
            return self._answer({"url": f"{self._address()}/me/run"})
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]}
            )
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"{self._address()}/me/run/commit/1", "commitOid": "1"})
        return self._answer({})

    def do_GET(self) -> None:
        self._answer({"id": "me/run", "siblings": [], "sha": "0", "tags": [], "downloads": 0, "private": True})

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    import huggingface_hub.constants as constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.committed, Hub.created, Hub.refuse = {}, [], None
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_upload_brings_adapter_tokenizer_and_card_and_nothing_else(run: Path, hub: type[Hub]) -> None:
    push(run, "me/run")
    assert hub.created[0]["name"] == "run" and "private" in str(hub.created[0])
    local = {p.relative_to(run / "adapter").as_posix() for p in (run / "adapter").rglob("*") if p.is_file()}
    assert set(hub.committed) == local >= {"adapter_model.safetensors", "README.md", "tokenizer.json"}
    for name, content in hub.committed.items():
        assert content == (run / "adapter" / name).read_bytes()


def test_a_dry_run_uploads_nothing(run: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    push(run, "me/run", dry_run=True)
    assert not hub.created and "adapter_model.safetensors" in capsys.readouterr().out


def test_a_hub_that_refuses_is_named_with_what_to_do(run: Path, hub: type[Hub]) -> None:
    hub.refuse = 403
    with pytest.raises(UserError, match=r"me/run: the hub refused the upload \(403\); set HF_TOKEN"):
        push(run, "me/run")
    hub.refuse = None
    with pytest.raises(UserError, match="expected a repository's name"):
        push(run, "not a name")
