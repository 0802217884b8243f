# SPDX-License-Identifier: Apache-2.0
"""The package's own network and module, with the optimizer of the table."""

from __future__ import annotations

import torch

from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel
from tests.helpers.networks.common import BATCH, CLASSES, DEPTH, DIM, GRID, HEADS, VOCAB, flat_loss


class OwnModule(VideoModel):
    """``VideoModel`` trained by SGD, so that a gradient can be told from its weights."""

    def __init__(self, *, classes=0, start_token=True):
        super().__init__(
            VideoTransformer(
                vocab_size=VOCAB,
                grid=GRID,
                dim=DIM,
                depth=DEPTH,
                heads=HEADS,
                num_classes=classes,
                start_token=start_token,
                dropout=0.1,
            ),
            label_dropout=0.0,
        )

    def loss(self, batch):
        logits = self.network(batch["tokens"][:, :-1], batch["label"] if self.network.num_classes else None)
        return flat_loss(logits, batch["tokens"][:, -logits.shape[1] :])

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch), batch_size=BATCH)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def conditional():
    return OwnModule(classes=CLASSES)
