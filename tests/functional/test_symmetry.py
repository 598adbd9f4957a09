"""Commutativity and group laws against plain loops over real groups, and tables that are none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grok_callbacks.functional import (
    associativity_agreement,
    commutativity,
    identity_agreement,
    inverse_agreement,
    logit_distance,
)


def modular_addition(n):
    elements = torch.arange(n)
    return (elements[:, None] + elements) % n


def symmetric_group(n):
    """Composition table of the permutations of n things, in a shuffled order: the identity is not element 0."""
    elements = list(itertools.permutations(range(n)))
    elements = elements[3:] + elements[:3]
    place = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[place[tuple(a[i] for i in b)] for b in elements] for a in elements])


def spoilt(table, share, seed=0):
    """The table with a share of its answers replaced by random ones, some of them no elements."""
    generator = torch.Generator().manual_seed(seed)
    n = len(table)
    noise = torch.randint(-1, n + 1, table.shape, generator=generator)
    return torch.where(torch.rand(table.shape, generator=generator) < share, noise, table)


class TestCommutativity:
    def test_golden(self, golden):
        case = golden["commutativity"]
        result = commutativity(torch.tensor(case["logits"]), torch.tensor(case["mirrored_logits"]))
        assert result.item() == case["commutativity"]

    def test_extremes(self):
        logits = torch.randn(20, 5)
        assert commutativity(logits, logits) == 1
        assert commutativity(logits, -logits) == 0
        assert commutativity(logits, 3 * logits + 1) == 1

    def test_symmetric_in_its_arguments_and_in_the_order_of_samples(self):
        generator = torch.Generator().manual_seed(0)
        logits, mirrored = torch.randn(2, 30, 3, generator=generator)
        value = commutativity(logits, mirrored)
        assert 0 < value < 1
        assert commutativity(mirrored, logits) == value
        order = torch.randperm(30)
        assert commutativity(logits[order], mirrored[order]) == value

    def test_logit_distance_is_the_penalty(self):
        logits, mirrored = torch.randn(2, 30, 3)
        reference = torch.nn.functional.mse_loss(logits.double(), mirrored.double())
        torch.testing.assert_close(logit_distance(logits, mirrored), reference)
        assert logit_distance(logits, logits) == 0

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_one_bad_logit_spoils_the_values(self, bad):
        logits = torch.randn(4, 3)
        other = logits.clone()
        other[2, 1] = bad
        assert commutativity(logits, other).isnan()
        assert commutativity(other, logits).isnan()
        assert not logit_distance(logits, other).isfinite()

    def test_a_class_ruled_out_is_no_bad_logit(self):
        logits = torch.tensor([[1.0, 0.0, -math.inf]])
        assert commutativity(logits, logits) == 1

    @pytest.mark.parametrize("function", [commutativity, logit_distance])
    def test_wrong_shapes(self, function):
        with pytest.raises(ValueError, match=r"^logits"):
            function(torch.ones(3), torch.ones(3))
        with pytest.raises(ValueError, match=r"^logits"):
            function(torch.ones(0, 3), torch.ones(0, 3))
        with pytest.raises(ValueError, match=r"^mirrored_logits"):
            function(torch.ones(2, 3), torch.ones(2, 4))

    def test_half_and_one_class(self):
        assert commutativity(torch.ones(3, 1).half(), torch.zeros(3, 1).half()) == 1
        # In half precision the square would overflow.
        assert logit_distance(torch.full((2, 2), 6e4).half(), torch.zeros(2, 2).half()).item() == pytest.approx(
            6e4**2, rel=1e-2
        )


def slow_laws(predictions, table, pairs):
    """Identity, inverse and associativity by their definitions, one pair or triple at a time."""
    n = len(table)
    p, t, seen = predictions.tolist(), table.tolist(), pairs.tolist()
    (e,) = (e for e in range(n) if all(t[e][a] == a == t[a][e] for a in range(n)))
    inverse = [next(b for b in range(n) if t[a][b] == e) for a in range(n)]
    is_element = range(n).__contains__
    identities = [p[a][e] == a for a in range(n) if seen[a][e]]
    inverses = [p[a][inverse[a]] == e for a in range(n) if seen[a][inverse[a]]]
    triples = []
    for a, b, c in itertools.product(range(n), repeat=3):
        ab, bc = p[a][b], p[b][c]
        asked = [(a, b), (b, c)] + [(ab, c)] * is_element(ab) + [(a, bc)] * is_element(bc)
        if all(seen[x][y] for x, y in asked):
            triples.append(is_element(ab) and is_element(bc) and p[ab][c] == p[a][bc])
    return [sum(law) / len(law) if law else math.nan for law in (identities, inverses, triples)]


def laws(predictions, table, pairs=None):
    return [
        identity_agreement(predictions, table, pairs).item(),
        inverse_agreement(predictions, table, pairs).item(),
        associativity_agreement(predictions, pairs).item(),
    ]


class TestGroupLaws:
    @pytest.mark.parametrize("table", [modular_addition(7), symmetric_group(3)], ids=["Z7", "S3"])
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_slow_reference(self, table, share):
        predictions = spoilt(table, share)
        seen = torch.rand(table.shape, generator=torch.Generator().manual_seed(2)) < 0.6
        everything = torch.ones_like(seen)
        for pairs in (seen, ~seen):
            assert laws(predictions, table, pairs) == pytest.approx(slow_laws(predictions, table, pairs), nan_ok=True)
        assert laws(predictions, table) == pytest.approx(slow_laws(predictions, table, everything))
        assert laws(predictions, table) == laws(predictions, table, everything)

    @pytest.mark.parametrize("table", [modular_addition(1), modular_addition(6), symmetric_group(3), symmetric_group(4)])
    def test_the_right_answers_obey(self, table):
        assert laws(table, table) == [1, 1, 1]

    def test_constant_answers_are_associative_and_little_else(self):
        table = modular_addition(5)
        assert laws(torch.full((5, 5), 2), table) == pytest.approx([0.2, 0, 1])

    def test_answers_that_are_no_elements_break_every_law(self):
        table = modular_addition(5)
        for answer in (-1, 5, 99):
            assert laws(torch.full((5, 5), answer), table) == [0, 0, 0]

    def test_left_identity_by_transposing(self):
        table = modular_addition(5)
        predictions = table.clone()
        predictions[0] = 0
        assert identity_agreement(predictions, table) == 1
        assert identity_agreement(predictions.T, table).item() == pytest.approx(0.2)

    def test_no_pair_left(self):
        table = modular_addition(5)
        assert all(math.isnan(value) for value in laws(table, table, torch.zeros(5, 5, dtype=torch.bool)))

    def test_subtraction_is_no_group(self):
        elements = torch.arange(5)
        subtraction = (elements[:, None] - elements) % 5
        # Zero leaves every element as it is from one side, but not from the other.
        for table in (subtraction, subtraction.T):
            with pytest.raises(ValueError, match="table must have an identity"):
                identity_agreement(table, table)

    def test_multiplication_with_zero_has_no_inverses(self):
        elements = torch.arange(5)
        with pytest.raises(ValueError, match="inverse"):
            inverse_agreement(torch.zeros(5, 5, dtype=torch.long), elements[:, None] * elements % 5)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
    def test_small_integers(self, dtype):
        table = modular_addition(6).to(dtype)
        assert laws(table, table) == [1, 1, 1]

    @pytest.mark.parametrize("predictions", [torch.ones(3, 3), torch.ones(3, 4).long(), torch.ones(0, 0).long()])
    def test_wrong_predictions(self, predictions):
        for call in (identity_agreement, inverse_agreement):
            with pytest.raises(ValueError, match=r"^predictions"):
                call(predictions, modular_addition(3))
        with pytest.raises(ValueError, match=r"^predictions"):
            associativity_agreement(predictions)

    def test_wrong_table_and_pairs(self):
        table = modular_addition(3)
        with pytest.raises(ValueError, match=r"^table"):
            identity_agreement(table, modular_addition(4))
        with pytest.raises(ValueError, match=r"^table"):
            inverse_agreement(table, table.double())
        with pytest.raises(ValueError, match=r"^pairs"):
            associativity_agreement(table, torch.ones(3, 3))
        with pytest.raises(ValueError, match=r"^pairs"):
            identity_agreement(table, table, torch.ones(2, 2, dtype=torch.bool))
