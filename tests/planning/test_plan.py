"""Memory, communication and time: one case by hand, and what must rise or fall with what."""

from dataclasses import replace

import pytest

from ema_scale.core.errors import UserError
from ema_scale.planning.arithmetic import flops_a_token
from ema_scale.planning.memory import GIB, host_memory, memory, total
from ema_scale.planning.model_shapes import PUBLISHED, Shape, from_config
from ema_scale.planning.plan import plan_run, scaled
from ema_scale.planning.setup import AUTOCAST, DEEPSPEED, FLOAT32, Setup, read_zero, setup_of
from ema_scale.planning.speed import DEVICES, Cluster, calibrated, parse_gpus, parse_scale, speed, traffic
from ema_scale.recipe import build_recipe

# Two layers of 4 wide: matrices 16 + 8 + 8 + 16 + 3 x 32 = 144, LoRA of rank 1: 8 + 6 + 6 + 8 + 3 x 12 = 64.
SMALL = Shape("small", 2, 4, 8, heads=2, kv_heads=1, head_dim=2, vocab=10, tied=False)
BY_HAND = Setup(SMALL, 2, 3, 3, 1, False, 1, None, FLOAT32)
LARGE = from_config("7b", PUBLISHED["qwen2.5-7b"])
KL = Setup(LARGE, 4, 2048, 2048, 4, True, 32, None, AUTOCAST, way="adapter_off", drift_every=10, buffers=4)
NODE = Cluster(8, 1, 80 * GIB, DEVICES["h100"])


def recipe(**changes):
    values = {
        "name": "run",
        "model": {"path": "Qwen/Qwen2.5-7B-Instruct"},
        "data": {"train": "not-here.jsonl"},
        "defenses": [{"kind": "kl"}],
    }
    return build_recipe({**values, **changes})


def test_memory_by_hand():
    # A layer's token: norms 32, attention 64 + 8 + mask 12, MLP 96, LoRA's inputs 16 + 16 + 32 and middles 28.
    assert {line.name: line.bytes for line in memory(BY_HAND, cuda=False)} == {
        "frozen weights": 4 * 388,
        "adapter": 4 * 128,
        "gradients": 4 * 128,
        "optimizer": 8 * 128,
        "stored activations": 2 * 6 * 304,
        "last hidden states": 6 * 4 * 12,
        "logits chunk": 4 * 6 * 10 * 3,
    }
    lines = memory(replace(BY_HAND, checkpointing=True, offload=True), cuda=False)
    assert "stored activations" not in {line.name for line in lines}


def test_operations_by_hand():
    # base 2 x 2 x 144, adapter 2 x 128, attention 4 x 2 layers x 4 x 3 positions, head 2 x 40
    assert flops_a_token(BY_HAND) == 2 * 576 + 3 * 256 + 3 * 96 + 2 * 80
    assert flops_a_token(replace(BY_HAND, checkpointing=True)) - flops_a_token(BY_HAND) == 576 + 256 + 96
    assert flops_a_token(replace(BY_HAND, way="two_stream")) - flops_a_token(BY_HAND) == 576 + 96 + 80
    assert flops_a_token(replace(BY_HAND, way="cached")) - flops_a_token(BY_HAND) == 80


def test_gathering_by_hand():
    links = replace(DEVICES["h100"], intra=10.0, inter=5.0)
    two = Cluster(2, 2, GIB, links, intra_latency=1.0, inter_latency=3.0)
    # Four GPUs: 3/4 of 100 bytes over a node's links, 1/2 over the two cards of a node; 2 steps inside, 1 between.
    assert two.gather_seconds(100, 0) == max(75 / 10, 50 / 10)
    assert two.gather_seconds(100, 4) == 75 / 10 + 4 * (2 * 1 + 1 * 3)
    assert replace(two, nodes=1).gather_seconds(100, 1) == 50 / 10 + 1
    assert replace(two, device=replace(links, inter=1.0)).gather_seconds(100, 0) == 50 / 2


