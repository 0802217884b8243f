# SPDX-License-Identifier: Apache-2.0
"""A LightningModule and a data module small enough to run the command line's tests in seconds."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

__all__ = ["TinyData", "TinyModel", "TinyNetwork", "TokenData", "record"]


class TinyNetwork(nn.Module):
    """One linear layer."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(2, width, bias=bias)


class TinyModel(L.LightningModule):
    """Minimises the mean of a linear layer's output."""

    ran: list[float] = []  # noqa: RUF012  (every run's learning rates, read by the tests)

    def __init__(
        self, network: TinyNetwork, learning_rate: float = 0.1, momentum: float = 0.0, decay: float = 1.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network
        self.learning_rate, self.momentum, self.decay = learning_rate, momentum, decay

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.ran.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = self.network.linear(batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.network.linear(batch).mean())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.network.linear(batch).mean())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network.linear(batch)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=self.momentum)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=self.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TinyData(L.LightningDataModule):
    """Four rows of ones for every stage."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(4, 2), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class TokenData(L.LightningDataModule):
    """Random tokens of a 5 x 2 x 2 grid, 16 ids."""

    def __init__(self, clips: int = 8) -> None:
        super().__init__()
        self.clips = clips

    def train_dataloader(self) -> DataLoader[dict[str, object]]:
        tokens = torch.randint(0, 16, (self.clips, 20), generator=torch.Generator().manual_seed(0))
        rows: list[dict[str, object]] = [{"tokens": row, "label": 0} for row in tokens]
        return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def record(path: str, *, quick: bool = False, n: int = 1) -> None:
    """Prints what it was given.

    Args:
        path: Any text; `fail` raises.
        quick: A switch.
        n: A number.
    """
    if path == "fail":
        raise ValueError("from outside the package")
    print(f"{path} {quick} {n}")
