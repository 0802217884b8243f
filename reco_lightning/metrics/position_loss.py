# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy by token position and by frame block (arXiv 2604.07402, Figures 8 to 10).

Measured on data, on what the model generates, and on what it generates after a true first frame (`own_samples`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.metrics.own_samples import check_batches, network_of, token_layout, unpack
from reco_lightning.support.argument_checks import check_int, check_tensor
from reco_lightning.support.plots import position_cross_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PositionLoss", "measure_position_loss", "position_loss"]

_IGNORED = -100


def position_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Returns the cross-entropy of every token: :math:`\ell_{b,i} = -\log \mathrm{softmax}(z_{b,i})_{e_{b,i}}`.

    Args:
        logits: (B, N, V), row i for token i.
        targets: Token ids, (B, N) int64; -100 where none counts.

    Returns:
        Nats, (B, N) float32; 0 where the target is -100.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> position_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))
        tensor([[1.3863, 1.3863]])
    """
    check_tensor(logits=logits, targets=targets)
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits must be (B, N, V) and targets (B, N), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    # sample by sample: the float copy of all logits of a batch would be the largest tensor by far
    pairs = zip(logits, targets, strict=True)
    rows = [F.cross_entropy(row.float(), target, reduction="none", ignore_index=_IGNORED) for row, target in pairs]
    return torch.stack(rows) if rows else logits.new_zeros(targets.shape, dtype=torch.float32)


class PositionLoss(Metric):
    r"""Mean cross-entropy at every place of the sequence and in every frame block.

    .. math::
        L_i = \frac{1}{|B_i|} \sum_{b \in B_i} \ell_{b,i} \qquad
        L^{(k)} = \frac{\sum_{i \in k} |B_i| L_i}{\sum_{i \in k} |B_i|}

    with :math:`\ell` from ``position_loss`` and :math:`B_i` the samples whose token i counts.

    - ``update(logits, targets)``: (B, R, V) and (B, R) int64. R is N, or less for a network that does not predict the
      first N - R tokens.
    - ``compute()``: ``position`` (N,), ``block`` (K,) and ``mean`` (), float64 in nats; NaN where nothing counted.

    Args:
        num_tokens: N, tokens of a sample.
        tokens_per_block: Tokens of a frame block; divides N.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> metric = PositionLoss(4, 2)
        >>> metric.update(torch.zeros(1, 4, 8), torch.tensor([[0, 1, 2, 3]]))
        >>> metric.compute()["block"]
        tensor([2.0794, 2.0794], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    totals: Tensor
    counts: Tensor

    def __init__(self, num_tokens: int, tokens_per_block: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_int(num_tokens=num_tokens, tokens_per_block=tokens_per_block)
        if tokens_per_block < 1 or num_tokens < 1 or num_tokens % tokens_per_block:
            raise ValueError(
                f"num_tokens must be whole frame blocks of tokens_per_block, got num_tokens={num_tokens} and "
                f"tokens_per_block={tokens_per_block}"
            )
        self.num_tokens = num_tokens
        self.tokens_per_block = tokens_per_block
        self.add_state("totals", torch.zeros(num_tokens, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_tokens, dtype=torch.int64), dist_reduce_fx="sum")

    @classmethod
    def of(cls, model: pl.LightningModule | nn.Module) -> PositionLoss:
        """Makes a metric that fits a model, on its device; ids that lie on no grid of frames are one block.

        Args:
            model: As in ``measure_position_loss``.
        """
        network = network_of(model)
        tokens_per_block, blocks, _ = token_layout(network)
        return cls(tokens_per_block * blocks, tokens_per_block).to(next(network.parameters()).device)

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds samples.

        Args:
            logits: (B, R, V), for the last R of the N tokens.
            targets: Their ids, (B, R) int64; -100 where none counts.

        Raises:
            ValueError: If the shapes do not fit, or there are more rows than tokens.
        """
        losses = position_loss(logits, targets)
        missing = self.num_tokens - losses.shape[1]
        if missing < 0:
            raise ValueError(f"logits must have {self.num_tokens} rows or less a sample, got {losses.shape[1]}")
        counted = (targets != _IGNORED).sum(0)
        self.totals = self.totals + F.pad(losses.double().sum(0), (missing, 0)).to(self.totals)
        self.counts = self.counts + F.pad(counted, (missing, 0)).to(self.counts)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Means over all samples.

        Returns:
            ``position`` (N,), ``block`` (K,) and ``mean`` (), float64 in nats; NaN where nothing counted.
        """
        totals = self.totals.view(-1, self.tokens_per_block).sum(1)  # (K,)
        counts = self.counts.view(-1, self.tokens_per_block).sum(1)
        return {
            "position": self.totals / self.counts,
            "block": totals / counts,
            "mean": totals.sum() / counts.sum(),
        }

    def record(self) -> dict[str, Any]:
        """Returns the losses, and what they rest on; JSON values, None where nothing counted."""
        value = {}
        for name, line in self.compute().items():
            numbers = [None if math.isnan(number) else number for number in line.reshape(-1).tolist()]
            value[name] = numbers[0] if name == "mean" else numbers
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            clips = int(self.counts.max())
        about = {"clips": clips, "tokens_per_block": self.tokens_per_block}
        return {"metric": type(self).__name__, "value": value} | about

    @override
    def plot(
        self,
        val: Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]] | None = None,
        ax: Axes | None = None,
    ) -> tuple[Figure, Axes]:
        """Draws the loss against the place in the sequence, with the borders and means of the frame blocks.

        Args:
            val: What ``compute`` returned, or that of several by the names for the legend; None computes.
            ax: Axes to draw into; None makes a figure.

        Returns:
            The figure and its axes.
        """
        val = self.compute() if val is None else val
        named: Mapping[str, Any] = {"cross-entropy": val} if "position" in val else val
        lines = {name: each["position"].reshape(-1).cpu().numpy() for name, each in named.items()}
        return position_cross_entropy(lines, self.tokens_per_block, y_label="cross-entropy (nats)", ax=ax)


