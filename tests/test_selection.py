from __future__ import annotations

import pytest
import torch
from torch import nn

from grok_callbacks import ModelView, Probe
from grok_callbacks.selection import clean_name, select

NAMES = ["embed", "blocks.0.attn", "blocks.0.mlp.0", "blocks.0.mlp.1", "blocks.1.mlp.0", "head"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("net.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.weight", "net.0.weight"),
        ("net._orig_mod.0._checkpoint_wrapped_module.weight", "net.0.weight"),
        ("_fsdp_wrapped_module.net._fsdp_wrapped_module.weight", "net.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mod", ""),
    ],
)
def test_clean_name(raw, clean):
    assert clean_name(raw) == clean


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("head", ["head"]),
        ("blocks.*", NAMES[1:5]),
        ("*.mlp.*", NAMES[2:5]),
        ("blocks.?.mlp.0", ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
        ("blocks.[0-9].attn", ["blocks.0.attn"]),
        (["head", "embed"], ["embed", "head"]),
        (["*", "!blocks.*"], ["embed", "head"]),
        ("!blocks.*", ["embed", "head"]),
        (["blocks.*", "*.mlp.*"], NAMES[1:5]),
        (("blocks.*", "!*.attn", "!*.1"), ["blocks.0.mlp.0", "blocks.1.mlp.0"]),
    ],
)
def test_globs(patterns, chosen):
    assert select(NAMES, patterns, "layers") == chosen


@pytest.mark.parametrize("patterns", ["Head", "block.*", ["embed", "nothing.*"], ["*", "!nothing"], "", ["embed", ""]])
def test_a_pattern_that_matches_nothing_lists_what_there_is(patterns):
    with pytest.raises(ValueError, match="matches nothing") as caught:
        select(NAMES, patterns, "layers")
    assert "`layers`" in str(caught.value)
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("patterns", [5, None, ["embed", 5], [None], 0.5, b"embed"])
def test_what_is_no_pattern(patterns):
    with pytest.raises(ValueError, match="`layers` must be a name or a glob, or a list of them"):
        select(NAMES, patterns, "layers")


def test_a_slip_of_the_pen_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"Did you mean 'blocks.0.attn'"):
        select(NAMES, "blocks.0.atn", "layers")


def test_nothing_left():
    with pytest.raises(ValueError, match="leaves nothing"):
        select(NAMES, ["head", "!h*"], "layers")
    with pytest.raises(ValueError, match="leaves nothing"):
        select(NAMES, "!*", "layers")
    with pytest.raises(ValueError, match=r"`layers` holds no pattern.*embed"):
        select(NAMES, [], "layers")


def test_long_lists_are_cut_short():
    with pytest.raises(ValueError, match="and 940 more"):
        select([f"layer.{i}" for i in range(1000)], "x", "layers")


def test_an_empty_model_says_so():
    with pytest.raises(ValueError, match="nothing to choose from"):
        select([], "x", "layers")


def test_wrapped_submodules_keep_the_users_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(4, 4), checkpoint_wrapper(nn.Sequential(nn.Linear(4, 3), nn.ReLU())), nn.Linear(3, 2))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    probe = Probe(train=torch.randn(5, 4))
    views = [ModelView(module, probe, {"train": probe.sample("train")}) for module in (model, plain)]
    assert list(views[0].parameters) == list(views[1].parameters)
    assert views[0].sites == views[1].sites
    assert len(set(views[0].sites)) == len(views[0].sites)
    assert views[0].hidden_activations == views[1].hidden_activations == ["1.1"]


def test_compiled_modules_keep_the_users_names():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    probe = Probe(train=torch.randn(5, 4))
    plain = ModelView(model, probe, {"train": probe.sample("train")})
    whole = ModelView(torch.compile(model, backend="eager"), probe, {"train": probe.sample("train")})
    part = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    part[0] = torch.compile(part[0], backend="eager")
    part = ModelView(part, probe, {"train": probe.sample("train")})
    for view in (whole, part):
        assert list(view.parameters) == list(plain.parameters)
        assert view.sites == plain.sites
        assert view.hidden_activations == ["1"]


def test_tied_weights_count_once_under_their_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    assert list(ModelView(Tied(), Probe()).parameters) == ["embed.weight"]


def test_matrices_leave_out_biases_and_gains():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2), nn.Conv1d(2, 2, 3))
    assert ModelView(model, Probe()).matrices == ["0.weight", "2.weight", "3.weight"]
    with pytest.raises(ValueError, match="no parameter with two or more dimensions"):
        ModelView(nn.LayerNorm(3), Probe()).select_matrices(None)
    with pytest.raises(ValueError, match=r"`parameters`.*matches nothing"):
        ModelView(model, Probe()).select_matrices("*.bias")
