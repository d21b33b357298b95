"""Tokens that runs share: the same as without sharing, by content, and never in the way."""

from datetime import date

import pytest

from ema_scale.data import tokens
from ema_scale.data.rows import Row
from ema_scale.data.templates import ChatTemplate
from ema_scale.data.token_store import TokenStore
from ema_scale.data.tokens import Encoder, tokenize_rows
from tests.data.test_tokens import GEMMA
from tests.tiny import CHATML, tiny_tokenizer


def row(number, tag="task"):
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": f"say {number} <|im_end|>" + "x" * number},
        {"role": "assistant", "content": f"it is {number} and ü"},
    ]
    return Row(turns, f"rows:{number}", tag)


ROWS = [row(n) for n in (3, 1, 90, 2, 1)]


@pytest.fixture
def encoded(monkeypatch):
    """The conversations that were tokenized, and not read."""
    seen, whole = [], Encoder.encode_all

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
