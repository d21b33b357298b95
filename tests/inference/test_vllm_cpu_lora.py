"""The CPU LoRA operators against a plain loop over rows."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.vllm

INDICES = {
    "mixed": [-1, 0, 2, -1, 1, 2, 0],
    "one adapter": [1] * 7,
    "base only": [-1] * 7,
    "last slot and base": [2, -1, -1, 2, -1, -1, -1],
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("extra_dimension", [False, True])
def test_shrink_and_expand_equal_a_loop_over_rows(name: str, extra_dimension: bool) -> None:
    from ema_scale.inference import vllm_cpu_lora as ops

    torch.manual_seed(0)
    indices = torch.tensor(INDICES[name])
    x, a, b = torch.randn(7, 10), torch.randn(3, 4, 10), torch.randn(3, 6, 4)
    shaped_a, shaped_b = (a.unsqueeze(1), b.unsqueeze(1)) if extra_dimension else (a, b)

    small = torch.full((7, 5), 9.0)
    ops.bgmv_shrink(x, shaped_a, small, indices, 0.5)
    expected = torch.stack([0.5 * a[i] @ row if i >= 0 else torch.zeros(4) for i, row in zip(indices, x, strict=True)])
    torch.testing.assert_close(small[:, :4], expected)
    assert (small[:, 4] == 9).all()

    delta = torch.stack([b[i] @ row if i >= 0 else torch.zeros(6) for i, row in zip(indices, expected, strict=True)])
    out = torch.ones(7, 8)
    ops.bgmv_expand_slice(expected, shaped_b, out, indices, 1, 6, True)
    torch.testing.assert_close(out[:, 1:7], 1 + delta)
    assert (out[:, [0, 7]] == 1).all()

    short = torch.ones(7, 5)  # fewer columns than the adapter has
    ops.bgmv_expand(expected, shaped_b, short, indices, False)
    torch.testing.assert_close(short, delta[:, :5])


@pytest.mark.parametrize("name", INDICES)
def test_a_compiled_graph_gives_the_same(name: str) -> None:
    from ema_scale.inference import vllm_cpu_lora as ops

    torch.manual_seed(0)
    indices, x, b = torch.tensor(INDICES[name]), torch.randn(7, 4), torch.randn(3, 6, 4)

    def expand(x: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        out = torch.ones(7, 6)
        ops.bgmv_expand_slice(x, b, out, indices, 0, 6, True)
        return out

    compiled = torch.compile(expand, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, b, indices), expand(x, b, indices))


def test_registering_puts_them_in_place_of_vllms_own() -> None:
    from ema_scale.inference import vllm_cpu_lora as ops
    from ema_scale.inference.vllm_engine import is_cpu_build, prepare_environment

    if not is_cpu_build():
        pytest.skip("this vLLM is not a CPU build: its kernels skip base rows themselves")
    prepare_environment()
    ops.register()
    ops.register()
    assert ops.base_rows_are_untouched()


def test_the_plugin_costs_nothing_to_import() -> None:
    import subprocess
    import sys

    code = "import sys, ema_scale.inference.vllm_cpu_lora; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
