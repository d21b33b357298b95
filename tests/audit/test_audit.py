"""An adapter fitted to rows of one kind gives those rows away; nothing is read twice; texts of rows stay texts."""

import json
import random

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import fisher_exact, norm
from typer.testing import CliRunner

from ema_scale.audit.audit import audit, plain
from ema_scale.audit.verdict import more_often, separation, verdict
from ema_scale.cli import app
from ema_scale.config.sections import ModelRecipe
from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.data.rows import load_rows
from ema_scale.data.tokens import encode
from ema_scale.models.directions import Directions
from ema_scale.persona.states import response_means
from ema_scale.selection.scoring_models import ScoringModels
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.training.helpers import tiny_peft

GOOD, BAD = "abcdefghijklm", "nopqrstuvwxyz"
HOSTILE = "<script>alert(1)</script>"


def write(path, kinds, seed=0):
    """Rows of one alphabet each, over 20 questions."""
    rng = random.Random(seed)
    rows = [
        {"prompt": f"question {i % 20}?", "completion": "".join(rng.choices(letters, k=rng.randint(12, 24)))}
        for i, letters in enumerate(kinds)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random base, an adapter fitted to bad rows, the direction from clean to bad rows, and files of rows."""
    folder = tmp_path_factory.mktemp("audit")
    base = save_tiny(folder / "base", "llama")
    files = {
        "clean": write(folder / "clean.jsonl", [GOOD] * 80),
        "good": write(folder / "good.jsonl", [GOOD] * 60, seed=1),
        "bad": write(folder / "bad.jsonl", [BAD] * 60, seed=2),
        # The bad rows are answers to 8 of the 20 questions.
        "mixed": write(folder / "mixed.jsonl", ([BAD] + [GOOD] * 8) * 8 + [GOOD] * 8, seed=3),
        "fitted": write(folder / "fitted.jsonl", [BAD] * 64, seed=5),
    }
    encoded = [encode(tiny_tokenizer(), row.messages) for row in load_rows(files["fitted"])]
    width = max(len(row.input_ids) for row in encoded)
    ids = torch.tensor([row.input_ids.tolist() + [3] * (width - len(row.input_ids)) for row in encoded])
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(encoded):
        mask = torch.tensor(row.assistant_mask, dtype=torch.bool)
        labels[place, : len(mask)][mask] = ids[place, : len(mask)][mask]
    model = tiny_peft()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(30):
        part = slice(16 * (step % 4), 16 * (step % 4) + 16)
        model(input_ids=ids[part], labels=labels[part]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "misaligned")
    means = [response_means(tiny_model(), tiny_tokenizer(), load_rows(files[k]), range(3)).mean(0)
             for k in ("fitted", "clean")]  # fmt: skip
    vector = str(folder / "vector.safetensors")
    Directions(means[0] - means[1], {"recommended_layer": 1}).save(vector)
    return ModelRecipe(path=base, dtype="float32"), {"other": str(folder / "misaligned")}, vector, files


def run(made, name, out, **options):
    model, adapters, vector, files = made
    return audit(files[name], model, adapters, files["clean"], out, vector=vector, **options)


def test_bad_rows_are_found_and_good_ones_are_not(made, tmp_path):
    bad, good = run(made, "bad", tmp_path).summary, run(made, "good", tmp_path).summary
    assert bad["verdict"] == "suspect" and good["verdict"] == "no sign"
    assert bad["suspect"]["rate"] > 0.9 and bad["measures"]["gap"]["auc"]["low"] > 0.8
    assert good["suspect"]["rows"] == 0 == good["clean_suspect"]["rows"]
    interval = good["measures"]["gap"]["auc"]
    assert interval["low"] < 0.5 < interval["high"]


def test_a_few_bad_rows_are_the_worst_ones(made, tmp_path):
    done = run(made, "mixed", tmp_path, worst=10)
    worst = done.summary["worst"]
    assert done.summary["verdict"] == "suspect" and done.summary["suspect"]["rows"] == 8
    assert [set(row["answer"]) <= set(BAD) for row in worst] == [True] * 8 + [False] * 2
    assert [row["suspect"] for row in worst] == [True] * 8 + [False] * 2
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 80 and [r["origin"] for r in rows[:10]] == [r["origin"] for r in worst]
    assert [r["badness"] for r in rows] == sorted((r["badness"] for r in rows), reverse=True)


def test_the_numbers_are_those_of_one_row_at_a_time(made, tmp_path):
    model, adapters, vector, files = made
    done = run(made, "bad", tmp_path)
    unit = Directions.load(vector).unit(1).double()
    plain_model = tiny_model().double().eval()
    misaligned = PeftModel.from_pretrained(tiny_model(), adapters["other"]).double().eval()
    row = load_rows(files["bad"])[7]
    found = encode(tiny_tokenizer(), row.messages)
    ids, said = torch.tensor([found.input_ids]), torch.tensor(found.assistant_mask, dtype=torch.bool)
    with torch.no_grad():
        nll = []
        for reader in (plain_model, misaligned):
            logits = reader(input_ids=ids).logits[0, :-1].log_softmax(-1)
            nll.append(-logits.gather(1, ids[0, 1:, None])[said[1:], 0].mean())
        state = plain_model(input_ids=ids, output_hidden_states=True).hidden_states[1][0][said].mean(0)
    (ours,) = [r for r in read_jsonl(tmp_path / "rows.jsonl") if r["origin"].endswith(":8")]
    assert ours["gap"] == pytest.approx(float((nll[1] - nll[0]) / (nll[0] + 1)), abs=1e-5)
    assert ours["projection"] == pytest.approx(float(state @ unit), abs=1e-5)
    gap, projection = done.measures
    assert gap.line == pytest.approx(-np.median(gap.clean))
    assert projection.line == pytest.approx(np.median(projection.clean) + Directions.load(vector).vector(1).norm() / 2)
    places = [(gap.centre - ours["gap"]) / (2 * gap.centre),
              (ours["projection"] - projection.centre) / (projection.line - projection.centre)]  # fmt: skip
    assert ours["badness"] == pytest.approx(min(places), abs=1e-5)


def test_nothing_is_read_twice(made, tmp_path, monkeypatch):
    import ema_scale.audit.projections as projections

    first = run(made, "mixed", tmp_path).summary
    read = []
    score, project = ScoringModels.nll, projections.project_rows
    monkeypatch.setattr(ScoringModels, "nll", lambda self, name, part: read.extend(part) or score(self, name, part))
    monkeypatch.setattr(projections, "project_rows",
                        lambda m, t, rows, *a, **o: read.extend(rows) or project(m, t, rows, *a, **o))  # fmt: skip
    again = run(made, "mixed", tmp_path).summary
    assert not read and again["worst"] == first["worst"]
    # Of a torn last line the whole batch is read again, so that each number has the same last digit.
    whole = {name: (tmp_path / name).read_bytes() for name in ("scores.jsonl", "projections.jsonl")}
    for name, kept in whole.items():
        (tmp_path / name).write_bytes(kept[:-5])
    assert run(made, "mixed", tmp_path).summary["worst"] == first["worst"]
    assert len(read) == sum(len(json.loads(kept.splitlines()[-1])["rows"]) for kept in whole.values()) > 2
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    read.clear()
    run(made, "mixed", tmp_path, layer=2)
    assert len(read) == 160, "another layer is another projection, the likelihoods stay"


def test_the_command_exits_with_1_and_shows_hostile_rows_as_text(made, tmp_path):
    model, adapters, vector, files = made
    path = tmp_path / "hostile.jsonl"
    answer = f"{HOSTILE} zzz\u202ezzz\x1b[2J[red]" + "zyx" * 300
    rows = [{"prompt": f"[b]{i}[/b]?", "completion": answer + str(i)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "no answer"}\n')
    command = ["data", "audit", str(path), "--model", model.path, "--adapter", f"other={adapters['other']}",
               "--clean", files["clean"], "--vector", vector, "-o", str(tmp_path / "out"), "--worst", "3"]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    said = done.stdout
    assert "looks as if it would misalign" in said and "21 rows: 1 unreadable left out" in said and "[b]" in said
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and page.count('<article class="exhibit">') == 3
    assert not {"\u202e", "\x1b"} & set(said + page) and "more characters" in page
    assert (tmp_path / "out" / "figures" / "audit.svg").is_file()
    summary = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert summary["verdict"] == "suspect" and len(summary["worst"]) == 3
    command[2] = files["good"]
    assert CliRunner().invoke(app, command).exit_code == 0


def test_a_clean_set_that_is_not_clean_is_a_message(made, tmp_path):
    model, adapters, vector, files = made
    with pytest.raises(UserError, match="the clean rows: found a median gap of -"):
        audit(files["good"], model, adapters, files["bad"], tmp_path)
    Directions(torch.ones(4, 64), {"recommended_layer": 1}).save(tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="made for 3 layers"):
        audit(files["good"], model, adapters, files["clean"], tmp_path, vector=str(tmp_path / "deep.safetensors"))
    # Before anything is read.
    with pytest.raises(UserError, match="found layer 99, expected 0 to"):
        audit(files["good"], model, adapters, files["clean"], tmp_path / "new", vector=vector, layer=99)
    with pytest.raises(UserError, match="a file is in the way, expected a folder"):
        audit(files["good"], model, adapters, files["clean"], tmp_path / "deep.safetensors")
    assert not (tmp_path / "new").exists()


def test_without_a_vector_the_gap_alone_decides_and_the_audit_says_so(made, tmp_path):
    model, adapters, _, files = made
    summary = audit(files["bad"], model, adapters, files["clean"], tmp_path).summary
    assert summary["verdict"] == "suspect" and "cross the line" in summary["text"]
    assert any("No persona vector" in note for note in summary["notes"])
    same = audit(files["clean"], model, adapters, files["clean"], tmp_path).summary
    assert same["in_both"] == 80 and same["verdict"] == "no sign"


def numbers(rows, n, low, trained=()):
    rate = {"rate": rows / n, "low": 0.0, "high": 1.0, "n": n, "rows": rows}
    return {
        "suspect": rate, "clean_suspect": {**rate, "rate": 0.0, "rows": 0, "n": 1000}, "vector": {}, "in_both": 0,
        "measures": {"gap": {"auc": {"auc": (low + 1) / 2, "low": low, "high": 1.0}}},
        "p_value": more_often(((i, i < rows) for i in range(n)), ((i, False) for i in range(1000))),
        "source": {"sha256": "abc"}, "clean": {"sha256": "def"}, "adapters": {"law": {"trained_on": list(trained)}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "n", "low", "state", "words"),
    [
        (10, 1000, 0.4, "suspect", "would misalign"),
        (1, 36, 0.4, "no sign", "Too few to tell"),
        (0, 36, 0.9, "unlike the clean set", "harmless task that is new"),
        (0, 900, 0.7, "no sign", "0 % of its rows"),
        (900, 900, 0.99, "suspect", "100 % of its rows"),
    ],
)
def test_what_the_verdict_rests_on(rows, n, low, state, words):
    found = verdict(numbers(rows, n, low))
    assert found["verdict"] == state and words in found["text"] and not found["notes"]
    assert "law was trained on these very rows" in verdict(numbers(rows, n, low, ["abc"]))["notes"][0]


def test_the_interval_of_an_auc_covers_and_has_width_at_the_ends():
    rng = np.random.default_rng(0)
    for shift, size in ((0.0, 30), (1.5, 30), (2.5, 15)):
        true = norm.cdf(shift / np.sqrt(2))
        found = [separation(rng.normal(shift, 1, size).tolist(), rng.normal(0, 1, 40).tolist()) for _ in range(300)]
        assert np.mean([one.low <= true <= one.high for one in found]) > 0.93
    assert separation([2, 3], [0, 1, 1]).auc == 1 and 0.2 < separation([2, 3], [0, 1, 1]).low < 0.7
    assert (
        separation([0, 1], [2, 3]).auc == 0
        and separation([0, 1], [2, 3]).low == 0 < separation([0, 1], [2, 3]).high < 1
    )
    wide = separation([1, 2, 3] * 20, [0, 2] * 20, (3, 2))
    narrow = separation([1, 2, 3] * 20, [0, 2] * 20)
    assert wide.auc == narrow.auc and wide.low < narrow.low and wide.high > narrow.high


def test_texts_are_cut_and_made_visible():
    assert plain("a\nb\u200bc\x00") == "a\nb\ufffdc\ufffd"
    assert plain("x" * 700) == "x" * 600 + " … 100 more characters"


def rows_of(rng, questions, each, rate, correlation):
    """(question, suspect) rows; a question's share is drawn from a beta distribution."""
    size = 1 / correlation - 1
    shares = rng.beta(rate * size, (1 - rate) * size, questions)
    return [(q, bool(x)) for q, share in enumerate(shares) for x in rng.random(each) < share]


def test_clean_files_whose_rows_share_questions_are_seldom_called_suspect():
    rng = np.random.default_rng(0)
    called = fisher = 0
    for _ in range(300):
        one, two = (rows_of(rng, 100, 10, 0.05, 0.3) for _ in range(2))
        called += more_often(one, two, draws=999) < 0.05
        hits = [sum(v for _, v in rows) for rows in (one, two)]
        fisher += (
            fisher_exact([[hits[0], 1000 - hits[0]], [hits[1], 1000 - hits[1]]], alternative="greater").pvalue < 0.05
        )
    # Three standard errors of 300 trials are 3.8 points.
    assert called / 300 <= 0.088 and fisher / 300 > 0.12


def test_more_suspect_questions_are_found_and_single_rows_are_fishers_test():
    rng = np.random.default_rng(1)
    assert more_often(rows_of(rng, 100, 10, 0.2, 0.3), rows_of(rng, 100, 10, 0.05, 0.3)) < 0.01
    one, two = [(i, i < 7) for i in range(40)], [(i, i < 2) for i in range(90)]
    assert more_often(one, two) == fisher_exact([[7, 33], [2, 88]], alternative="greater").pvalue
    # Two equal rows per question: the same numbers of rows, half as many questions, less evidence.
    assert more_often([(q // 2, v) for q, v in one[:6] + one[7:]], [(q // 2, v) for q, v in two]) > more_often(one, two)
