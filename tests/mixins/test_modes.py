"""Every mixin in the Trainer's other modes and on other networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import IterableDataset

from grok_callbacks.mixins import (
    CommutativityMixin,
    InputNoiseMixin,
    MuonMixin,
    NormPenaltyMixin,
    SpectralEntropyMixin,
    WeightNoiseMixin,
    mixins_of,
    with_mixins,
)
from tests.mixins._nets import Mlp, Tokens, assert_close, fit, loader, token_loader, vectors, weights

MIXINS = {
    "spectral": SpectralEntropyMixin(0.1),
    "weight noise": WeightNoiseMixin(0.02),
    "input noise": InputNoiseMixin(0.5, 0.1, on="embedding"),
    "commutativity": CommutativityMixin(1.0),
    "norm": NormPenaltyMixin(0.01),
    "muon": MuonMixin(),
}
HOW = ["grafted, then compiled", "compiled, then grafted", "grafted in the trainer's form", "compiled part"]
CHOICES = [[name] for name in MIXINS] + [list(MIXINS)]


def tokens(names):
    torch.manual_seed(0)
    return with_mixins(Tokens(), *(MIXINS[name] for name in names)) if names else Tokens()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("names", CHOICES, ids="-".join)
def test_precision(names, precision):
    module, exact = tokens(names), tokens(names)
    trainer = fit(module, token_loader(), precision=precision, gradient_clip_val=1.0)
    assert trainer.global_step == 8
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    fit(exact, token_loader(), gradient_clip_val=1.0)
    if precision == "64-true" and {"weight noise", "input noise"}.intersection(names):
        return  # Noise is drawn in the precision of the parameters, and in float64 it is another.
    tolerance = 1e-5 if precision == "64-true" and "muon" not in names else 0.05
    assert_close({k: v.float() for k, v in weights(module).items()}, weights(exact), rtol=tolerance, atol=tolerance)


# Dynamo itself looks at the gradient of what a compiled part of a model is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("how", "names"), [*zip(HOW * 2, CHOICES[:-1], strict=False), *((how, CHOICES[-1]) for how in HOW)])
def test_compiled_modules(names, how):
    torch.compiler.reset()
    reference = tokens(names)
    expected = fit(reference, token_loader()).losses
    torch.manual_seed(0)
    module, mixins = Tokens(), [MIXINS[name] for name in names]
    if how == "compiled part":
        module.head = torch.compile(module.head, backend="aot_eager")
        trained = with_mixins(module, *mixins)
    elif how == "grafted, then compiled":
        trained = torch.compile(with_mixins(module, *mixins), backend="aot_eager")
    elif how == "compiled, then grafted":
        trained = with_mixins(torch.compile(module, backend="aot_eager"), *mixins)
    else:
        trained = with_mixins(from_compiled(torch.compile(module, backend="aot_eager")), *mixins)
    assert fit(trained, token_loader()).losses == pytest.approx(expected, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_grafted_again_after_compiling():
    torch.compiler.reset()
    torch.manual_seed(0)
    module = from_compiled(torch.compile(with_mixins(Tokens(), MIXINS["spectral"]), backend="aot_eager"))
    with_mixins(module, MIXINS["norm"], MIXINS["weight noise"])
    reference = tokens(["spectral", "norm", "weight noise"])
    assert fit(module, token_loader()).losses == pytest.approx(fit(reference, token_loader()).losses, rel=1e-4)


class Convolutional(Mlp):
    """A small CNN with batch norm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 4, 2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 4),
            nn.Linear(4, 3),
        )


class Recurrent(Mlp):
    """An LSTM."""

    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(2, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.net(x.unflatten(1, (2, 2)))[0][:, -1])


class Transformer(Mlp):
    """A transformer with layer norm and dropout."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.lift, self.net, self.head = (
            nn.Linear(1, 8),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.head(self.net(self.lift(x[..., None])).mean(1))


class Adapted(Mlp):
    """Frozen weights with a low-rank adapter that starts at zero."""

    def __init__(self):
        super().__init__()
        self.net.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.net(x) + self.up(self.down(x))


def flip(inputs):
    return inputs.flip(1)


@pytest.mark.parametrize("cls", [Convolutional, Recurrent, Transformer, Adapted])
def test_networks(cls):
    on_vectors = [InputNoiseMixin(0.1, 0.1), CommutativityMixin(0.1, swap=flip)]
    others = [MIXINS[name] for name in ("spectral", "weight noise", "norm", "muon")]
    torch.manual_seed(0)
    module = cls()
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(with_mixins(module, *on_vectors, *others))
    assert all(loss < 10 for loss in trainer.losses)
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all()
        assert torch.equal(parameter, before[name]) == (name in frozen), name


class Stream(IterableDataset):
    """Data that can only be iterated."""

    def __iter__(self):
        x, y = vectors()
        yield from zip(x, y, strict=True)


@pytest.mark.filterwarnings("ignore:.*barebones.*")
@pytest.mark.parametrize("settings", [{}, {"fast_dev_run": True}, {"barebones": True}, {"detect_anomaly": True}])
def test_loaders_and_modes_of_the_trainer(settings):
    mixins = [MIXINS[name] for name in ("spectral", "weight noise", "norm")]
    module = with_mixins(Mlp(), *mixins, InputNoiseMixin(0.1, 0.1))
    if "barebones" in settings:
        import lightning.pytorch as pl

        module.log = lambda *_, **__: None  # The module's own logging warns.
        pl.Trainer(accelerator="cpu", max_epochs=1, **settings).fit(module, loader())
        assert mixins_of(module)["weight_noise"].state_dict(module) == {"draws": 4}
        return
    batches = torch.utils.data.DataLoader(Stream(), batch_size=8)
    assert fit(module, batches, **settings).global_step == (1 if "fast_dev_run" in settings else 8)


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="Lightning has no WeightAveraging")
def test_an_average_of_weights_is_of_the_clean_ones():
    module = with_mixins(Mlp(lr=0.0), WeightNoiseMixin(0.5))
    clean = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, callbacks=[callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), clean[name])


def test_a_checkpoint_on_an_exception_has_the_clean_weights(tmp_path):
    class Failing(Mlp):
        def on_before_backward(self, loss):
            raise RuntimeError("failed on purpose")

    class Saving(Callback):
        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "exception.ckpt")

    module = with_mixins(Failing(), WeightNoiseMixin(0.5))
    clean = weights(module)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, callbacks=[Saving()])
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)["state_dict"]
    for name, _ in module.named_parameters():
        assert torch.equal(saved[name], clean[name])


def test_several_optimizers_under_manual_optimisation():
    class Two(Mlp):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.AdamW(self.net[:4].parameters()), torch.optim.AdamW(self.net[4:].parameters())]

    module = with_mixins(Two(), InputNoiseMixin(0.1, 0.1), MuonMixin())
    trainer = fit(module)
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["MuonWithRest", "MuonWithRest"]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