def test_what_zero3_sends_by_hand():
    # tests/bench/test_step.py and tests/training/test_fsdp.py hold the same formula against counted bytes and calls.
    sharded = replace(BY_HAND, zero=3, accumulation=2)
    layers, embeddings, norm = 4 * (2 * 152 + 128), 4 * 40, 4 * 4
    plain = traffic(sharded, 4)
    # Two micro-batches: layers and norm forward and backward, embeddings and head.
    assert plain.gathered == 2 * (2 * layers + 2 * norm + 2 * embeddings) and plain.gather_calls == 2 * (4 + 2 + 2)
    assert plain.reduced == 2 * 4 * 128
    assert plain.into_a_gpu(4) == (plain.gathered * 3 / 4, plain.reduced * 3 / 4)
    for way in ("two_stream", "cached"):
        assert traffic(replace(sharded, way=way), 4) == plain
    again = traffic(replace(sharded, checkpointing=True), 4)
    assert (again.gathered - plain.gathered, again.gather_calls - plain.gather_calls) == (2 * embeddings, 2)
    second = traffic(replace(sharded, way="adapter_off"), 4)
    assert second.gathered - plain.gathered == 2 * (layers + norm + embeddings)
    assert second.gather_calls - plain.gather_calls == 2 * (2 + 2)
    read = traffic(replace(sharded, way="cached", drift_every=10), 4)
    assert read.gathered - plain.gathered == pytest.approx((second.gathered - plain.gathered) / 10)
    separate = traffic(replace(sharded, way="separate", other=SMALL), 4)
    assert separate.gathered - plain.gathered == 2 * 4 * SMALL.parameters
    assert traffic(sharded, 1).gathered == 0
    assert traffic(replace(sharded, zero=0), 4).reduced == 2 * 4 * 128  # once a step, round the ring twice


def test_what_fsdp_sends_by_hand():
    sharded = replace(BY_HAND, fsdp=True, accumulation=2, precision=AUTOCAST)
    layers, embeddings, norm = 2 * 2 * 152 + 4 * 128, 2 * 40, 2 * 4  # the adapter as it is stored, in float32
    plain = traffic(sharded, 4)
    assert plain.gathered == 2 * (2 * layers + norm + 3 * embeddings) and plain.gather_calls == 2 * (4 + 4)
    assert (plain.reduced, plain.reduce_calls) == (4 * 128, 2)  # at the end of a step
    second = traffic(replace(sharded, way="adapter_off"), 4)
    assert second.gathered - plain.gathered == 2 * (layers + embeddings)
    vain = traffic(replace(sharded, way="adapter_off", checkpointing=True), 4)
    assert vain.gathered - second.gathered == 2 * layers / 2


def test_offload_by_hand():
    away = replace(BY_HAND, zero=3, accumulation=2, weights_away=True, optimizer_away=True)
    sent = traffic(away, 4)
    # A GPU's part of what is gathered comes from its machine; gradients of each micro-batch go, the adapter returns.
    assert sent.host == sent.gathered / 4 + 3 * 4 * 128 / 4
    assert traffic(away, 1).host == sent.gathered + 3 * 4 * 128 and traffic(away, 1).gathered == 0
    assert {"frozen weights", "adapter", "gradients", "optimizer"}.isdisjoint(line.name for line in memory(away, 4))
    held = {line.name: line.bytes for line in host_memory(away, 2, 4)}
    assert held == {"weights and adapter": 2 * 4 * (388 + 128) / 4, "optimizer and gradients": 2 * (8 + 4) * 128 / 4}
    whole = {line.name: line.bytes for line in host_memory(replace(BY_HAND, fsdp=True), 2, 4)}
    assert whole == {"every process's whole base, while it loads": 2 * 4 * 388}
    slow = replace(NODE, device=replace(NODE.device, host=1.0))
    assert speed(away, slow).host == pytest.approx(traffic(away, 8).host)
    assert speed(away, slow).step > speed(replace(away, weights_away=False, optimizer_away=False), slow).step


