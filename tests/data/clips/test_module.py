# SPDX-License-Identifier: Apache-2.0
import lightning.pytorch as L
import pytest
import torch

from reco_lightning.data.clips.folder import Clip
from reco_lightning.data.clips.module import VideoDataModule, split_clips
from tests.helpers.videos import encode, grey_frames


@pytest.fixture
def root(tmp_path):
    for number in range(5):
        encode(tmp_path / "clips" / "ab"[number % 2] / f"{number}.mp4", grey_frames(8))
    return tmp_path / "clips"


class Probe(L.LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": []}

    def training_step(self, batch):
        self.seen["train"] += batch["index"].tolist()
        assert batch["video"].dtype == torch.uint8
        assert batch["video"].shape[1:] == (4, 32, 32, 3)
        return self.weight * batch["label"].sum()

    def validation_step(self, batch):
        self.seen["val"] += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder):
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def test_split_is_by_file_and_by_seed():
    clips = [Clip(f"{name}.mp4", start, 0) for name in range(20) for start in (0, 4, 8)]
    splits = [split_clips(clips, val_fraction=0.2, span=4, seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    train, held_out = ({clips[place].path for place in part} for part in splits[0])
    assert (len(train), len(held_out), train & held_out) == (16, 4, set())
    assert sorted(splits[0][0] + splits[0][1]) == list(range(60))


def test_both_parts_hold_a_file_however_few_there_are():
    clips = [Clip("a", 0, 0), Clip("b", 0, 0)]
    for fraction in (0.01, 0.99):
        assert [len(part) for part in split_clips(clips, val_fraction=fraction, span=4)] == [1, 1]
    assert split_clips(clips, val_fraction=0, span=4) == ([0, 1], [])


def test_a_single_file_is_split_by_time_without_a_shared_frame():
    clips = [Clip("a", start, 0) for start in range(0, 40, 2)]
    train, held_out = split_clips(clips, val_fraction=0.25, span=7)
    assert [clips[place].start for place in held_out] == [30, 32, 34, 36, 38]
    assert max(clips[place].start for place in train) + 7 <= 30
    assert len(train) == 12
    with pytest.raises(ValueError, match=r"val_fraction must leave a training clip, got 0\.5 of the 1 clips .* a; add"):
        split_clips(clips[:1], val_fraction=0.5, span=7)


def test_the_trainer_sees_every_clip_once_and_the_parts_share_no_file(root, tmp_path):
    data = VideoDataModule(str(root), frames=4, size=32, batch_size=3, val_fraction=0.3)
    model = Probe()
    trainer(tmp_path).fit(model, datamodule=data)
    assert sorted(model.seen["train"]) == list(range(6))
    assert model.seen["val"] == list(range(4))
    parts = [{clip.path for clip in part.clips} for part in (data.train_set, data.val_set)]
    assert (len(parts[0]), len(parts[1]), parts[0] & parts[1]) == (3, 2, set())
    assert data.folder.classes == ["a", "b"]


def test_without_validation_there_is_no_loader_and_predict_sees_all_in_order(root):
    data = VideoDataModule(str(root), frames=4, size=32, batch_size=4, val_fraction=0, cache=False)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert torch.cat([batch["index"] for batch in data.predict_dataloader()]).tolist() == list(range(10))


def test_workers_are_started_as_asked(root):
    data = VideoDataModule(str(root), frames=4, size=32, batch_size=4, num_workers=2, start_method="fork")
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.persistent_workers) == (2, True)
    assert sum(len(batch["video"]) for batch in loader) == len(data.train_set)


def test_order_is_a_function_of_seed_and_epoch_and_is_resumed(root):
    orders = []
    for seed in (0, 0, 1):
        data = VideoDataModule(str(root), frames=4, size=32, batch_size=3, val_fraction=0, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        orders.append([batch["index"].tolist() for batch in loader])
    assert orders[0] == orders[1] != orders[2]
    served = iter(loader)
    assert next(served)["index"].tolist() != orders[2][0]  # another order in the second epoch
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [batch["index"].tolist() for batch in resumed] == [batch["index"].tolist() for batch in served]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be a whole number of 0 or more, got -1"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1, got 1.0"),
    ],
)
def test_arguments_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        VideoDataModule("clips", **wrong)
