"""Random networks, data, globs and schedules: no monitor of the full preset fails, writes, draws or forgets."""

from __future__ import annotations

import copy
import math
import warnings
from fnmatch import fnmatchcase
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from grok_callbacks import EverySteps, LogSpaced, NormMonitor, Probe, Recorder, default_callbacks
from grok_callbacks.selection import select
from tests._common import Counting

EXAMPLES = settings(
    derandomize=True, deadline=None, report_multiple_bugs=False, phases=[Phase.explicit, Phase.generate]
)  # Shrinking takes minutes.
widths = st.sampled_from([4, 3, 2, 5, 8, 1])
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Identity, lambda: nn.Softmax(-1), nn.PReLU, nn.Dropout]


# --- networks ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """One layer called twice, a functional activation, an addition."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.layer(F.relu(self.layer(x)))


class Attention(nn.Module):
    """What has samples and positions, here one position a feature."""

    def __init__(self, width):
        super().__init__()
        self.inside = nn.Linear(1, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.outside = nn.Linear(4, 1)

    def forward(self, x):
        positions = self.inside(x[..., None])
        return self.outside(self.norm(positions + self.attention(positions, positions, positions)[0])).squeeze(-1)


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(1, width, batch_first=True)

    def forward(self, x):
        return self.lstm(x[..., None])[0][:, -1]


class Convolution(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x[:, None]))).mean(1)


class Odd(nn.Module):
    """Parameters of every kind: none to a side, a number alone, never used, frozen, whole numbers beside them."""

    def __init__(self, width):
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.gain = nn.Parameter(torch.ones(width))
        self.cube = nn.Parameter(torch.zeros(2, 1, 3))
        self.unused = nn.Linear(3, 2)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.frozen(x) * self.gain * self.scale


class Half(nn.Module):
    """A list, a mapping and two outputs on the way."""

    def __init__(self, width):
        super().__init__()
        self.parts = nn.ModuleDict({"one": nn.Linear(width, width), "two": nn.ModuleList([nn.Linear(width, width)])})

    def forward(self, x):
        one, other = self.parts["one"](x), self.parts["two"][0](x).square()
        return one * torch.sigmoid(other)


BLOCKS = [Residual, Attention, Recurrent, Convolution, Odd, Half, nn.LayerNorm]
FILLS = {"as made": None, "zero": 0.0, "equal": 0.3, "NaN": math.nan, "Inf": math.inf, "huge": 1e30, "tiny": 1e-40}


@st.composite
def networks(draw, features, outputs, *, ordinary=False):
    """Blocks in a row; now and then tied, in another precision, or, unless ordinary, filled with one number."""
    layers, width = [], features
    for _ in range(draw(st.integers(0, 3))):
        block = draw(st.sampled_from([None, *BLOCKS]))
        if block is None:
            after = draw(widths)
            layers += [nn.Linear(width, after, bias=draw(st.booleans())), draw(st.sampled_from(ACTIVATIONS))()]
            width = after
        else:
            layers.append(block(width))
    model = nn.Sequential(*layers, nn.Linear(width, outputs))
    twins = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.weight.shape == model[-1].weight.shape]
    if twins and draw(st.booleans()):
        model[-1].weight = twins[0].weight
    fill = None if ordinary else FILLS[draw(st.sampled_from(["as made"] * 6 + list(FILLS)))]
    if fill is not None:
        with torch.no_grad():
            draw(st.sampled_from(list(model.parameters()))).fill_(fill)
    model.train(draw(st.booleans()))
    return model.to(draw(st.sampled_from([torch.float32] * 6 + [torch.float64, torch.bfloat16])))


@st.composite
def ordinary_problems(draw):
    """A network that was made to tell classes apart, and samples with classes."""
    torch.manual_seed(draw(st.integers(0, 999)))
    features, outputs, count = draw(widths), draw(widths.filter(lambda width: width > 1)), draw(st.sampled_from([8, 5, 3, 2]))
    model = draw(networks(features, outputs, ordinary=True))
    return model, [(torch.randn(count, features), torch.randint(0, outputs, (count,))) for _ in range(2)]


