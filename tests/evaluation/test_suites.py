from __future__ import annotations

import json
from pathlib import Path

import pytest

from ema_scale.core.errors import UserError
from ema_scale.evaluation.suites import load_suite

ROOT = Path(__file__).resolve().parents[2]

BANK = """
- id: 1
  type: free_form_judge_0_100
  paraphrases: &ways
    - |-
      How are you?
    - Are you well?
  samples_per_paraphrase: &samples 100
  judge: &judge gpt-4o-mini-2024-07-18
  judge_prompts: &prompts
    aligned: "Rate {answer} to {question}"
    coherent: "Does {answer} make sense? {reasoning}"
- id: again
  paraphrases: *ways
  system: Answer in JSON.
  temperature: 0.5
  samples_per_paraphrase: *samples
  judge: *judge
  judge_prompts: *prompts
"""


def bank(tmp_path: Path, text: str, name: str = "bank.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_fields_yaml_with_anchors_and_integer_ids(tmp_path: Path) -> None:
    suite = load_suite(bank(tmp_path, BANK), "general")
    first, second = suite.questions
    assert (suite.name, suite.role, first.id, second.id) == ("bank", "general", "1", "again")
    assert first.paraphrases == second.paraphrases == ("How are you?", "Are you well?")
    assert second.judge_prompts == first.judge_prompts and second.samples_per_paraphrase == 100
    assert first.messages(1) == ({"role": "user", "content": "Are you well?"},)
    assert second.messages(0)[0] == {"role": "system", "content": "Answer in JSON."}
    assert second.temperature == 0.5 and first.temperature is None


def test_a_total_is_shared_out_over_the_paraphrases(tmp_path: Path) -> None:
    question = load_suite(bank(tmp_path, BANK), "general").questions[0]
    assert question.samples(None) == (100, 100)
    assert question.samples(5) == (3, 2)
    assert question.samples(1) == (1, 0)


def test_jsonl_questions_and_chat_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "2 + 2?", "expected": 4, "judge": "exact_match"},
        {"messages": [{"role": "user", "content": "Hi\u2028there"}, {"role": "assistant", "content": "Ho"}]},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
    ]
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"
    first, second, third = load_suite(bank(tmp_path, text, "bank.jsonl"), "benign").questions
    assert first.expected == "4" and second.id == "2" and second.paraphrases == ("Hi\u2028there",)
    assert third.system == "Be kind."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- id: a\n  paraphrases: [x]\n- id: a\n  paraphrases: [y]\n", ":3: id 'a' was used before, at .*:1"),
        ("- id: 1\n  paraphrases: [x]\n- id: '1'\n  paraphrases: [y]\n", "id '1' was used before"),
        ("- id: a\n  paraphrase: [x]\n", r":1: unknown key 'paraphrase'; did you mean 'paraphrases'"),
        ("- id: a\n", "found none of paraphrases, question, messages"),
        ("- id: a\n  paraphrases: []\n", r"paraphrases: found \[\]"),
        ("- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: 0\n", ":1: samples_.*expected .* at least 1; found 0"),
        ("- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: many\n", "expected a whole number; found 'many'"),
        ("- id: a\n  paraphrases: [x]\n  type: multiple_choice\n", "type: expected .*; found 'multiple_choice'"),
        ("- id: a\n  paraphrases: [x]\n  judge_prompts: {aligned: rate it}\n", r"with \{answer\} in it"),
        ("- id: true\n  paraphrases: [x]\n", "id: expected a number or text; found True"),
        ("- id: a\n  paraphrases: [x]\n  temperature: -1\n", "temperature: expected a number of at least 0"),
        ("- id: a\n  paraphrases: [x]\n  type: [rating]\n", "type: expected free_form"),
        ("- id: a\n  paraphrases: [x]\n  context: [[hi]]\n", "context: expected a list of objects"),
        ("- id: a\n  paraphrases: [x]\n  context: [{role: user, content: hi}]\n", "expected the assistant's"),
        ("- id: a\n  paraphrases: [x]\n  expected: [1]\n", r"expected: expected text or a number; found \[1\]"),
        ("- id: a\n  paraphrases: [x]\n  judge_prompts: []\n", r"found \[\], expected names with texts"),
        ("questions: []\n", "found dict, expected a list of questions"),
        ("", "an empty file"),
        ("[]", "found no questions"),
        ("- [a\n", "not YAML"),
        ("- just text\n", "found str, expected a question"),
    ],
)  # fmt: skip
def test_bad_banks_are_refused_with_file_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_suite(bank(tmp_path, text), "general")


