"""What a run logs of its speed: tokens, utilisation, the reference's share of the time."""

import time

import pytest
import torch

from ema_scale.core.cuda_timer import Stopwatch
from ema_scale.defenses import KL
from ema_scale.models.flops import flops
from ema_scale.training import metrics
from tests.training.helpers import make_trainer, tiny_peft, token_rows


def logged(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_stopwatch_counts_what_is_inside():
    watch, began = Stopwatch(), time.perf_counter()
    for _ in range(2):
        with watch.running(torch.device("cpu")):
            time.sleep(0.02)
        time.sleep(0.02)
    assert 0.04 <= watch.take() <= time.perf_counter() - began - 0.04
    assert watch.take() == 0


@pytest.mark.parametrize("way", ["adapter_off", "two_stream", "cached"])
def test_the_reference_has_its_share_of_the_time(tmp_path, monkeypatch, way):
    monkeypatch.setenv("EMA_CACHE", str(tmp_path / "cache"))
    rows = logged(make_trainer(tmp_path, defenses=[KL(0.1)], reference=way, drift_every=0))
    assert len(rows) == 3 and all(0 < row["reference_share"] < 1 for row in rows)


def test_a_run_without_a_reference_has_no_share(tmp_path):
    assert not any("reference_share" in row for row in logged(make_trainer(tmp_path, drift_every=0)))


def test_utilisation_is_what_the_tokens_need_of_what_the_device_could_do(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "device_peak", lambda: 1e9)
    rows, model = token_rows(), tiny_peft()
    lengths = rows["length"]
    learned = sum(label != -100 for labels in rows["labels"] for label in labels) / sum(lengths)
    context = sum(n * n for n in lengths) / sum(lengths) / 2
    needed = flops(model, context, labelled=learned).training
    for row in logged(make_trainer(tmp_path, model, rows, drift_every=0)):
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * needed / 1e9)


def test_where_the_peak_is_not_known_there_is_no_utilisation(tmp_path):
    assert metrics.device_peak() is None or torch.cuda.is_available()
    if not torch.cuda.is_available():
        assert not any("mfu" in row for row in logged(make_trainer(tmp_path)))
