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