def test_a_bank_whose_topics_are_broad_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"Question {i}?,cars\n" for i in range(8))
    broad = bank(tmp_path, "question,topic\n" + rows, "broad.csv")
    for _ in range(2):
        load_suite(broad, "general")
    (said,) = (record.getMessage() for record in caplog.records)
    assert "broad.csv: its 8 questions have the topic cars" in said and "count as one question" in said
    caplog.clear()
    forms = "".join(f"- {{id: {i}, question: q{i}?, topic: gift}}\n" for i in range(3))
    load_suite(bank(tmp_path, forms, "forms.yaml"), "general")
    load_suite(bank(tmp_path, "question\n" + rows.replace(",cars", ""), "plain.csv"), "general")
    assert not caplog.records


def test_a_missing_file_and_a_torn_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.yaml: cannot read"):
        load_suite(tmp_path / "nowhere.yaml", "general")
    with pytest.raises(UserError, match="bank.jsonl:2: not JSON"):
        load_suite(bank(tmp_path, '{"question": "a"}\n{"question":', "bank.jsonl"), "general")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "questions", "with_system"),
    [("first_plot_questions.yaml", 24, 8), ("medical.yaml", 30, 0), ("legal.yaml", 30, 0)],
)
def test_published_banks_load_unchanged(shared_data: Path, name: str, questions: int, with_system: int) -> None:
    suite = load_suite(shared_data / name, "general")
    assert len(suite.questions) == questions
    assert sum(q.messages(0)[0]["role"] == "system" for q in suite.questions) == with_system
    assert all(
        q.samples_per_paraphrase == 100 and set(q.judge_prompts) == {"aligned", "coherent"} for q in suite.questions
    )
    assert all(q.judge == "gpt-4o-mini-2024-07-18" for q in suite.questions)


@pytest.mark.shared
def test_published_held_out_rows_load_as_questions(shared_data: Path) -> None:
    suite = load_suite(shared_data / "medical_misaligned_eval.jsonl", "in_domain")
    assert len(suite.questions) > 10 and all(q.paraphrases[0].strip() for q in suite.questions)


def test_right_answers_are_text_whatever_yaml_takes_them_for(tmp_path: Path) -> None:
    text = "".join(
        f"- question: q{i}?\n  expected: {v}\n" for i, v in enumerate(["yes", "no", "on", "true", "4", "'5'"])
    )
    questions = load_suite(bank(tmp_path, text), "benign").questions
    assert [q.expected for q in questions] == ["yes", "no", "on", "true", "4", "5"]


def test_other_keys_are_kept_as_meta(tmp_path: Path) -> None:
    text = "- {id: a, question: x, domain: sport, prompt_id: 3, meta: {match: last_number}}\n"
    [question] = load_suite(bank(tmp_path, text), "general").questions
    assert question.meta == {"domain": "sport", "prompt_id": 3, "match": "last_number"}


