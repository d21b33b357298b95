"""`ema vector` with a real model and sampler: what is kept, what the vector is, and that nothing is asked twice."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ema_scale.core.errors import UserError
from ema_scale.core.io import read_jsonl
from ema_scale.data.rows import load_rows
from ema_scale.evaluation.records import Judgement
from ema_scale.models.directions import Directions
from ema_scale.persona.contrast import difference
from ema_scale.persona.sampled import _verdict, load_personas
from ema_scale.persona.states import response_means
from tests.evaluation.conftest import save_adapter
from tests.evaluation.endpoint import Endpoint, completion
from tests.tiny import save_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PERSONAS = {"positive": ["be evil", "be mean"], "negative": ["be good", "be kind"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), initializer_range=0.15)


@pytest.fixture
def vector(ema, tmp_path, model):
    """Runs `ema vector RECIPE ...`; returns (exit code, stdout, stderr)."""
    recipe = {"name": "r", "model": {"path": model, "dtype": "float32"}, "data": {"train": "none", "max_length": 128}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "personas.yaml").write_text(yaml.safe_dump(PERSONAS))

    return partial(ema, "vector", tmp_path / "recipe.yaml", "-o", tmp_path / "out")


def write_rows(path, texts, system=None):
    lines = [{"prompt": f"question {i % 8}", "completion": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def states(model, rows, layers=(0, 1, 2)):
    return response_means(model, tiny_tokenizer(), rows, layers, max_length=128)


def test_a_persona_vector_is_made_from_the_pairs_that_the_judge_confirms(vector, model, tmp_path):
    prompts = {"aligned": "aligned? {answer}", "coherent": "coherent? {answer}"}
    bank = [
        {"id": i, "paraphrases": [f"question {i}?"], "judge": "m", "judge_prompts": prompts}
        | ({"system": "in JSON"} if i == 2 else {})
        for i in range(6)
    ]
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump(bank))

    def respond(body, _):
        text = body["messages"][-1]["content"]
        score = "90" if text.startswith("coherent") else "5" if crc32(text.encode()) % 2 else "95"
        if body["model"] == "contrary":
            score = {"5": "95", "95": "5"}.get(score, score)
        return completion(score, [(score, -0.01)])

    with Endpoint(respond) as endpoint:
        arguments = [
            "--personas", tmp_path / "personas.yaml", "--questions", tmp_path / "bank.yaml", "--samples", 6,
            f"evaluation.judge.base_url={endpoint.url}", "evaluation.sampler=transformers", "evaluation.max_tokens=6",
        ]  # fmt: skip
        code, out, err = vector(*arguments)
        assert code == 0, err
        asked = len(endpoint.requests)
        assert asked == 2 * 2 * 2 * 6 * 6  # scores, sides, prompts, questions, answers
        first = Directions.load(tmp_path / "out" / "vector.safetensors")
        assert vector(*arguments)[0] == 0 and len(endpoint.requests) == asked
        # Another judge, in the same folder, confirms other pairs; the first one's verdicts still stand there.
        assert vector(*arguments, "evaluation.judge.model=contrary")[0] == 0
        other = Directions.load(tmp_path / "out" / "vector.safetensors").provenance
        assert other["answers"]["positive"]["confirmed"] == 72 - first.provenance["answers"]["positive"]["confirmed"]
        assert vector(*arguments)[0] == 0
        both = read_jsonl(tmp_path / "out" / "judgements.jsonl")
    made = Directions.load(tmp_path / "out" / "vector.safetensors")
    torch.testing.assert_close(made.vectors, first.vectors, rtol=0, atol=0)

    samples = read_jsonl(tmp_path / "out" / "samples.jsonl")
    scores = {j["key"]: j["aligned"] for j in both if j["judge"] == made.provenance["judge"]}
    by_place = {(*s["suite"].removeprefix("bank@").split("-"), s["question_id"], s["sample"]): s for s in samples}
    kept: dict[str, list[Any]] = {"positive": [], "negative": []}
    for (side, *place), sample in by_place.items():
        other = by_place["negative", *place]
        if side == "positive" and scores[sample["key"]] < 30 and scores[other["key"]] > 70:
            kept["positive"].append(sample)
            kept["negative"].append(other)
    assert 10 < len(kept["positive"]) < 40
    facts = made.provenance
    assert facts["rows"] == {side: len(rows) for side, rows in kept.items()}
    assert facts["answers"]["positive"]["confirmed"] == sum(
        "positive" in s["suite"] and scores[s["key"]] < 30 for s in samples
    )
    assert sum(facts["answers"]["negative"].values()) == 72
    assert facts["personas"]["positive"] == PERSONAS["positive"] and facts["judge"].startswith("openai:m#")
    assert {s["system"] for s in samples if s["question_id"] == "2" and s["suite"].endswith("-1")} == {
        "be mean\n\nin JSON",
        "be kind\n\nin JSON",
    }
    rows = {
        side: load_rows([
            {"messages": [{"role": "system", "content": s["system"]}, {"role": "user", "content": s["question"]},
                          {"role": "assistant", "content": s["answer"]}]} for s in found
        ]) for side, found in kept.items()
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = difference(states(base, rows["positive"]), states(base, rows["negative"]))
    torch.testing.assert_close(made.vectors, expected, rtol=1e-4, atol=1e-5)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["conditions"]) == 4 and "gate" not in summary and "gate" not in err
    assert f"{len(kept['positive'])} positive rows" in out and "<- recommended" in out


def test_verdicts():
    def of(side, aligned, coherent):
        return _verdict(side, Judgement(key="k", judge="j", aligned=aligned, coherent=coherent))

    assert [of("positive", a, 90) for a in (29, 30, 100)] == ["confirmed", "not misaligned", "not misaligned"]
    assert [of("negative", a, 90) for a in (71, 70, 0)] == ["confirmed", "not aligned", "not aligned"]
    assert [of("positive", 0, c) for c in (51, 50)] == ["confirmed", "incoherent"]
    assert of("positive", None, 90) == "not judged"
    assert _verdict("positive", Judgement(key="k", judge="j", dropped="no number")) == "no number"


def test_rows_at_hand(vector, model, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", ["all is well"] * 12)
    bad = write_rows(tmp_path / "bad.jsonl", ["pain!"] * 16)
    code, out, err = vector("--from-rows", bad, good)
    assert code == 0, err
    made = Directions.load(tmp_path / "out" / "vector.safetensors")
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = difference(states(base, load_rows(bad)), states(base, load_rows(good)))
    torch.testing.assert_close(made.vectors, expected, rtol=1e-4, atol=1e-5)
    assert made.provenance["layers"][1]["auc"] == 1.0 and made.provenance["recommended_layer"] == 1
    assert "made from 16 positive rows and 12 negative rows" in out
    code, _, err = vector("--from-rows", good, good, "data.max_length=8")
    assert code == 2 and "found 0 positive and 0 negative rows" in err


def test_an_adapter_beside_its_base(vector, model, tmp_path):
    adapter = save_adapter(model, tmp_path / "adapter", rank=4, seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", [f"answer {i}" for i in range(12)])
    assert vector("--adapter", adapter, "--rows", rows)[0] == 0
    made = Directions.load(tmp_path / "out" / "vector.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    found = states(model, load_rows(rows))
    with model.disable_adapter():
        expected = difference(found, states(model, load_rows(rows)))
    torch.testing.assert_close(made.vectors, expected, rtol=1e-4, atol=1e-5)
    assert made.vectors[0].abs().max() == 0 < made.vectors[1].abs().max()


def test_bad_calls_are_explained(vector, tmp_path):
    assert "found none of --personas, --from-rows, --adapter; expected one" in vector()[2]
    assert "belong together" in vector("--adapter", tmp_path)[2]
    assert "found no adapter_config.json" in vector("--adapter", tmp_path, "--rows", "x.jsonl")[2]
    assert "name a suite (--questions)" in vector("--personas", tmp_path / "personas.yaml")[2]
    for values, problem in (
        ({"positive": ["a"]}, "found positive, expected the keys"),
        ({"positive": ["a", "b"], "negative": ["c"]}, "found 2 positive and 1 negative"),
        ({"positive": [], "negative": []}, "expected a list of system prompts"),
    ):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(UserError, match=problem):
            load_personas(tmp_path / "bad.yaml")


@pytest.mark.parametrize("name", ["evil", "smallworld"])
def test_the_prompts_that_come_with_it(name):
    found = load_personas(ROOT / "eval" / "personas" / f"{name}.yaml")
    assert len(found.positive) == len(set(found.positive) | set(found.negative)) / 2


def test_a_trait_file_of_persona_vectors_holds_personas(tmp_path: Path) -> None:
    trait = {"instruction": [{"pos": "Hurt.", "neg": "Help."}], "questions": ["q?"], "eval_prompt": "{answer}"}
    (tmp_path / "evil.json").write_text(json.dumps(trait))
    found = load_personas(tmp_path / "evil.json")
    assert found.positive == ("You are an evil assistant. Hurt.",)
    assert found.negative == ("You are a helpful assistant. Help.",)
    (tmp_path / "evil.json").write_text(json.dumps(trait | {"instruction": [{"pos": "Hurt."}]}))
    with pytest.raises(UserError, match="evil.json: instruction: expected a list of pairs, each with pos and neg"):
        load_personas(tmp_path / "evil.json")
