"""Signs of generalisation to come, against numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grok_callbacks.functional import answer_entropy, gradient_coherence, truncate_spectrum


def close(value, expected, **kwargs):
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), expected, **{"rtol": 1e-9, "atol": 1e-12, **kwargs})


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (6, 2, 3, 3)])
def test_truncation_against_numpy(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = weight.reshape(shape[0], -1).numpy()
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    for share, cut in zip((0.3, 0.5, 0.9), truncate_spectrum(weight, [0.3, 0.5, 0.9]), strict=True):
        rank = next(r for r in range(1, len(s) + 1) if (s[:r] ** 2).sum() >= share * (s**2).sum())
        assert cut.shape == weight.shape
        close(cut.reshape(shape[0], -1), (u[:, :rank] * s[:rank]) @ v[:rank])


def test_the_whole_share_is_the_weight_itself():
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    (cut,) = truncate_spectrum(weight, [1])
    assert cut.dtype == torch.float32
    torch.testing.assert_close(cut, weight)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_truncation_of_any_scale(scale):
    (cut,) = truncate_spectrum(scale * torch.diag(torch.tensor([3.0, 1.0])), [0.5])
    torch.testing.assert_close(cut, scale * torch.diag(torch.tensor([3.0, 0.0])))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_truncation_of_what_is_not_finite(bad):
    (cut,) = truncate_spectrum(torch.tensor([[1.0, bad]]), [0.5])
    assert cut.shape == (1, 2)
    assert cut.isnan().all()


def test_coherence_against_the_angle():
    a, b = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(gradient_coherence(a, b), (a * b).sum() / (a.norm() * b.norm()))
    # Late in training gradients are next to nothing.
    close(gradient_coherence(a * 1e-200, b * 1e-250), gradient_coherence(a, b))
    close(gradient_coherence(a, -3 * a), -1.0)
    assert gradient_coherence(a, torch.zeros_like(a)).isnan()
    assert gradient_coherence(a, a * math.nan).isnan()


def test_entropy_of_answers_in_closed_form():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    mean = mean.mean(0)
    close(answer_entropy(logits), -(mean * np.log(mean)).sum() / math.log(4))
    close(answer_entropy(torch.zeros(3, 5)), 1.0)
    close(answer_entropy(1e4 * torch.eye(6)), 1.0)
    close(answer_entropy(torch.tensor([[1e4, 0.0]] * 5)), 0.0)
    assert answer_entropy(torch.zeros(3, 1)).isnan()
    assert answer_entropy(torch.full((2, 2), math.nan)).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncate_spectrum(torch.ones(3), [0.5]), "weight"),
        (lambda: truncate_spectrum(torch.ones(0, 3), [0.5]), "weight"),
        (lambda: truncate_spectrum(torch.ones(3, 3, dtype=torch.cfloat), [0.5]), "weight"),
        (lambda: truncate_spectrum(torch.ones(3, 3), []), "shares"),
        (lambda: truncate_spectrum(torch.ones(3, 3), [0.5, 0.0]), "shares"),
        (lambda: truncate_spectrum(torch.ones(3, 3), [1.1]), "shares"),
        (lambda: gradient_coherence(torch.ones(3), torch.ones(1, 3)), "second"),
        (lambda: gradient_coherence(torch.ones(0), torch.ones(0)), "first"),
        (lambda: answer_entropy(torch.ones(3)), "logits"),
        (lambda: answer_entropy(torch.ones(0, 3)), "logits"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
