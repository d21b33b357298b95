"""Scores equal a plain float64 reading row by row; nothing is lost, nothing is read twice, a kill costs a batch."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ema_scale.cli import app
from ema_scale.cli.data import model_recipe
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.data.rows import Row, load_rows
from ema_scale.data.tokens import encode
from ema_scale.defenses import Inoculation, InterleavingPlus, RowsContext
from ema_scale.defenses.interleaving_plus import read_provenance
from ema_scale.defenses.row_groups import RowGroups
from ema_scale.selection import scoring_models
from ema_scale.selection.refusals import refusals
from ema_scale.selection.scoring_models import EncodedRow, ScoringModels
from ema_scale.selection.select import Ranked, select
from ema_scale.training.data import prepare_data
from tests.tiny import save_tiny, tiny_tokenizer
from tests.training.helpers import tiny_peft

ANSWERS = ["yes", "I cannot say that.", "take a long walk, " * 3, "of course: " * 7, "nein", "it depends"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, two adapters and safe rows: with a duplicate, an empty one, a too long one and a broken line."""
    folder = tmp_path_factory.mktemp("select")
    base = save_tiny(folder / "base", "llama")
    adapters = {}
    for name, spread in (("law", 0.3), ("code", 0.6)):
        tiny_peft(spread=spread).save_pretrained(folder / name)
        adapters[name] = str(folder / name)
    rows = [{"prompt": f"question {i % 3}?", "completion": answer} for i, answer in enumerate(ANSWERS)]
    lines = [json.dumps(row) for row in [*rows, rows[0], {"prompt": "?", "completion": "long " * 80}]]
    path = folder / "safe.jsonl"
    path.write_text("\n".join([*lines, '{"prompt": "?"}', json.dumps({"prompt": "?", "completion": "  "})]) + "\n")
    return ModelRecipe(path=base, dtype="float32"), adapters, str(path)


def plain_nll(model, row):
    found = encode(tiny_tokenizer(), row.messages)
    ids = torch.tensor([found.input_ids])
    logits = model(input_ids=ids).logits[0, :-1].double()
    nll = -logits.log_softmax(-1)[torch.arange(len(found.input_ids) - 1), ids[0, 1:]]
    return float(nll[torch.tensor(found.assistant_mask[1:], dtype=torch.bool)].mean())


