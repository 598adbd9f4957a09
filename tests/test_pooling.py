"""Max pooling without indices, against torch's own."""

from __future__ import annotations

import itertools
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grok_callbacks._isolation import observing
from grok_callbacks._pooling import quick_pooling


class Operations(TorchDispatchMode):
    """Counts torch's own poolings."""

    def __init__(self):
        super().__init__()
        self.poolings = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.poolings += "max_pool" in str(func)
        return func(*args, **(kwargs or {}))


def pooled_both_ways(layer, images):
    """By torch, quickly, and how often torch's own was called then."""
    with torch.no_grad():
        own = layer(images)
        with quick_pooling([layer]), Operations() as operations:
            quick = layer(images)
    return own, quick, operations.poolings


def images_of(*shape, dtype=torch.float32, seed=0):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    images.view(-1)[::17] = torch.inf
    images.view(-1)[5::23] = -torch.inf
    images.view(-1)[::31] = torch.nan
    return images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_setting_gives_the_values_of_torch(dtype):
    looked_at = 0
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3, (2, 3)), (None, 1, 2, (3, 2)), (0, 1, (0, 1)), (1, 2)):
        layer = nn.MaxPool2d(kernel, stride, padding, dilation)
        for shape in ((3, 2, 8, 8), (2, 3, 7, 9)):
            images = images_of(*shape, dtype=dtype)
            try:
                with torch.no_grad():
                    layer(images)
            except RuntimeError:
                continue  # A padding of more than half the window: its own test.
            own, quick, poolings = pooled_both_ways(layer, images)
            assert torch.equal(own.isnan(), quick.isnan()), layer
            assert torch.equal(own.nan_to_num(nan=7.0), quick.nan_to_num(nan=7.0)), layer
            assert own.dtype == quick.dtype
            looked_at += 1
            assert own.stride() == quick.stride()
            if padding == 0 and kernel != 1:
                assert poolings == 0, f"{layer} should be quick"
    assert looked_at > 100


@pytest.mark.parametrize(
    "make",
    [
        lambda images: images[:, :, ::2],  # rows apart
        lambda images: images.transpose(2, 3),  # torch's own, for columns come first
        lambda images: images.to(memory_format=torch.channels_last),
        lambda images: images[0],  # one image without a batch
        lambda images: images.expand(2, -1, -1, -1),
        lambda images: images[:0],
        lambda images: images.permute(1, 0, 2, 3),
    ],
)
def test_other_layouts(make):
    own, quick, _ = pooled_both_ways(nn.MaxPool2d(2), make(torch.randn(1, 4, 8, 8)))
    assert torch.equal(own, quick)
    assert quick.is_contiguous() or not own.is_contiguous()


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool2d(1), nn.MaxPool2d(1, 2), nn.MaxPool2d((2,)), nn.MaxPool2d([2, 3], padding=[1]), nn.MaxPool2d(np.int64(2))],
)
def test_unusual_settings(layer):
    images = torch.randn(2, 3, 8, 8)
    own, quick, _ = pooled_both_ways(layer, images)
    assert torch.equal(own, quick)
    # Memory of its own: what the network then writes there must not reach the images.
    assert quick.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    with torch.no_grad(), quick_pooling([layer]):
        assert torch.equal(layer(input=images), own)


def test_derivatives_forwards_are_torch_s():
    layer, flat = nn.MaxPool2d(2), torch.ones(1, 1, 2, 2)
    tangent = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    with torch.no_grad(), quick_pooling([layer]):
        assert torch.func.jvp(layer, (flat,), (tangent,))[1].item() == 1


def test_channels_last_is_left_to_torch_which_is_quick_there():
    assert pooled_both_ways(nn.MaxPool2d(2), torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last))[2] == 1


@pytest.mark.parametrize("layer", [nn.MaxPool2d(9), nn.MaxPool2d(2, padding=2), nn.MaxPool2d(5, dilation=3)])
def test_what_torch_refuses_is_refused_alike(layer):
    images = torch.randn(1, 1, 8, 8)
    with torch.no_grad(), pytest.raises(RuntimeError) as own:
        layer(images)
    with torch.no_grad(), quick_pooling([layer]), pytest.raises(RuntimeError) as quick:
        layer(images)
    assert str(own.value) == str(quick.value)


def test_indices_ceilings_and_gradients_are_torch_s():
    images = torch.randn(2, 3, 7, 7)
    own, quick, _ = pooled_both_ways(nn.MaxPool2d(2, return_indices=True), images)
    assert all(map(torch.equal, own, quick))
    own, quick, _ = pooled_both_ways(nn.MaxPool2d(2, ceil_mode=True), images)
    assert torch.equal(own, quick)
    assert own.shape[-1] == 4
    # Of equal entries torch's gradient goes to the first, where a maximum of two would share it out.
    flat, layer = torch.ones(1, 1, 2, 2, requires_grad=True), nn.MaxPool2d(2)
    with quick_pooling([layer]):
        (gradient,) = torch.autograd.grad(layer(flat).sum(), flat)
    assert gradient.flatten().tolist() == [1, 0, 0, 0]


def test_under_vmap():
    layer, images = nn.MaxPool2d(2), torch.randn(2, 3, 4, 4)
    weights = torch.randn(5, 6, 3, 3, 3)

    def call(weight):
        return layer(nn.functional.conv2d(images, weight, padding=1))

    with torch.no_grad():
        with quick_pooling([layer]), Operations() as operations:
            quick = torch.vmap(call)(weights)
        assert operations.poolings == 0
        torch.testing.assert_close(quick, torch.stack([call(weight) for weight in weights]))


class Pooling(nn.MaxPool2d):
    """A user's own, which may do anything."""

    def forward(self, images):
        return 2 * super().forward(images)


def test_a_pass_over_the_probe_is_quick_and_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), Pooling(2), nn.Flatten())
    images = torch.randn(3, 1, 14, 14)
    own = model(images).detach()
    with observing(model), Operations() as operations:
        with observing(model):
            quick = model(images)
        assert torch.equal(model(images), quick)
    assert torch.equal(own, quick)
    assert operations.poolings == 0
    with suppress(ZeroDivisionError), observing(model):
        raise ZeroDivisionError
    assert all("forward" not in vars(layer) for layer in model)
    assert nn.MaxPool2d.forward.__module__.startswith("torch.")
    with observing(model, grad=True), Operations() as operations:
        model(images)
    assert operations.poolings == 2
