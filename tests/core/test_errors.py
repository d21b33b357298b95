"""pydantic's findings in plain words: the field as it stands in the file, what is expected, what was found."""

from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ema_scale.core.errors import explain, explain_all

FORM = "letters, digits, '.', '_' and '-', beginning with a letter or digit"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: str
    steps: int = Field(1, ge=1)
    share: float = Field(0.5, gt=0, lt=1)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner
    kind: Literal["a", "b", "c"] = "a"
    name: str = Field("x", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", min_length=1)
    which: Literal["all"] | Annotated[list[int], Field(min_length=1)] = "all"
    source: str | list[str] = "s"
    on: bool = True
    items: list[Inner] = []
    by_name: dict[str, Inner] = {}
    free: dict[str, Any] | None = None


def said(**values) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"path": "p"}, **values})
    return explain_all(caught.value, Outer)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inner": "folder"}, "inner: expected a mapping, such as {path: ...}; found 'folder'"),
        ({"inner": {}}, "inner.path: missing; this field is required"),
        ({"inner": {"path": "p", "steps": "x"}}, "inner.steps: expected a whole number; found 'x'"),
        ({"inner": {"path": "p", "steps": 0}}, "inner.steps: expected a number of at least 1; found 0"),
        ({"inner": {"path": "p", "share": 1}}, "inner.share: expected a number less than 1; found 1"),
        ({"inner": {"path": "p", "share": 0}}, "inner.share: expected a number greater than 0; found 0"),
        ({"inner": {"path": 3}}, "inner.path: expected text; found 3"),
        ({"kind": "d"}, "kind: expected a, b or c; found 'd'"),
        ({"name": ""}, "name: expected text that is not empty; found ''"),
        ({"name": "a b"}, f"name: expected {FORM}; found 'a b'"),
        ({"which": 3}, "which: expected all or a list, such as [a, b]; found 3"),
        ({"source": 3}, "source: expected text or a list, such as [a, b]; found 3"),
        ({"on": "maybe"}, "on: expected true or false; found 'maybe'"),
        ({"items": [{"path": "p", "steps": 1.5}]}, "items.0.steps: expected a whole number; found 1.5"),
        ({"by_name": {"one": {"path": 1}}}, "by_name.one.path: expected text; found 1"),
        ({"free": 3}, "free: expected a mapping, such as {key: value}; found 3"),
        ({"innre": {}}, "unknown key 'innre'; did you mean 'inner'?"),
        ({"step": 1}, "unknown key 'step'; did you mean 'inner.steps'?"),
        ({"items": [{"path": "p", "pth": 1}]}, "unknown key 'items.0.pth'; did you mean 'path'?"),
        ({"inner": {"path": "p", "zzz": 1}}, "unknown key 'inner.zzz'; known keys: path, steps, share"),
    ],
)
def test_one_line_per_field_in_plain_words(values, expected):
    assert said(**values) == [expected]


def test_every_wrong_field_has_a_line():
    assert len(said(kind="d", on="maybe", inner={"path": 3})) == 3


def test_a_section_may_answer_for_a_key_itself():
    class Hinting(BaseModel):
        model_config = ConfigDict(extra="forbid")
        strength: int = 1
        key_hints: ClassVar[dict[str, str]] = {"strengths": "write strength: {each: [1, 2]}"}

    with pytest.raises(ValidationError) as caught:
        Hinting.model_validate({"strengths": [1]})
    (problem,) = caught.value.errors()
    assert explain(problem, Hinting) == "unknown key 'strengths'; write strength: {each: [1, 2]}"