@st.composite
def problems(draw):
    """A network and samples for it: classes, one logit, one-hot or real targets, or none."""
    torch.manual_seed(draw(st.integers(0, 999)))
    features, outputs, count = draw(widths), draw(widths), draw(st.sampled_from([8, 5, 3, 2, 1]))
    model = draw(networks(features, outputs))
    x = torch.randn(2 * count, features)
    targets = {
        "classes": torch.randint(0, max(outputs, 2), (2 * count,)), "real": torch.randn(2 * count, outputs),
        "one-hot": F.one_hot(torch.randint(0, outputs, (2 * count,)), outputs).float(), "none": None,
        "ignored": torch.full((2 * count,), -100),
    }[draw(st.sampled_from(["classes"] * 4 + ["real", "one-hot", "none", "ignored"]))]  # fmt: skip
    x = draw(st.sampled_from([x, x, x, x, torch.zeros_like(x), x * 1e20, torch.where(x == x[0, 0], torch.nan, x)]))
    splits = [(x[part], None if targets is None else targets[part]) for part in (slice(count), slice(count, None))]
    return model, [split if split[1] is not None else split[:1] for split in splits]


def state_of(model):
    return [
        copy.deepcopy(model.state_dict()), [module.training for module in model.modules()], torch.get_rng_state(),
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
    ]  # fmt: skip


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        # Bit for bit, NaN too.
        return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
    return one == other


def recorder_of(model, samples):
    probe = Probe(size=6, train=samples[0], validation=samples[1])
    return Recorder(model, default_callbacks("full", probe=probe, schedule=EverySteps(1)))


def described(recorder):
    return {key: (series.steps, [value.hex() for value in series.values]) for key, series in recorder.history.items()}


