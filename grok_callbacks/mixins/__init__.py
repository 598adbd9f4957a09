"""Regularisers and perturbations that graft onto any LightningModule.

Each is an object with its settings; :func:`with_mixins` grafts them onto a class or an instance:

.. code-block:: python

    from grok_callbacks.mixins import SpectralEntropyMixin, WeightNoiseMixin, with_mixins

    module = with_mixins(module, SpectralEntropyMixin(beta=0.1), WeightNoiseMixin(delta=1e-2))
"""

from grok_callbacks.mixins._base import Mixin
from grok_callbacks.mixins._graft import mixins_of, with_mixins
from grok_callbacks.mixins.commutativity import CommutativityMixin
from grok_callbacks.mixins.input_noise import InputNoiseMixin
from grok_callbacks.mixins.muon import MuonMixin
from grok_callbacks.mixins.norm_penalty import NormPenaltyMixin
from grok_callbacks.mixins.spectral_entropy import SpectralEntropyMixin
from grok_callbacks.mixins.weight_noise import WeightNoiseMixin

__all__ = [
    "CommutativityMixin",
    "InputNoiseMixin",
    "Mixin",
    "MuonMixin",
    "NormPenaltyMixin",
    "SpectralEntropyMixin",
    "WeightNoiseMixin",
    "mixins_of",
    "with_mixins",
]
