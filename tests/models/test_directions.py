"""Directions: saved whole, loaded as saved, and refused where they do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from ema_scale.core.errors import UserError
from ema_scale.models.directions import Directions


def made(layers=3, hidden=4, **provenance):
    return Directions(torch.randn(layers + 1, hidden), provenance, "here")


def test_a_file_holds_everything(tmp_path):
    directions = made(recommended_layer=2, kept={"pairs": 7}, note="ü")
    directions.save(tmp_path / "deep" / "v.safetensors")
    loaded = Directions.load(tmp_path / "deep" / "v.safetensors")
    torch.testing.assert_close(loaded.vectors, directions.vectors, rtol=0, atol=0)
    assert loaded.provenance == {"recommended_layer": 2, "kept": {"pairs": 7}, "note": "ü"}
    assert (loaded.num_layers, loaded.hidden_size, loaded.recommended_layer) == (3, 4, 2)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["v.safetensors"]


def test_units_and_other_precisions():
    directions = Directions(torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.bfloat16))
    assert directions.vectors.dtype == torch.float32
    torch.testing.assert_close(directions.unit(1), torch.tensor([0.6, 0.8]))
    with pytest.raises(UserError, match="layer 0 is zero"):
        directions.unit(0)
    with pytest.raises(UserError, match="found layer 2, expected 0 to 1"):
        directions.vector(2)
    with pytest.raises(UserError, match="recommends no layer"):
        _ = directions.recommended_layer


def test_a_model_of_another_shape_is_refused():
    made().check(3, 4)
    with pytest.raises(UserError, match="here: made for 3 layers of hidden size 4, the model has 3 of 8"):
        made().check(3, 8)


@pytest.mark.parametrize(
    "vectors", [torch.zeros(4), torch.zeros(3, 4, dtype=torch.long), torch.full((3, 4), torch.nan)]
)
def test_other_tensors_are_refused(vectors):
    with pytest.raises(UserError, match="here: (found|holds)"):
        Directions(vectors, {}, "here")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Directions.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is no tensor file")
    with pytest.raises(UserError, match="not a safetensors file"):
        Directions.load(tmp_path / "text")
    save_file({"lora_A": torch.zeros(2, 2)}, tmp_path / "adapter")
    with pytest.raises(UserError, match="found the tensors lora_A, expected `vectors`"):
        Directions.load(tmp_path / "adapter")
    save_file({"vectors": torch.zeros(2, 2)}, tmp_path / "odd", metadata={"provenance": "{"})
    with pytest.raises(UserError, match="not JSON"):
        Directions.load(tmp_path / "odd")