@torch.no_grad()
def measure_position_loss(
    model: pl.LightningModule | nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    metric: PositionLoss | None = None,
) -> PositionLoss:
    """Runs a model over batches of tokens, in eval mode, and measures its loss by position.

    Args:
        model: A module with a ``network``, such as ``VideoModel``, or the network itself: a ``VideoTransformer``, a
            ``LARPTransformer`` or one with their ``forward``, ``grid``, ``num_tokens``, ``num_classes`` and ``prefix``.
            Its mode is left as it was.
        batches: ``{"tokens": (B, N) or (B, t, h, w) int64}``, with ``"label"`` (B,) int64 for a network with classes.
        metric: A metric to add to; None makes one.

    Returns:
        The metric, on the model's device.

    Raises:
        ValueError: If a batch does not fit the network.

    Example:
        >>> from reco_lightning.models.transformer import VideoTransformer
        >>> network = VideoTransformer(vocab_size=32, grid=(2, 2, 2), dim=32, depth=1, heads=2)
        >>> metric = measure_position_loss(network, [{"tokens": torch.zeros(3, 8, dtype=torch.long)}])
        >>> metric.compute()["position"].shape
        torch.Size([8])
    """
    network = network_of(model)
    check_batches(batches)
    if metric is not None and not isinstance(metric, PositionLoss):
        raise ValueError(f"metric must be a PositionLoss or None, got {metric!r}")
    if metric is None:
        metric = PositionLoss.of(network)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        for batch in batches:
            tokens, labels = unpack(network, batch)
            logits = network(tokens[:, :-1], labels)
            metric.update(logits, tokens[:, -logits.shape[1] :])
    finally:
        for module, mode in modes:
            module.training = mode
    return metric