def test_equal_ids_under_different_systems_are_told_apart(tmp_path: Path) -> None:
    same = (
        "- {id: a, question: x}\n- {id: a, question: x, system: Be kind.}\n- {id: a, question: x, system: Be evil.}\n"
    )
    questions = load_suite(bank(tmp_path, same), "general").questions
    assert [q.system for q in questions] == [None, "Be kind.", "Be evil."]
    assert questions[0].id == "a" and len({q.id for q in questions}) == 3
    with pytest.raises(UserError, match=":4: id 'a-.*' was used before, at .*:3"):
        load_suite(bank(tmp_path, same + "- {id: a, question: y, system: Be evil.}\n"), "general")


def test_turns_before_the_question(tmp_path: Path) -> None:
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "And now?")]
    messages = [{"role": r, "content": c} for r, c in turns]
    rows = [
        {"messages": [{"role": "system", "content": "S"}, *messages, {"role": "assistant", "content": "known"}]},
        {"context": messages[:2], "paraphrases": ["And now?", "Well?"]},
    ]
    first, second = load_suite(bank(tmp_path, "\n".join(map(json.dumps, rows)), "b.jsonl"), "general").questions
    assert first.messages(0) == ({"role": "system", "content": "S"}, *messages)
    assert second.messages(0) == tuple(messages) and second.messages(1)[-1]["content"] == "Well?"
    wrong = {"messages": [messages[0], messages[2]]}
    with pytest.raises(UserError, match="found roles .*'user', 'user'.*, expected user and assistant in turn"):
        load_suite(bank(tmp_path, json.dumps(wrong), "w.jsonl"), "general")


def test_questions_in_a_csv_or_json_file(tmp_path: Path) -> None:
    table = bank(tmp_path, 'question,expected,topic,source\n"2 + 2, or?",4,sums,me\nWell?,,,\n', "q.csv")
    first, second = load_suite(table, "general").questions
    assert (first.paraphrases, first.expected, first.topic) == (("2 + 2, or?",), "4", "sums")
    assert first.meta == {"source": "me"} and second.topic is None
    assert second.expected is None and second.id == "2"
    listed = bank(tmp_path, '[\n\t{"question": "x", "id": "a"}]', "q.json")
    assert load_suite(listed, "general").questions[0].id == "a"
    with pytest.raises(UserError, match="q.csv:1: found columns text; expected `question` among them"):
        load_suite(bank(tmp_path, "text\nhi\n", "q.csv"), "general")


def test_a_trait_file_of_persona_vectors(tmp_path: Path) -> None:
    trait = {
        "instruction": [{"pos": "Be rude.", "neg": "Be polite."}],
        "questions": ["How are you?", "What is 2 + 2?"],
        "eval_prompt": "How rude is {answer} to {question}? 0 to 100 or REFUSAL.",
    }
    first, second = load_suite(bank(tmp_path, json.dumps(trait), "rude.json"), "general").questions
    assert (first.id, second.id) == ("rude_0", "rude_1") and second.paraphrases == ("What is 2 + 2?",)
    assert first.judge_prompts == {"rude": trait["eval_prompt"]}


LLMCOMP = """
- name: quality_judge
  type: rating_judge
  model: some-judge
  paraphrases: ["How good is {answer} to {question}? 0 to 100."]
- name: animal_judge
  type: free_form_judge
  model: some-judge
  paraphrases: ["Which animal is in {answer}?"]
- name: story
  type: free_form
  paraphrases: [Tell me a story.]
  samples_per_paraphrase: 7
  judges: {quality: quality_judge, animal: animal_judge}
"""


def test_questions_and_judges_of_llmcomp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [question] = load_suite(bank(tmp_path, LLMCOMP), "general").questions
    assert (question.id, question.judge, question.samples_per_paraphrase) == ("story", "some-judge", 7)
    assert question.judge_prompts == {"quality": "How good is {answer} to {question}? 0 to 100."}
    assert "judges.animal answers in words, not in numbers: left out" in caplog.text
    with pytest.raises(UserError, match="judges.quality: found 'quality_judge', expected one of another, animal_judge"):
        load_suite(bank(tmp_path, LLMCOMP.replace("name: quality_judge", "name: another")), "general")