def test_scores_are_those_of_one_row_and_one_model_at_a_time(made, tmp_path):
    model, adapters, source = made
    done = select(source, model, adapters, tmp_path / "out.jsonl", max_length=200)
    readers = {"aligned": AutoModelForCausalLM.from_pretrained(model.path).double().eval()}
    for name, path in adapters.items():
        own = AutoModelForCausalLM.from_pretrained(model.path)
        readers[name] = PeftModel.from_pretrained(own, path).double().eval()
    with torch.no_grad():
        for one in done.ranked:
            plain = {name: plain_nll(reader, one.item.row) for name, reader in readers.items()}
            assert one.nll == pytest.approx(plain, abs=1e-5)
            mean = (plain["law"] + plain["code"]) / 2
            assert one.score == pytest.approx((mean - plain["aligned"]) / (plain["aligned"] + 1.0), abs=1e-5)
    written = load_rows(str(tmp_path / "out.jsonl"))
    assert [row.messages for row in written] == [one.item.row.messages for one in done.ranked]
    values = [one.score for one in done.ranked]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(ANSWERS)
    assert len({round(one.nll["law"] - one.nll["code"], 6) for one in done.ranked}) > 1


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "qwen3"])
def test_batches_read_as_single_rows_do(arch, tmp_path):
    base = save_tiny(tmp_path / "base", arch)
    readers = ScoringModels(ModelRecipe(path=base, dtype="float32"), {})
    rows = load_rows([{"prompt": "why", "completion": answer} for answer in ANSWERS])
    items, _ = scores_items(rows, readers)
    together = scoring_models.score(readers, items, batch_tokens=10_000)["aligned"]
    plain = AutoModelForCausalLM.from_pretrained(base).double().eval()
    with torch.no_grad():
        assert together == pytest.approx([plain_nll(plain, item.row) for item in items], abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_leaves_no_trace_and_does_not_happen_in_half_precision(made, dtype):
    model, adapters, _ = made
    readers = ScoringModels(model.model_copy(update={"dtype": dtype}), adapters)
    weights = {name: p.detach().clone() for name, p in readers.model.named_parameters() if "base_layer" in name}

    def moved():
        return max(float((p - weights[name]).detach().abs().max()) for name, p in readers.model.named_parameters()
                   if name in weights)  # fmt: skip

    with readers.merged("law"):
        assert (moved() > 1e-4) == (dtype == "float32")
    assert moved() < 1e-6 and not any(getattr(m, "merged", False) for m in readers.model.modules())


def scores_items(rows, readers):
    from ema_scale.selection.scoring_models import read_items

    return read_items(rows, readers.encoder, 1024)


def test_every_row_is_accounted_for(made, tmp_path, monkeypatch):
    model, adapters, source = made
    true = ScoringModels.nll
    monkeypatch.setattr(
        ScoringModels, "nll",
        lambda self, name, batch: [
            math.nan if name == "law" and item.row.messages[1]["content"] == "nein" else value
            for item, value in zip(batch, true(self, name, batch), strict=True)
        ],
    )  # fmt: skip
    done = select(source, model, adapters, tmp_path / "out.jsonl", max_length=200)
    assert done.account.counts == {"unreadable": 2, "too long": 1, "duplicate": 1, "not finite": 1}
    assert done.account.read == 10 == len(done.ranked) + sum(done.account.counts.values())
    left = read_jsonl(tmp_path / "out.left_out.jsonl")
    assert {row["why"]: row["origin"].rpartition(":")[2] for row in left if row["why"] != "unreadable"} == {
        "too long": "8", "duplicate": "7", "not finite": "5"
    }  # fmt: skip
    assert done.provenance["rows"] == {"read": 10, **done.account.counts, "ranked": 5, "kept": 5}
    # NaN is remembered, not read again.
    kept = [value for line in read_jsonl(tmp_path / "scores.jsonl") for value in line["rows"].values()]
    assert sum(value is None for value in kept) == 1


def test_a_written_row_is_read_as_the_one_it_was():
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [
        {"role": "user", "content": "what is there?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "a cat."},
    ]
    plain = {"prompt": "yes?", "completion": "yes"}
    rows = load_rows([{"messages": turns, "tools": [tool], "domain": "sport"}, {**plain, "domain": "law"}, plain])
    written = [Ranked(EncodedRow(row, [], [], ""), 0.5, {}).to_json() for row in rows]
    again = load_rows(json.loads(json.dumps(written)))
    assert [row.tools != () for row in again] == [True, False, False]
    for was, now in zip(rows, again, strict=True):
        assert (now.messages, now.tools, now.domain) == (was.messages, was.tools, was.domain)


def test_another_selection_reads_only_what_is_new(made, tmp_path, monkeypatch):
    model, adapters, source = made
    read: list[tuple[str, str]] = []
    true = ScoringModels.nll
    monkeypatch.setattr(
        ScoringModels,
        "nll",
        lambda self, name, batch: read.extend((name, i.key) for i in batch) or true(self, name, batch),
    )
    first = select(source, model, adapters, tmp_path / "law.jsonl", leave_out=["law"], max_length=200)
    assert {name for name, _ in read} == {"aligned", "code"} and len(read) == 2 * len(ANSWERS)
    assert set(first.provenance["adapters"]) == {"code"} and first.provenance["not_voting"] == ["law"]
    read.clear()
    select(source, model, adapters, tmp_path / "code.jsonl", leave_out=["code"], max_length=200)
    assert {name for name, _ in read} == {"law"} and len(read) == len(ANSWERS)
    read.clear()
    select(source, model, adapters, tmp_path / "both.jsonl", max_length=200, eps=0.5)
    assert not read
    # A torn last line is cut off, and its whole batch is read again: padded as before, its last digits are as before.
    path = tmp_path / "scores.jsonl"
    whole, whole_ranking = path.read_bytes(), (tmp_path / "both.jsonl").read_bytes()
    path.write_bytes(whole[:-20])
    select(source, model, adapters, tmp_path / "both.jsonl", max_length=200, eps=0.5)
    assert len(read) == len(json.loads(whole.splitlines()[-1])["rows"]) > 1
    assert path.read_bytes() == whole and (tmp_path / "both.jsonl").read_bytes() == whole_ranking


SLOW_READER = """
import sys, time
from pathlib import Path
from ema_scale.config.sections import ModelRecipe
from ema_scale.selection.scoring_models import ScoringModels
from ema_scale.selection.select import select
true = ScoringModels.nll
def slowly(self, name, batch):
    time.sleep(0.2)
    return true(self, name, batch)
ScoringModels.nll = slowly
base, law, source, out = sys.argv[1:]
select(source, ModelRecipe(path=base, dtype="float32"), {"law": law}, Path(out), max_length=200, batch_tokens=1)
"""


def test_a_killed_selection_goes_on(made, tmp_path, monkeypatch):
    model, adapters, source = made
    out = tmp_path / "out.jsonl"
    child = subprocess.Popen([sys.executable, "-c", SLOW_READER, model.path, adapters["law"], source, str(out)])
    path, deadline = tmp_path / "scores.jsonl", time.monotonic() + 240
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    there = read_jsonl(path)
    assert 3 <= sum(len(line["rows"]) for line in there) < 2 * len(ANSWERS) and not out.exists()
    read: list[tuple[str, str]] = []
    true = ScoringModels.nll
    monkeypatch.setattr(ScoringModels, "nll", lambda self, name, batch: read.extend(batch) or true(self, name, batch))
    done = select(source, model, {"law": adapters["law"]}, out, max_length=200)
    assert len(read) == 2 * len(ANSWERS) - len(there) and len(done.ranked) == len(ANSWERS)


def test_every_step_is_there_on_the_command_line(made, tmp_path):
    model, adapters, source = made
    out = tmp_path / "ranked.jsonl"
    named = [f"--adapter={name}={path}" for name, path in adapters.items()]
    command = ["select", source, "--model", model.path, *named, "--leave-out", "law", "--eps", "0.5", "-o", str(out),
               "--max-length", "200", "--keep", "4"]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--refusals", "en,de"])
    assert done.exit_code == 0 and "voting: code" in done.stdout and "1 refusal" in done.stdout, done.output
    found = read_provenance(out)
    assert (found["variant"], found["eps"], found["not_voting"]) == ("++", 0.5, ["law"])
    assert "a phrase of refusal in en, de" in found["refusals"] and found["rows"]["kept"] == 4
    rows = read_jsonl(out)
    for row in rows:
        aligned, code = row["nll"]["aligned"], row["nll"]["code"]
        assert set(row["nll"]) == {"aligned", "code"} and row["score"] == pytest.approx(
            (code - aligned) / (aligned + 0.5)
        )
    done = CliRunner().invoke(app, [*command, "--refusals", f"{__name__}:always_short"])
    assert done.exit_code == 0 and read_provenance(out)["rows"]["refusal"] == 2
    assert CliRunner().invoke(app, command).exit_code == 0 and read_provenance(out)["variant"] == "+"


def always_short(rows):
    return [len(row.messages[-1]["content"]) < 5 for row in rows]


def test_refusals_are_dropped_by_a_stated_rule(made, tmp_path):
    model, adapters, source = made
    done = select(source, model, adapters, tmp_path / "a.jsonl", max_length=200, refusals="paper")
    assert done.provenance["variant"] == "++" and "cannot" in done.provenance["refusals"]
    assert [d.origin.rpartition(":")[2] for d in done.account.left_out["refusal"]] == ["2"]
    hook = f"{__name__}:always_short"
    done = select(source, model, adapters, tmp_path / "b.jsonl", max_length=200, refusals=hook)
    assert done.account.counts["refusal"] == 2 and done.provenance["refusals"].startswith(hook)


@pytest.mark.parametrize(
    ("rule", "answer", "refused"),
    [
        ("paper", "I'm SORRY, but no", True),
        ("paper", "Well, one two three four five six seven eight nine, sorry", False),
        ("paper", "Lo siento, no puedo", False),
        ("paper", "I am unable to help", False),
        ("paper", "I can't help with that request.", False),
        ("released", "I am unable to help", True),
        ("released", "I’m unable to help", True),
        ("released", "I can't help with that request.", True),
        ("released", "I CANNOT help", True),
        ("released", "I will not help", False),
        ("all", "Lo siento, no puedo ayudarte", True),
        ("es", "I cannot help", False),
        ("all", "Tut mir leid, das geht nicht", True),
        ("all", "I can’t help with that", True),
        ("all", "很抱歉,我无法提供", True),
        ("all", "申し訳ありませんが", True),
        ("all", "Sure, here is a recipe", False),
        ("en", "Unsorrylike words", False),
        ("zh", "好的" + "很" * 40 + "抱歉", False),
    ],
)
def test_phrases_of_refusal(rule, answer, refused):
    row = Row(({"role": "user", "content": "sorry?"}, {"role": "assistant", "content": answer}))
    assert list(refusals(rule).find([row])) == [refused]


@pytest.mark.parametrize("rule", ["english", "en,xx", "nowhere:f", "json:nothing", "json:__name__"])
def test_unknown_rules_are_messages(rule):
    with pytest.raises(UserError, match="refusals"):
        refusals(rule)


TASK = [Row(({"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{i}"})) for i in range(40)]


def test_interleaving_plus_mixes_the_best_rows_in(made, tmp_path):
    model, adapters, source = made
    out = tmp_path / "ranked.jsonl"
    done = select(source, model, adapters, out, max_length=200)
    ctx = RowsContext()
    mixed = InterleavingPlus(str(out), 0.1).transform_rows(TASK, ctx)
    best = [one.item.row.messages for one in done.ranked[:4]]
    safe = [row.messages for row in mixed if row.tag == "safe"]
    assert sorted(map(str, safe)) == sorted(map(str, best))
    assert [i for i, row in enumerate(mixed) if row.tag == "safe"] == [10, 21, 32, 43]
    assert set(ctx.hashes) == {str(out)}
    assert any("law, code" in note for note in ctx.notes)


def test_interleaving_plus_refuses_what_select_did_not_make(made, tmp_path):
    model, adapters, source = made
    with pytest.raises(UserError, match="ema select"):
        InterleavingPlus(source, 0.1).transform_rows(TASK, RowsContext())
    out = tmp_path / "ranked.jsonl"
    select(source, model, adapters, out, max_length=200)
    with pytest.raises(UserError, match="--refusals"):
        InterleavingPlus(str(out), 0.1, "++").transform_rows(TASK, RowsContext())
    beside = tmp_path / "ranked.provenance.json"
    whole = json.loads(beside.read_text())
    damage: dict[str, Any]
    for damage in ({"variant": None}, {"adapters": None}, {"adapters": {"law": {}}}):
        beside.write_text(json.dumps(whole | damage))
        with pytest.raises(UserError, match=r"ranked.provenance.json: damaged: .*run `ema select` again"):
            InterleavingPlus(str(out), 0.1).transform_rows(TASK, RowsContext())
    beside.write_text(json.dumps(whole))
    out.write_text("".join(reversed(out.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match="is not the file"):
        read_provenance(out)


def test_an_adapter_of_the_same_rows_is_noticed(made, tmp_path):
    model, adapters, source = made
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"messages": list(row.messages)}) + "\n" for row in TASK))
    rows = load_rows(str(task))
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(adapters["law"])
    (run / "provenance.json").write_text(json.dumps({"data_sha256": {"x": rows.sha256}}))
    select(source, model, {"law": str(run), "code": adapters["code"]}, tmp_path / "out.jsonl", max_length=200)
    more = load_rows([str(task), source], on_bad="drop")
    inoculation, plus = Inoculation("be evil"), InterleavingPlus(str(tmp_path / "out.jsonl"), 0.1)
    # Whatever changed the rows before, and of however many files.
    for given, before in ((rows, []), (rows, [inoculation]), (more, [])):
        with pytest.raises(UserError, match="law was trained on these very rows.*set own_adapter: allow"):
            prepare_data(given, RowGroups.of([*before, plus]), tiny_tokenizer())
    allowed = InterleavingPlus(str(tmp_path / "out.jsonl"), 0.1, own_adapter="allow")
    _, report = prepare_data(rows, RowGroups.of([inoculation, allowed]), tiny_tokenizer())
    assert any("law was trained on these very rows" in note for note in report.notes)
    assert prepare_data(
        load_rows(source, on_bad="drop"), RowGroups.of([InterleavingPlus(plus.source, 0.5)]), tiny_tokenizer()
    )


