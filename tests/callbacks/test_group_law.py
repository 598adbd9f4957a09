"""GroupLawMonitor on networks that obey some laws and not others."""

from __future__ import annotations

import math

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks import GroupLawMonitor, Probe, Recorder
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.tasks import PairTaskDataModule, permutation_group
from grok_callbacks.tasks.modules import EmbeddingMLP

LAWS = ("identity", "inverse", "associativity")
CYCLIC = (torch.arange(5)[:, None] + torch.arange(5)) % 5


class Table(nn.Module):
    def __init__(self, answers):
        super().__init__()
        self.register_buffer("answers", answers)

    def forward(self, pairs):
        return F.one_hot(self.answers[pairs[:, 0], pairs[:, 1]], len(self.answers)).float()


def record(model, *args, **settings):
    values = Recorder(model, [GroupLawMonitor(*args, on_error="raise", **settings)]).record(0)
    return {key.removeprefix("grok/group_law/"): value for key, value in values.items()}


def by_hand(answers, table, seen):
    """Every law, over all, seen and unseen questions, triple by triple."""
    size = len(table)
    identity = next(e for e in range(size) if all(table[e][a] == a == table[a][e] for a in range(size)))
    result = {}
    for suffix, ask in (("", lambda *_: True), ("/seen", lambda *p: p in seen), ("/unseen", lambda *p: p not in seen)):
        unit = [answers[a][identity] == a for a in range(size) if ask(a, identity)]
        inverses = [next(b for b in range(size) if table[a][b] == identity) for a in range(size)]
        back = [answers[a][b] == identity for a, b in enumerate(inverses) if ask(a, b)]
        triples = []
        for a in range(size):
            for b in range(size):
                for c in range(size):
                    ab, bc = answers[a][b], answers[b][c]
                    if ask(a, b) and ask(b, c) and ask(ab, c) and ask(a, bc):
                        triples.append(answers[ab][c] == answers[a][bc])
        for law, holds in zip(LAWS, (unit, back, triples), strict=True):
            if holds:
                result[f"{law}{suffix}"] = sum(holds) / len(holds)
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_against_triples_by_hand(seed):
    table = permutation_group(3).group.table
    generator = torch.Generator().manual_seed(seed)
    answers = torch.where(torch.rand(6, 6, generator=generator) < 0.7, table, torch.randint(6, (6, 6), generator=generator))
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))[torch.randperm(36, generator=generator)[:24]]
    values = record(Table(answers), table, train_pairs=pairs)
    expected = by_hand(answers.tolist(), table.tolist(), {tuple(pair) for pair in pairs.tolist()})
    assert values == pytest.approx(expected)


def test_laws_of_which_there_is_no_question_are_left_out():
    values = record(Table(CYCLIC), CYCLIC, train_pairs=torch.tensor([[0, 0]]))
    assert {"identity/seen", "inverse/seen", "associativity/seen"} < set(values)
    values = record(Table(CYCLIC), CYCLIC, train_pairs=torch.tensor([[1, 1]]))
    assert not any(key.endswith("/seen") for key in values)


def test_a_network_that_has_learned_the_group_obeys_it():
    values = record(Table(CYCLIC), CYCLIC, train_pairs=torch.tensor([[0, 0], [1, 4], [2, 0]]))
    assert [values[f"{law}{part}"] for law in LAWS for part in ("", "/unseen")] == [1.0] * 6


def test_seen_pairs_are_found_in_the_training_data():
    pairs = torch.tensor([[0, 0], [1, 4], [3, 0], [2, 2]])
    monitor = GroupLawMonitor(CYCLIC, probe=Probe(train=(pairs, pairs.sum(1) % 5)), on_error="raise")
    Recorder(Table(CYCLIC), [monitor]).record(0)
    assert monitor._seen.nonzero().tolist() == [[0, 0], [1, 4], [2, 2], [3, 0]]


def test_inputs_built_for_the_model():
    class Tokens(Table):
        def forward(self, tokens):
            assert (tokens[:, 2] == 9).all()
            return super().forward(tokens[:, :2])

    def build(pairs):
        return F.pad(pairs, (0, 1), value=9)

    train = build(torch.tensor([[1, 2], [3, 4]]))
    monitor = GroupLawMonitor(CYCLIC, inputs=build, probe=Probe(train=(train, torch.zeros(2).long())), on_error="raise")
    values = Recorder(Tokens(CYCLIC), [monitor]).record(0)
    assert values["grok/group_law/associativity"] == 1.0
    assert int(monitor._seen.sum()) == 2


def test_answers_that_are_no_elements_break_the_laws():
    class Elsewhere(nn.Module):
        def forward(self, pairs):
            return F.one_hot(torch.full_like(pairs[:, 0], 6), 7).float()

    values = record(Elsewhere(), CYCLIC, train_pairs=torch.tensor([[0, 0]]))
    assert [values[law] for law in LAWS] == [0.0] * 3


@pytest.mark.filterwarnings("ignore:.*nan at step")
def test_logits_that_are_not_numbers_give_nan():
    class Broken(nn.Module):
        def forward(self, pairs):
            return torch.full((len(pairs), 5), torch.nan)

    values = record(Broken(), CYCLIC, train_pairs=torch.tensor([[0, 0]]))
    assert len(values) == 9
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize(
    "table", [torch.zeros(3, 3).long(), torch.zeros(2, 3).long(), torch.eye(3), torch.tensor([[0, 1], [1, 1]])]
)
def test_a_table_of_no_group_is_refused(table):
    with pytest.raises(ValueError, match=r"table|predictions"):
        GroupLawMonitor(table)


@pytest.mark.parametrize(
    "pairs", [torch.tensor([[0, 5]]), torch.tensor([[-1, 0]]), torch.zeros(2, 3).long(), torch.zeros(2, 2)]
)
def test_bad_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="`train_pairs`"):
        GroupLawMonitor(CYCLIC, train_pairs=pairs)


def fit(module, data, *monitors):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(monitors),
    )  # fmt: skip
    trainer.fit(module, data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_in_a_trainer():
    data = PairTaskDataModule("add", 5)
    monitor = GroupLawMonitor(data.task.group.table, on_error="raise")
    logged = fit(EmbeddingMLP(5, 5), data, monitor)
    assert {f"grok/group_law/{law}{part}" for law in LAWS for part in ("", "/seen")} <= set(logged)
    assert int(monitor._seen.sum()) == len(data.train_set)
    assert "Tensor(5, 5)" in monitor.label


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"table": (torch.arange(7)[:, None] + torch.arange(7)) % 7}, "Logits|`inputs`|called"),
        ({"table": CYCLIC, "inputs": lambda pairs: pairs.int()}, "`inputs`"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start_of_fit(settings, named):
    with pytest.raises((MisconfigurationException, IndexError), match=named):
        fit(EmbeddingMLP(5, 5), PairTaskDataModule("add", 5), GroupLawMonitor(**settings))
