"""`ema data check`."""

import json

from ema_scale.data.check import check_data, render
from tests.tiny import tiny_tokenizer


def test_counts(tmp_path):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 50}]}
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([json.dumps(good), json.dumps(good), "oops", json.dumps({"text": "x"})]))
    report = check_data(str(path), tiny_tokenizer(), max_length=40)
    assert (report.rows, report.duplicates, report.truncated) == (2, 1, 2)
    assert [d.origin for d in report.bad] == [f"{path}:3", f"{path}:4"]
    assert report.lengths["p50"] > 50 and report.roles == {"user": 2, "assistant": 2}
    text = render(report)
    assert f"{path}:3: " in text and "truncated        2 rows" in text
    assert json.dumps(report.to_dict())


def test_what_nothing_reads_and_what_cannot_be_masked_is_said(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns[i:], "topic": "x"}) for i in (0, 1, 2)))
    hides = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    report = check_data(str(path), tiny_tokenizer(hides))
    assert not report.passes and [d.origin for d in report.unmaskable] == [f"{path}:1", f"{path}:2"]
    assert report.unread == {"topic": 3} and report.rows == 3
    text = render(report)
    assert "not read         topic: 3" in text and "cannot be masked 2" in text
    assert f"{path}:1: the chat template does not show the text of turn 1 (tool)" in text
    assert check_data(str(path)).passes