def test_the_files_say_what_waits_in_the_machines_memory():
    plain, away = (
        setup_of(recipe(training={"deepspeed": f"launch/deepspeed/{n}.json"})) for n in ("zero3", "zero3_offload")
    )
    assert (plain.weights_away, plain.optimizer_away) == (False, False)
    assert (away.weights_away, away.optimizer_away, away.zero) == (True, True, 3)
    assert total(memory(plain, 8)) - total(memory(away, 8)) > 2 * LARGE.parameters / 8
    # Prefetching and reuse decide what stays gathered; a plan for a CPU's file, which has neither, keeps one layer.
    assert read_zero("launch/deepspeed/zero3_cpu.json").live(512) == 0
    assert read_zero("launch/deepspeed/zero3.json").live(512) == 10**9


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"batch": 8}, True), ({"tokens": 4096}, True), ({"checkpointing": False}, True), ({"rank": 64}, True),
        ({"states": 5}, True), ({"precision": FLOAT32}, True), ({"other": LARGE, "way": "separate"}, True),
        ({"zero": 3, "precision": DEEPSPEED}, False), ({"optimizer": 2}, False), ({"targets": ("q_proj",)}, False),
    ],
)  # fmt: skip
def test_memory_rises_and_falls(changes, more):
    before, after = (total(memory(setup, 8)) for setup in (KL, replace(KL, **changes)))
    assert (after > before) == more and after != before


def test_weights_are_shared_out_by_zero3_alone():
    held = {
        (zero, world): {line.name: line.bytes for line in memory(replace(KL, zero=zero, precision=DEEPSPEED), world)}
        for zero in (1, 2, 3)
        for world in (8, 16)
    }
    assert held[3, 8]["frozen weights"] == 2 * held[3, 16]["frozen weights"]
    assert held[2, 8]["frozen weights"] == held[2, 16]["frozen weights"]
    assert held[2, 8]["gradients"] == 2 * held[2, 16]["gradients"]
    assert held[1, 8]["gradients"] == held[1, 16]["gradients"]
    assert held[1, 8]["optimizer"] == 2 * held[1, 16]["optimizer"]


