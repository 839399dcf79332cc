"""The compiled rotation equals the rotation by operations of PyTorch."""

import keras
import pytest

if keras.config.backend() != "torch":
    pytest.skip("Needs PyTorch.", allow_module_level=True)

import torch

from keras_openllama.layers import rotary_embedding, rotation_torch
from keras_openllama.layers.rotary_embedding import rotate
from keras_openllama.layers.rotation_torch import compiled_rotate, is_rotation_compiled
from keras_openllama.native.library import native_library

pytestmark = pytest.mark.skipif(
    native_library() is None, reason="the library is not compiled on this system"
)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def inputs(batch_of_tables, length=70, head_dim=100):
    """Heads as a projection gives them, and tables."""
    x = random(2, length, 3, head_dim, seed=0).transpose(1, 2).requires_grad_()
    angles = random(batch_of_tables, 1, length, head_dim // 2, seed=1)
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize("batch_of_tables", [1, 2])
@pytest.mark.parametrize("head_dim", [6, 64, 100])
def test_compiled_rotate_equals_rotate_with_its_gradient(batch_of_tables, head_dim):
    x, cos, sin = inputs(batch_of_tables, head_dim=head_dim)
    slopes = random(*x.shape, seed=2)
    found, expected = (
        rotation(x, cos, sin)
        for rotation in (compiled_rotate, rotary_embedding._rotate)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found,), (expected,) = (
        torch.autograd.grad(rotated, x, slopes) for rotated in (found, expected)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_compiled_rotate_gives_the_same_bits_with_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(compiled_rotate(*inputs(1, length=500)))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_rotate_of_many_elements_is_compiled(monkeypatch):
    x, cos, sin = inputs(1)
    assert is_rotation_compiled(x)
    assert not is_rotation_compiled(x[:, :, :1])
    assert not is_rotation_compiled(x.to(torch.bfloat16))
    calls = []
    monkeypatch.setattr(
        rotation_torch._Rotation, "apply", lambda *args: calls.append(args)
    )
    rotate(x, cos, sin)
    assert len(calls) == 1
