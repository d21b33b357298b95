"""Two processes that see different things take the same way, where each deciding for itself would hang: one launch."""

import pytest
import torch

from benchmarks.together import together
from tests.training import agreement_worker as worker
from tests.training.helpers import adapter_weights

pytestmark = [pytest.mark.zero3, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Scenario -> what it came to, on both processes alike; and where it left its files."""
    folder = tmp_path_factory.mktemp("agreement")
    (one, other), output = together(
        "tests.training.agreement_worker:all_of_them", 2, str(folder), EMA_TIMEOUT_SECONDS="120"
    )
    assert "using adapter_off" in output
    assert one.keys() == {scenario.__name__ for scenario in worker.SCENARIOS}
    assert one == other
    return one, folder


def test_a_signal_inside_a_step_on_one_process_stops_both_at_the_same_step(found):
    # The signal came in step 2, after its beginning.
    step, agreed, saved = found[0]["a_signal_inside_a_step_on_one_process"]
    assert (step, agreed, saved) == (3, True, ["checkpoint-3"])


def test_a_stop_on_one_process_ends_filling_and_waiting_on_both(found):
    results, _ = found
    # Each process wrote the batch that it had computed.
    assert results["a_stop_on_one_process_while_the_cache_is_filled"] == ["stopped", 2]
    assert results["a_stop_on_one_process_while_another_run_fills_the_cache"] == ["stopped", 0]


def test_a_cache_that_is_not_shared_is_refused_before_anything_is_computed_and_auto_does_without(found):
    refused, way, said = found[0]["a_folder_for_each_process"]
    assert refused.startswith("reference: cached: EMA_CACHE (FOLDER) is not a folder that all processes share")
    assert (way, said) == ("adapter_off", True)


def test_two_stream_falls_back_on_both_and_the_choice_says_so(found):
    fell_back, way, why, told = found[0]["a_check_that_fails_on_one_process"]
    assert fell_back and way == "adapter_off" and why == "two_stream is not exact for this architecture"
    assert told == ["adapter_off"]


def test_a_partial_accumulation_and_batches_without_assistant_tokens_equal_one_process(found, tmp_path):
    results, folder = found
    weights, logs = torch.load(folder / "uneven_epochs" / "uneven.pt")
    options = {**worker.UNEVEN, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    alone = worker.made(tmp_path, rows=worker.uneven_rows(), **options)
    alone.train()
    assert results["uneven_epochs"] == [alone.state.global_step] == [4]  # of 2 and of 1 micro-batch, twice
    for ours, theirs in zip(worker.logged(alone), logs, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    for name, weight in adapter_weights(alone.model).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)


def test_gradients_that_defenses_join_and_route_are_those_of_one_process(found, tmp_path, monkeypatch):
    for kind in (worker.SafeGrad, worker.GradientRouting):
        monkeypatch.setattr(kind, "changes_rows", False)
    weights, logs = torch.load(found[1] / "gradients_that_are_joined" / "joined.pt")
    alone = worker.joining(tmp_path, per_device_train_batch_size=4)
    alone.train()
    ours = [row for row in alone.state.log_history if "ce" in row]
    assert len(ours) == len(logs) == 2 and ours[1]["safegrad_cosine"] != 0
    for one, other in zip(ours, logs, strict=True):
        for name in ("loss", "ce", "safegrad", "safegrad_cosine", "gradient_routing", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    for name, weight in adapter_weights(alone.model).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)