def test_time_rises_and_falls():
    sharded = replace(KL, zero=3, precision=DEEPSPEED, way="two_stream")
    beside = replace(NODE, overlap=True)
    plain = speed(sharded, beside)
    assert plain.overlapped and plain.step == plain.compute > plain.communication
    for on_top in (NODE, replace(NODE, overlap=False)):  # published steps under ZeRO-3 took the sum
        assert speed(sharded, on_top).step == plain.compute + plain.communication
    assert speed(replace(sharded, zero=0, fsdp=True), NODE).overlapped and speed(KL, NODE).overlapped
    fast, slow = (speed(sharded, replace(NODE, mfu=mfu)) for mfu in (0.4, 0.2))
    assert slow.compute == pytest.approx(2 * fast.compute) and (fast.reached, slow.reached) == (0.4, 0.2)
    twice = speed(replace(sharded, way="adapter_off"), beside)
    assert twice.overlapped and 1.4 < twice.communication / plain.communication < 1.5
    assert speed(replace(sharded, way="cached", drift_every=0), NODE).communication == plain.communication
    assert speed(replace(sharded, checkpointing=False), NODE).compute < plain.compute
    # The fewer tokens, the more communication counts; it takes over below the break-even.
    many = NODE.at(512)
    edge = int(speed(sharded, many).break_even_tokens / sharded.accumulation / sharded.batch)
    assert speed(replace(sharded, tokens=edge // 2, row_tokens=edge // 2), many).communication_rules
    assert not speed(replace(sharded, tokens=2 * edge, row_tokens=2 * edge), many).communication_rules
    # In a node, starting the kernels of however few tokens takes longer than gathering.
    assert plain.least > plain.communication and plain.break_even_tokens == 0
    assert not speed(replace(sharded, tokens=1, row_tokens=1), NODE).communication_rules


def test_a_measured_step_calibrates_the_arithmetic():
    planned = speed(KL, NODE)
    twice = calibrated(KL, NODE, 2 * planned.step)
    assert speed(KL, twice).step == pytest.approx(2 * planned.step) and twice.pace == pytest.approx(2)
    sharded = replace(KL, zero=3, precision=DEEPSPEED, way="two_stream")
    before = speed(sharded, NODE)
    assert speed(sharded, calibrated(sharded, NODE, 20)).step == pytest.approx(20)
    assert calibrated(sharded, NODE, 20).pace == pytest.approx((20 - before.communication) / before.compute)
    # Calibrated once more, the first calibration is forgotten.
    assert calibrated(KL, twice, 2 * planned.step) == twice
    for seconds, message in ((0.9 * before.communication, "communication alone"), (1.5, "more than the peak")):
        with pytest.raises(UserError, match=f"--measured-step: found .*{message}"):
            calibrated(sharded, NODE, seconds)


def test_a_reference_cache_takes_disk():
    cached = {"reference": "cached", "data": {"train": "not-here.jsonl", "max_length": 2048}}
    plan = plan_run(recipe(**cached), NODE, rows=6000, row_tokens=400)
    assert plan.cache == 6000 * 400 * 3584 * 2 == pytest.approx(17.2e9, rel=1e-3)
    # LDIFS reads five layers more, and rows that are mixed in are cached, too.
    safe = {"kind": "interleaving", "source": "safe.jsonl", "fraction": 0.5}
    more = plan_run(
        recipe(defenses=[{"kind": "kl"}, {"kind": "ldifs"}, safe], **cached), NODE, rows=6000, row_tokens=400
    )
    assert more.cache == 1.5 * 6 * plan.cache and more.to_dict()["reference_cache_bytes"] == more.cache
    assert plan_run(recipe(), NODE, rows=6000).cache == 0 and plan_run(recipe(**cached), NODE).cache is None


def test_on_more_gpus_communication_takes_longer():
    plans = scaled(plan_run(recipe(), NODE, zero=3), [8, 64, 512])
    assert [p.cluster.world for p in plans] == [8, 64, 512]
    times = [p.speed.communication for p in plans]
    assert times == sorted(times) and times[0] < times[-1]
    assert plans[0].needed > plans[-1].needed  # the same weights on more GPUs


def test_the_verdict_names_a_change_that_does_fit():
    tight = replace(NODE, gpus=1, memory=28 * GIB)
    plain = plan_run(recipe(training={"per_device_train_batch_size": 1}), tight)
    assert not plain.fits and plain.verdict.endswith("the cheapest change: training.gradient_checkpointing=true")
    assert plan_run(recipe(training={"per_device_train_batch_size": 1, "gradient_checkpointing": True}), tight).fits
    # Smaller micro-batches need nothing computed again.
    wide = plan_run(
        recipe(training={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}),
        replace(NODE, memory=40 * GIB),
    )
    assert wide.verdict.endswith("training.per_device_train_batch_size=1 training.gradient_accumulation_steps=4")
    large = recipe(model={"path": "Qwen/Qwen2.5-72B-Instruct"}, training={"gradient_checkpointing": True})
    assert "launch/deepspeed/zero3.json" in plan_run(large, NODE).verdict
    assert plan_run(large, NODE, zero=3).fits
    # What ZeRO-3 alone does not make fit, its offload does: on one GPU there is nothing to share out.
    one = plan_run(large, replace(NODE, gpus=1))
    assert "training.deepspeed=launch/deepspeed/zero3_offload.json" in one.verdict
    away = large.training.model_copy(update={"deepspeed": "launch/deepspeed/zero3_offload.json"})
    assert plan_run(large.model_copy(update={"training": away}), replace(NODE, gpus=1)).fits
    assert "no change of this recipe" in plan_run(large, replace(NODE, gpus=1, memory=4 * GIB)).verdict


def test_steps_and_gpu_hours():
    plan = plan_run(recipe(training={"num_train_epochs": 2}), NODE, rows=1000)
    assert plan.steps == 2 * 8  # 1,000 rows by 4 x 4 x 8
    assert plan.gpu_hours == pytest.approx(16 * plan.speed.step * 8 / 3600)
    assert plan_run(recipe(training={"max_steps": 7}), NODE).steps == 7
    assert plan_run(recipe(), NODE).gpu_hours is None
    packed = recipe(training={"packing": True})
    assert plan_run(packed, NODE, rows=10240, row_tokens=256).steps == 10  # 1,280 sequences of 2,048


def test_the_recipe_decides_the_reference_and_the_precision():
    assert setup_of(recipe()).way == "adapter_off"
    assert setup_of(recipe(), zero=3).way == "two_stream"
    assert setup_of(recipe(training={"fsdp": True})).way == "two_stream"
    assert setup_of(recipe(training={"num_train_epochs": 3})).way == "cached"
    assert setup_of(recipe(defenses=[])).way is None
    assert setup_of(recipe(reference={"model": "Qwen/Qwen2.5-0.5B"})).other.hidden == 896
    assert setup_of(recipe()).precision == AUTOCAST and setup_of(recipe(), zero=2).precision == DEEPSPEED
    assert setup_of(recipe(model={"path": "Qwen/Qwen2.5-7B", "dtype": "float32"})).precision == FLOAT32
    assert setup_of(recipe(training={"fsdp": True})).precision == AUTOCAST
    assert setup_of(recipe(training={"deepspeed": "launch/deepspeed/zero2.json"})).zero == 2
    assert setup_of(recipe(defenses=[{"kind": "ldifs"}])).states == 5


@pytest.mark.parametrize("text", ["8", "x80GB", "0x80GB", "8x", "8x80TB", "eightx80GB"])
def test_gpus_that_cannot_be_read_are_said(text):
    with pytest.raises(UserError, match=r"--gpus: found .*8x80GB"):
        parse_gpus(text)


def test_gpus_and_scales():
    assert parse_gpus("8x80GB") == (8, 80 * GIB) and parse_gpus("2 x 23.5 gib") == (2, int(23.5 * GIB))
    assert parse_scale("8-64") == [8, 16, 32, 64] and parse_scale("8,24") == [8, 24]
    for text in ("", "8-", "many", "0-8", "64-8"):
        with pytest.raises(UserError, match="--scale: found"):
            parse_scale(text)
    assert (NODE.at(4).gpus, NODE.at(4).nodes, NODE.at(64).nodes) == (4, 1, 8)
    with pytest.raises(UserError, match="multiple of the 8"):
        NODE.at(12)


def test_fsdp_shares_out_what_zero3_does():
    held = {line.name: line.bytes for line in memory(setup_of(recipe(training={"fsdp": True})), 8)}
    assert held["frozen weights"] == 2 * LARGE.parameters / 8
    whole = {line.name: line.bytes for line in memory(setup_of(recipe()), 8)}
    assert held["optimizer"] == whole["optimizer"] / 8 and "gathered weights" not in whole


def test_what_cannot_be_planned_is_said(tmp_path):
    with pytest.raises(UserError, match="both fsdp and deepspeed"):
        setup_of(recipe(training={"fsdp": True, "deepspeed": "launch/deepspeed/zero3.json"}))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="training.deepspeed: .*broken.json"):
        setup_of(recipe(training={"deepspeed": str(tmp_path / "broken.json")}))
    with pytest.raises(UserError, match=r"adapter.target_modules: found 'qkv'"):
        setup_of(recipe(adapter={"target_modules": ["qkv"]}))
