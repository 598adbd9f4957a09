"""Over updates and ranks the metrics give what the functions give at once."""

from __future__ import annotations

import pytest
import torch

from grok_callbacks.functional import answer_entropy, gradient_coherence
from grok_callbacks.metrics import AnswerEntropy, GradientCoherence
from tests.metrics._common import check_metric

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(11, 4, generator=GENERATOR)
PIECES = [tuple(torch.randn(2, *shape, generator=GENERATOR)) for shape in ((5, 3), (7,), (1,))]


def test_answers_over_updates():
    check_metric(AnswerEntropy, list(LOGITS.split([5, 1, 5])), answer_entropy(LOGITS))


def test_coherence_over_pieces():
    first, second = (torch.cat([pair[which].flatten() for pair in PIECES]) for which in (0, 1))
    metric = GradientCoherence()
    for pair in PIECES:
        metric.update(*pair)
    assert metric.compute() == pytest.approx(float(gradient_coherence(first, second)))
    metric.reset()
    metric.update(*PIECES[0])
    assert metric.compute() == pytest.approx(float(gradient_coherence(*PIECES[0])))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="logits"):
        AnswerEntropy().update(torch.ones(3))
    with pytest.raises(ValueError, match="second"):
        GradientCoherence().update(torch.ones(3), torch.ones(2))