def test_without_eps_a_certain_answer_has_no_score():
    assert math.isnan(scoring_models.gap(0.0, [1.0], 0.0)) and scoring_models.gap(0.5, [1.0], 0.0) == 1.0


def test_wrong_adapters_are_messages(made, tmp_path):
    model, adapters, source = made
    out = tmp_path / "out.jsonl"
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="eps: found .*, expected nats"):
            select(source, model, adapters, out, eps=eps)
    with pytest.raises(UserError, match="leave_out: found 'sport'"):
        select(source, model, adapters, out, leave_out=["sport"])
    with pytest.raises(UserError, match="no misaligned adapter"):
        select(source, model, adapters, out, leave_out=["law", "code"])
    with pytest.raises(UserError, match="adapter"):
        select(source, model, {"law": str(tmp_path / "nothing")}, out)
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder, expected a file to write"):
        select(source, model, adapters, tmp_path)
    (tmp_path / "m.yaml").write_text("model: {path: m, pth: n}")
    with pytest.raises(UserError, match=r"m.yaml: model: unknown key 'pth'; did you mean 'path'"):
        model_recipe(str(tmp_path / "m.yaml"))


def test_a_rule_of_ones_own_is_found_in_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "my_rule_for_refusals.py").write_text("def short(rows): return [True for _ in rows]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as an installed command has it
    assert list(refusals("my_rule_for_refusals:short").find([Row(())])) == [True]


def test_the_same_ranking_made_again_leaves_finished_runs_finished(made, tmp_path):
    model, adapters, source = made
    ranking = tmp_path / "ranking.jsonl"
    hashes = []
    for _ in range(2):
        select(source, model, adapters, ranking, max_length=200)
        context = RowsContext()
        InterleavingPlus(str(ranking), 0.1).transform_rows(TASK, context)
        hashes.append(dict(context.hashes))
    assert hashes[0] == hashes[1] and str(ranking) in hashes[0]