def drift(model, generator):
    """A step of some training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))


@settings(EXAMPLES, max_examples=25)
@given(problem=problems(), seed=st.integers(0, 99))
def test_no_monitor_fails_writes_or_draws(problem, seed):
    model, samples = problem
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    recorder = recorder_of(model, samples)
    for step in range(2):
        before = state_of(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = recorder.record(step)
        messages = [str(warning.message) for warning in caught]
        assert same(state_of(model), before)
        # One that cannot look at this network says so at the start; afterwards each may speak once, of what is not finite.
        kinds = (" left out, as not applicable", " left out, since the probe does not fit", "said once")
        assert all(any(kind in message for kind in kinds) for message in messages), messages
        spoken = [message for message in messages if "said once" in message]
        assert len(spoken) == len({message.partition(":")[0] for message in spoken})
        assert all(type(value) is float for value in values.values())
        assert math.isfinite(values["grok/norm"]) == all(bool(weight.isfinite().all()) for weight in model.parameters())
        drift(model, generator)
    # Another process, resumed between the two, finds the same to the last bit.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = recorder_of(twin, samples)
        first.record(0)
        drift(twin, generator.manual_seed(seed))
        second = recorder_of(twin, samples)
        second.load_state_dict(first.state_dict())
        second.record(1)
    assert described(second) == described(recorder)
    drift(twin, generator)
    assert same(list(twin.parameters()), list(model.parameters()))


#: Those that may have nothing to say of an ordinary network: one without activations, inputs that are no two operands, no run.
MAY_BE_SILENT = {"ActivationSparsityMonitor", "CommutativityMonitor", "GrokkingForecast"}


@settings(EXAMPLES, max_examples=12)
@given(problem=ordinary_problems())
def test_all_others_find_numbers_in_an_ordinary_network(problem):
    recorder = recorder_of(*problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder.record(0)
    known = {
        type(monitor).__name__: [math.isfinite(recorder.history[key].values[0]) for key in recorder.keys_of(monitor)]
        for monitor in recorder.monitors
    }
    assert {name for name, finite in known.items() if not any(finite)} <= MAY_BE_SILENT
    # Such as no gradient for a layer that is never used, no distance of classes that have one sample each.
    assert sum(map(sum, known.values())) >= 0.8 * sum(map(len, known.values()))


# --- globs ---------------------------------------------------------------------------------------------------------

letters = st.text("ab.0", min_size=1, max_size=4)
usual = st.sampled_from(["*", "a*", "*b", "?", "[ab]", "!a*", "!*b", "!?", "!*0*"])
patterns = st.lists(st.one_of(usual, usual, st.text("ab.0*?[]!-", max_size=5)), max_size=3)


@settings(EXAMPLES, max_examples=200)
@given(names=st.lists(letters, max_size=6, unique=True), globs=patterns)
def test_globs_choose_what_they_match_or_say_what_there_is(names, globs):
    wanted, unwanted = [glob for glob in globs if not glob.startswith("!")], [glob[1:] for glob in globs if glob[:1] == "!"]
    matched = all(any(fnmatchcase(name, glob) for name in names) for glob in [*wanted, *unwanted])
    expected = [
        name
        for name in names
        if any(fnmatchcase(name, glob) for glob in wanted or ["*"]) and not any(fnmatchcase(name, glob) for glob in unwanted)
    ]
    if globs and matched and expected:
        assert select(names, globs, "layers") == expected
        return
    with pytest.raises(ValueError, match="`layers`") as caught:
        select(names, globs, "layers")
    assert all(name in str(caught.value) for name in names)


@settings(EXAMPLES, max_examples=40)
@given(problem=problems(), glob=st.text("012.weightbas*?[]!", max_size=6), data=st.data())
def test_globs_on_a_networks_names(problem, glob, data):
    model, samples = problem
    monitors = [monitor for monitor in default_callbacks("full", schedule=EverySteps(1)) if hasattr(monitor, "layers")]
    monitor = data.draw(st.sampled_from([NormMonitor(parameters=glob), *(type(one)(layers=glob) for one in monitors)]))
    recorder = Recorder(model, [monitor], Probe(size=4, train=samples[0], validation=samples[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = ""
        try:
            recorder.record(0)
        except ValueError as error:
            refusal = str(error)
    assert not refusal or "`" in refusal or "has no" in refusal
    assert not recorder.switched_off


# --- schedules -----------------------------------------------------------------------------------------------------

schedules = st.one_of(st.integers(1, 40).map(EverySteps), st.integers(1, 30).map(LogSpaced))


@settings(EXAMPLES, max_examples=40)
@given(per_decade=st.integers(10, 60), decade=st.integers(1, 8))
def test_every_decade_has_its_measurements(per_decade, decade):
    schedule, step, found = LogSpaced(per_decade), 10**decade - 1, 0
    while (step := schedule.next_step(step)) < 10 ** (decade + 1):
        found += 1
    # In the first decades two points may round to one step.
    assert found == per_decade or (10 <= found < per_decade and 9 * 10**decade < 10 * per_decade**2)


@settings(EXAMPLES, max_examples=40)
@given(
    rules=st.lists(schedules, min_size=1, max_size=3),
    stops=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 20)), max_size=4),
)
def test_runs_that_are_interrupted_measure_where_others_do(rules, stops):
    """Interrupted anywhere and resumed from a checkpoint some steps earlier, again and again."""
    model, end = nn.Linear(2, 1), 160

    def make():
        return Recorder(model, [Counting(f"c{number}", schedule=rule) for number, rule in enumerate(rules)])

    whole = make()
    for step in range(end + 1):
        whole.record(step)
    recorder, saved, begin = make(), None, 0
    for stop, back in [*sorted(stops), (end, 0)]:
        for step in range(begin, stop + 1):
            recorder.record(step)
            if step == max(stop - back, begin):
                saved = copy.deepcopy(recorder.state_dict()), step
        if stop == end:
            break
        recorder = make()
        recorder.load_state_dict(saved[0])
        begin = saved[1]
    assert described(recorder) == described(whole)
    for number, rule in enumerate(rules):
        steps = whole.history[f"grok/c{number}"].steps
        assert steps[0] == 0
        assert all(rule.next_step(one) == other for one, other in pairwise(steps))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, math.nan, "2", None])
def test_schedules_of_nothing_are_refused(wrong):
    for make in (EverySteps, LogSpaced):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            make(wrong)
