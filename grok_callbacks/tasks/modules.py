"""Small networks as plain LightningModules: an example of the project that the callbacks are added to.

Nothing here knows of this package's callbacks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Loss = Literal["cross_entropy", "mse"]
Activation = Literal["relu", "gelu", "silu"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Classifier(pl.LightningModule):
    """Training, validation and optimiser, shared by all networks here; a subclass adds ``forward``.

    Logs ``train_loss`` and ``train_acc`` every step, ``val_loss`` and ``val_acc`` every validation.

    Args:
        lr: Learning rate of AdamW.
        weight_decay: Its decoupled weight decay, on every parameter.
        betas: Its averaging factors.
        loss: ``"cross_entropy"``, or ``"mse"`` against one-hot targets.

    Raises:
        ValueError: If ``loss`` is unknown.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__()
        if loss not in ("cross_entropy", "mse"):
            raise ValueError(f"`loss` must be 'cross_entropy' or 'mse', got {loss!r}.")
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.loss = loss

    def compute_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss against class numbers ``(n,)`` or one-hot targets ``(n, C)``."""
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits, targets)
        if not targets.is_floating_point():
            targets = F.one_hot(targets, logits.shape[-1])
        return F.mse_loss(logits, targets.to(logits.dtype))

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        logits = self(inputs)
        labels = targets.argmax(-1) if targets.is_floating_point() else targets
        return self.compute_loss(logits, targets), (logits.argmax(-1) == labels).float().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss, accuracy = self._evaluate(batch)
        self.log("train_loss", loss)
        self.log("train_acc", accuracy, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs loss and accuracy over the validation set."""
        loss, accuracy = self._evaluate(batch)
        size = len(batch[0])
        self.log("val_loss", loss, on_epoch=True, sync_dist=True, batch_size=size)
        self.log("val_acc", accuracy, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


class OneHotMLP(Classifier):
    """ReLU network on a pair's two one-hot vectors; the quickest to grok.

    Args:
        num_tokens: Size of the operands' alphabet.
        num_classes: Number of answers.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        init_scale: Factor on all initial weights and biases.
        lr: Learning rate.
        weight_decay: Weight decay.
        betas: AdamW's averaging factors.
        loss: ``"cross_entropy"`` or ``"mse"``.

    Raises:
        ValueError: If ``depth``, ``activation`` or ``loss`` is out of range.

    Example:
        >>> OneHotMLP(num_tokens=31, num_classes=31)(torch.tensor([[3, 4], [30, 0]])).shape
        torch.Size([2, 31])
    """

    def __init__(
        self,
        num_tokens: int,
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 1,
        activation: Activation = "relu",
        init_scale: float = 1.0,
        lr: float = 0.03,
        weight_decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(lr, weight_decay, betas, loss)
        self.save_hyperparameters()
        self.num_tokens = num_tokens
        self.mlp = _mlp([2 * num_tokens, *[width] * depth, num_classes], activation)
        _scale_parameters(self, init_scale)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits ``(n, C)`` of pairs of tokens ``(n, 2)``."""
        one_hot = F.one_hot(pairs, self.num_tokens).flatten(1)
        logits: Tensor = self.mlp(one_hot.to(self.dtype))
        return logits


class EmbeddingMLP(Classifier):
    """One embedding table for both operands, concatenated, then hidden layers.

    Args:
        num_tokens: Size of the operands' alphabet.
        num_classes: Number of answers.
        embedding_dim: Length of each token's vector.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        init_scale: Factor on all initial weights and biases, embedding included.
        lr: Learning rate.
        weight_decay: Weight decay.
        betas: AdamW's averaging factors.
        loss: ``"cross_entropy"`` or ``"mse"``.

    Raises:
        ValueError: If ``depth``, ``activation`` or ``loss`` is out of range.

    Example:
        >>> EmbeddingMLP(num_tokens=59, num_classes=59)(torch.tensor([[3, 4], [58, 0]])).shape
        torch.Size([2, 59])
    """

    def __init__(
        self,
        num_tokens: int,
        num_classes: int,
        *,
        embedding_dim: int = 64,
        width: int = 128,
        depth: int = 1,
        activation: Activation = "relu",
        init_scale: float = 1.0,
        lr: float = 0.01,
        weight_decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(lr, weight_decay, betas, loss)
        self.save_hyperparameters()
        self.embedding = nn.Embedding(num_tokens, embedding_dim)
        self.mlp = _mlp([2 * embedding_dim, *[width] * depth, num_classes], activation)
        _scale_parameters(self, init_scale)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits ``(n, C)`` of pairs of tokens ``(n, 2)``."""
        logits: Tensor = self.mlp(self.embedding(pairs).flatten(1))
        return logits


class DecoderTransformer(Classifier):
    """Decoder-only transformer that reads ``a``, ``b``, ``=`` and answers at the last position.

    Args:
        num_tokens: Size of the operands' alphabet, the equals sign not counted.
        num_classes: Number of answers.
        d_model: Width of the residual stream.
        num_heads: Attention heads of each layer; a divisor of ``d_model``.
        mlp_width: Hidden units of each layer's MLP.
        num_layers: Number of layers.
        layer_norm: Whether each sublayer and the unembedding read a normalised stream.
        causal: Whether a position sees only itself and those before it.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        init_scale: Factor on all initial weights and biases, embeddings included, normalisation layers not.
        lr: Learning rate.
        weight_decay: Weight decay.
        betas: AdamW's averaging factors.
        loss: ``"cross_entropy"`` or ``"mse"``.

    Raises:
        ValueError: If ``num_heads``, ``num_layers``, ``activation`` or ``loss`` is out of range.

    Example:
        >>> DecoderTransformer(num_tokens=31, num_classes=31)(torch.tensor([[3, 4], [30, 0]])).shape
        torch.Size([2, 31])
    """

    def __init__(
        self,
        num_tokens: int,
        num_classes: int,
        *,
        d_model: int = 64,
        num_heads: int = 4,
        mlp_width: int = 128,
        num_layers: int = 1,
        layer_norm: bool = True,
        causal: bool = True,
        activation: Activation = "relu",
        init_scale: float = 1.0,
        lr: float = 5e-3,
        weight_decay: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(lr, weight_decay, betas, loss)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"`num_heads` must divide `d_model` = {d_model}, got {num_heads}.")
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be positive, got {num_layers}.")
        self.save_hyperparameters()
        self.equals_token = num_tokens
        self.embedding = nn.Embedding(num_tokens + 1, d_model)
        self.position = nn.Embedding(3, d_model)
        self.blocks = nn.Sequential(
            *(
                _Block(
                    _Attention(d_model, num_heads, causal),
                    _mlp([d_model, mlp_width, d_model], activation),
                    _norm(d_model, layer_norm),
                    _norm(d_model, layer_norm),
                )
                for _ in range(num_layers)
            )
        )
        self.final_norm = _norm(d_model, layer_norm)
        self.unembedding = nn.Linear(d_model, num_classes, bias=False)
        # PyTorch draws embeddings from N(0, 1); 1/sqrt(d) gives the tokens unit length, as other layers have it.
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=1 / math.sqrt(d_model))
        _scale_parameters(self, init_scale)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits ``(n, C)`` of pairs of tokens ``(n, 2)``."""
        tokens = F.pad(pairs, (0, 1), value=self.equals_token)
        stream = self.blocks(self.embedding(tokens) + self.position.weight)
        logits: Tensor = self.unembedding(self.final_norm(stream[:, -1]))
        return logits


class MLPClassifier(Classifier):
    """Network on images, flattened, whose large initial weights delay generalisation.

    With ``init_scale`` 8 it memorises far from the solution that generalises, and weight decay brings it there slowly
    (Liu et al. 2022, Omnigrok, arXiv 2210.01117).

    Args:
        num_features: Pixels of an image.
        num_classes: Number of classes.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        init_scale: Factor on all initial weights and biases.
        lr: Learning rate.
        weight_decay: Weight decay.
        betas: AdamW's averaging factors.
        loss: ``"mse"`` against one-hot targets, or ``"cross_entropy"``.

    Raises:
        ValueError: If ``depth``, ``activation`` or ``loss`` is out of range.

    Example:
        >>> MLPClassifier()(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        num_features: int = 64,
        num_classes: int = 10,
        *,
        width: int = 200,
        depth: int = 2,
        activation: Activation = "relu",
        init_scale: float = 8.0,
        lr: float = 1e-3,
        weight_decay: float = 0.3,
        betas: tuple[float, float] = (0.9, 0.98),
        loss: Loss = "mse",
    ) -> None:
        super().__init__(lr, weight_decay, betas, loss)
        self.save_hyperparameters()
        self.mlp = _mlp([num_features, *[width] * depth, num_classes], activation)
        _scale_parameters(self, init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, C)`` of images ``(n, ...)``."""
        logits: Tensor = self.mlp(images.flatten(1))
        return logits


class _Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, attention_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(self.attention_norm(stream))
        output: Tensor = stream + self.mlp(self.mlp_norm(stream))
        return output


class _Attention(nn.Module):
    """Multi-head self-attention, each of its four matrices a layer of its own."""

    def __init__(self, d_model: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        query, key, value = (
            layer(stream).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


def _norm(size: int, wanted: bool) -> nn.Module:
    return nn.LayerNorm(size) if wanted else nn.Identity()


def _mlp(sizes: list[int], activation: Activation) -> nn.Sequential:
    if len(sizes) < 3:
        raise ValueError("`depth` must be at least 1.")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}.")
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes[:-1]):
        layers += [nn.Linear(size, next_size), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


@torch.no_grad()
def _scale_parameters(module: nn.Module, factor: float) -> None:
    for layer in module.modules():
        if not isinstance(layer, nn.LayerNorm):
            for parameter in layer.parameters(recurse=False):
                parameter.mul_(factor)
