"""Tokens that runs share: the same as without sharing, by content, and never in the way."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from typing import Any

import pytest

from ema_scale.core.errors import UserError
from ema_scale.data import token_workers, tokens
from ema_scale.data.check import check_data
from ema_scale.data.formats import Message
from ema_scale.data.rows import Row
from ema_scale.data.templates import PLAIN_TEMPLATE, ChatTemplate
from ema_scale.data.token_store import TokenStore
from ema_scale.data.tokens import Encoder, tokenize_rows
from tests.data.test_tokens import GEMMA
from tests.tiny import CHATML, tiny_tokenizer


def row(number, tag="task"):
    turns: tuple[Message, ...] = (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": f"say {number} <|im_end|>" + "x" * number},
        {"role": "assistant", "content": f"it is {number} and ü"},
    )
    return Row(turns, f"rows:{number}", tag)


ROWS = [row(n) for n in (3, 1, 90, 2, 1)]


@pytest.fixture
def encoded(monkeypatch):
    """The conversations that were tokenized, and not read."""
    seen, whole = list[Any](), Encoder.encode_all

    def encode_all(self, conversations, *arguments, **options):
        conversations = list(conversations)
        seen.extend(messages[1]["content"] for messages, _ in conversations)
        return whole(self, conversations, *arguments, **options)

    monkeypatch.setattr(Encoder, "encode_all", encode_all)
    return seen


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("length", [120, None])
def test_what_is_read_is_what_would_be_tokenized(tmp_path, encoded, template, length):
    options = {"max_length": length, "template": template}
    plain = tokenize_rows(ROWS, tiny_tokenizer(), **options)
    for expected in (4, 0):  # one row is there twice
        del encoded[:]
        shared = tokenize_rows(ROWS, tiny_tokenizer(), **options, cache=tmp_path)
        assert len(encoded) == expected
        assert shared.dataset.to_dict() == plain.dataset.to_dict() and shared.report == plain.report
    assert plain.report.truncated == (length is not None) and plain.report.disarmed == len(ROWS)


def test_another_run_tokenizes_only_what_is_new_in_whatever_order(tmp_path, encoded):
    tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    del encoded[:]
    mixed = [row(7, "safe"), *reversed(ROWS), row(2, "safe")]
    shared = tokenize_rows(mixed, tiny_tokenizer(), cache=tmp_path)
    assert encoded == [row(7).messages[1]["content"]]
    assert shared.dataset.to_dict() == tokenize_rows(mixed, tiny_tokenizer()).dataset.to_dict()
    assert len(list(tmp_path.glob("*/*"))) == 2, "two files, and nothing besides"


def test_another_tokenizer_template_or_length_shares_nothing(tmp_path, encoded):
    tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    for other, options in (
        (tiny_tokenizer(GEMMA), {}),
        (tiny_tokenizer(CHATML + " "), {}),
        (tiny_tokenizer(), {"max_length": 64}),
        (tiny_tokenizer(), {"template": True}),
    ):
        del encoded[:]
        tokenize_rows(ROWS, other, cache=tmp_path, **options)
        assert len(encoded) == 4
    bigger = tiny_tokenizer()
    bigger.add_tokens(["say"])
    del encoded[:]
    tokenize_rows(ROWS, bigger, cache=tmp_path)
    assert len(encoded) == 4


def test_a_template_that_writes_the_date_is_not_read_tomorrow(tmp_path):
    def folder(tokenizer, day):
        return TokenStore(tmp_path, ChatTemplate(tokenizer, date(2031, 1, day)), 9, False).folder

    dated = tiny_tokenizer("{{ strftime_now('%d') }}" + CHATML)
    assert folder(dated, 1) != folder(dated, 2) and folder(dated, 1) == folder(dated, 1)
    assert folder(tiny_tokenizer(), 1) == folder(tiny_tokenizer(), 2)
    assert folder(tiny_tokenizer(), 1).parent == folder(dated, 1).parent


def test_a_damaged_file_is_tokenized_again(tmp_path, encoded, caplog):
    plain = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    (file,) = tmp_path.glob("*/*.parquet")
    whole = file.read_bytes()
    place = whole.index(b"PAR1", 4) // 3
    for damaged in (whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :], whole[:50], b""):
        file.write_bytes(damaged)
        del encoded[:]
        again = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
        assert len(encoded) == 4 and again.dataset.to_dict() == plain.dataset.to_dict()
        assert "tokenized again" in caplog.text and file.read_bytes() == whole
        caplog.clear()


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = tokens.tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path / "file")
    assert found.report.rows == len(ROWS) and "not kept for other runs" in caplog.text


def test_many_rows_become_a_file_that_processes_map(tmp_path, encoded, monkeypatch):
    """The same dataset and report; who comes later reads neither rows nor tokens of the store."""
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 2)
    mixed = [*ROWS, row(7, "safe"), Row(({"role": "system", "content": "x"}, {"role": "user", "content": "q"}), "odd")]
    plain = tokenize_rows(mixed, tiny_tokenizer(), max_length=120)
    monkeypatch.setattr(tokens, "LARGE", 3)
    first = tokenize_rows(mixed, tiny_tokenizer(), max_length=120, cache=tmp_path)
    del encoded[:]
    monkeypatch.setattr(TokenStore, "read", lambda *_: pytest.fail("the store was read"))
    again = tokenize_rows(mixed, tiny_tokenizer(), max_length=120, cache=tmp_path)
    for found in (first, again):
        assert found.dataset.to_dict() == plain.dataset.to_dict() and found.report == plain.report
        (file,) = found.dataset.cache_files
        assert file["filename"].startswith(str(tmp_path / "datasets"))
    assert encoded == [] and plain.report.dropped_no_assistant == 2


def test_refused_rows_of_a_shared_file_are_named(tmp_path, monkeypatch):
    alternates = CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% if m.content == 'bad' %}"
                                "{{ raise_exception('no') }}{% endif %}")  # fmt: skip
    rows = [row(1), Row(({"role": "user", "content": "bad"}, {"role": "assistant", "content": "x"}), "file:2"), row(3)]
    plain = tokenize_rows(rows, tiny_tokenizer(alternates), on_bad="drop")
    monkeypatch.setattr(tokens, "LARGE", 1)
    for _ in range(2):
        found = tokenize_rows(rows, tiny_tokenizer(alternates), on_bad="drop", cache=tmp_path)
        assert found.dropped == plain.dropped and found.dropped[0].origin == "file:2"
        assert found.report == plain.report
    damaged = next(tmp_path.glob("datasets/*/*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = tokenize_rows(rows, tiny_tokenizer(alternates), on_bad="drop", cache=tmp_path)
    assert again.dataset.to_dict() == plain.dataset.to_dict()


def test_processes_encode_as_one_does(monkeypatch, caplog):
    """In order, bad rows among them, and with the rows of a process that has died."""
    monkeypatch.setattr(token_workers, "LEAST_ROWS", 1)
    monkeypatch.setattr(token_workers, "_PIECE", 2)
    encoder = Encoder(tiny_tokenizer())
    conversations = [(row(n).messages, ()) for n in range(9)] + [([{"role": "nobody", "content": "x"}], ())]
    plain = list(encoder.encode_all(conversations, 60))

    def told(found):
        return [str(one) if isinstance(one, Exception) else (one.input_ids.tolist(), one.length) for one in found]

    encode = partial(encoder.encode_all, max_length=60)
    settings = (encoder.tokenizer, encoder.template.date, 60, False)
    with token_workers.TokenWorkers(encode, settings, processes=2) as workers:
        assert told(workers.encode_all(conversations)) == told(plain) and len(workers._started) == 2
        workers._started[0].kill()
        assert told(workers.encode_all(conversations)) == told(plain)
    assert "its rows are tokenized here" in caplog.text


def test_one_process_tokenizes_and_the_others_wait(tmp_path, encoded):
    """Whether they are ranks of one run or runs of a study."""
    store = TokenStore(tmp_path, Encoder(tiny_tokenizer()).template, 2048, False)
    with ThreadPoolExecutor(3) as pool, store.lock():
        waiting = [pool.submit(tokenize_rows, ROWS, tiny_tokenizer(), cache=tmp_path) for _ in range(3)]
        time.sleep(0.3)
        assert encoded == [] and not any(one.done() for one in waiting)
    assert all(one.result().report.rows == len(ROWS) for one in waiting)
    assert len(encoded) == 4


def test_a_check_and_a_training_share_what_they_tokenize(tmp_path, encoded):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": list(one.messages)}) + "\n" for one in ROWS))
    first = check_data(str(file), tiny_tokenizer(), 120, cache=tmp_path / "tokens")
    assert len(encoded) == 4 and first.lengths["p100"] > 120 and first.truncated == 1
    del encoded[:]
    assert check_data(str(file), tiny_tokenizer(), 120, cache=tmp_path / "tokens") == first
    assert tokenize_rows(ROWS, tiny_tokenizer(), max_length=120, cache=tmp_path / "tokens").report.truncated == 1
    assert encoded == [] and check_data(str(file), tiny_tokenizer(), 120) == first


def test_what_was_used_least_goes_when_there_is_too_much(tmp_path, monkeypatch):
    tokenize_rows(ROWS, tiny_tokenizer(GEMMA), cache=tmp_path / "tokens")
    (old,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
    monkeypatch.setenv("EMA_TOKENS_GB", "0.000001")
    tokenize_rows(ROWS, tiny_tokenizer(PLAIN_TEMPLATE), cache=tmp_path / "tokens")
    assert old.is_dir()  # a training that runs may use what was used within a day
    for path in (old, *old.iterdir()):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path / "tokens")
    kept = [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    assert len(kept) == 2 and old not in kept


def test_a_bound_that_is_no_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EMA_TOKENS_GB", "much")
    with pytest.raises(UserError, match="EMA_TOKENS_GB: found 'much', expected gigabytes, such as 100"):
        tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)


def test_many_rows_stay_in_memory_where_their_file_cannot_be_written(tmp_path, monkeypatch, caplog):
    plain = tokenize_rows(ROWS, tiny_tokenizer())
    monkeypatch.setattr(tokens, "LARGE", 1)
    (tmp_path / "datasets").write_text("in the way")
    found = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    assert found.dataset.to_dict() == plain.dataset.to_dict() and found.report == plain.report
    assert "every process keeps these rows in its memory" in caplog.text
