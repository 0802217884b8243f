# SPDX-License-Identifier: Apache-2.0
"""The text-to-video module in a trainer: its loss, hidden captions, windows, checkpoints and prediction."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.data.tokens.caption_module import CaptionDataModule
from reco_lightning.data.tokens.shards import TokenShardWriter
from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.models.text_video.lightning_module import TextVideoModel
from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.pipelines.predict.caption_requests import CaptionRequests
from reco_lightning.pipelines.predict.video_writer import VideoWriter
from tests.helpers.foreign import trainer
from tests.helpers.processes import run_module
from tests.helpers.words import save_words
from tests.models.text_video.test_network import LLAMA, TEXT, VIDEO

pytestmark = pytest.mark.third_party

GRID, TOKENS = (5, 1, 2), 10
CAPTIONS = torch.tensor([[-1, -1, 4], [8, 2, 10], [-1, -1, -1], [-1, 5, 4]])


def module(**options):
    torch.manual_seed(0)
    model = TextVideoModel(
        TextVideoNetwork(VIDEO, GRID, architecture=LLAMA), **({"caption_dropout": 0.0, "learning_rate": 0.01} | options)
    )
    model.configure_model()
    return model


def batch(captions=CAPTIONS):
    tokens = torch.randint(VIDEO, (len(captions), TOKENS), generator=torch.Generator().manual_seed(1))
    return {"caption": captions, "tokens": tokens}


class Batches(torch.utils.data.Dataset):
    """Batches whose captions have 3, 1, 2 and 3 columns."""

    columns = (3, 1, 2, 3)

    def __len__(self):
        return len(self.columns)

    def __getitem__(self, index):
        return batch(CAPTIONS[:, : self.columns[index]])


def batches():
    return DataLoader(Batches(), batch_size=None)


def test_the_loss_is_over_the_whole_vocabulary_for_the_video_alone():
    model, given = module(), batch()
    ids = torch.cat([CAPTIONS[1], torch.tensor([TEXT + VIDEO]), given["tokens"][1] + TEXT])
    logits = model.network.language_model(ids[None]).logits[0]
    expected = F.cross_entropy(logits[3:-1], ids[4:])  # the row of the start is the first, of 18 ids
    one = {name: value[1:2] for name, value in given.items()}
    torch.testing.assert_close(model._loss(one["caption"], one["tokens"]), expected)


def test_which_captions_are_hidden_depends_on_batch_and_rank_alone():
    model = module(caption_dropout=0.5)
    shares = []
    for number in range(50):
        model._batch_number = number
        hidden = model._hidden(8)
        torch.rand(3)
        assert model._hidden(8).equal(hidden)
        shares.append(hidden.float().mean())
    assert 0.4 < torch.stack(shares).mean() < 0.6
    assert len(set(map(float, shares))) > 1


def test_a_hidden_caption_is_none(monkeypatch):
    model, given = module(caption_dropout=0.5), batch()
    monkeypatch.setattr(model, "_hidden", lambda count: torch.tensor([True, True, False, False]))
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    expected = given["caption"].clone()
    expected[:2] = -1
    torch.testing.assert_close(model.training_step(given, 0), model._loss(expected, given["tokens"]))


def by_cache(model, given, window):
    """Gradients of a window behind transformers' own cache of a context that is run under ``no_grad``."""
    captions, tokens = given["caption"], given["tokens"]
    cache = None
    if window.start:
        cache = DynamicCache()
        with torch.no_grad():
            model.network(captions, tokens[:, : window.start - 1], cache)
    logits = model.network(captions, tokens[:, : window.stop - 1], cache)[:, -(window.stop - window.start) :]
    targets = tokens[:, window.start : window.stop] + TEXT
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_windowed_step_has_the_gradients_of_a_window_behind_its_frozen_context(start):
    sampler = next(s for s in (WindowSampler(5, 2, seed=seed) for seed in range(99)) if s.sample(0).start == 2 * start)
    model = module()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    expected = by_cache(module(), batch(), sampler.sample(0))
    trainer(ReCoCallback(sampler, continuity_weight=0.0)).fit(model, DataLoader([batch()], batch_size=None))
    for name, value in model.state_dict().items():
        torch.testing.assert_close((before[name] - value) / 0.1, expected[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"context": "keys", "windows_per_batch": 2}], ids=str)
def test_captions_of_changing_length_train_in_windows(options):
    model, seen = module(), []
    model.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    before = copy.deepcopy(model.state_dict())
    callback = ReCoCallback(WindowSampler(5, 2, seed=3), **options)
    trainer(callback, max_epochs=1).fit(model, batches())
    assert set(seen) == {1, 2, 3}
    # transformers 4.48 cuts the mask to as many columns as the layer made keys, the context's left out
    assert callback.state_dict()["choice"]["engine"] in ("frozen", "cache")
    assert all(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_gradient_checkpointing_changes_no_weight():
    weights = []
    for flag in (False, True):
        model = module(gradient_checkpointing=flag)
        trainer(ReCoCallback(WindowSampler(5, 2, seed=3)), max_epochs=1).fit(model, batches())
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


def test_a_checkpoint_needs_no_pretrained_folder(tmp_path):
    folder = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    model = TextVideoModel(TextVideoNetwork(VIDEO, GRID, pretrained=str(folder)), learning_rate=0.01)
    fit = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    fit.fit(model, batches())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    folder.rename(tmp_path / "moved")
    again = TextVideoModel.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    own = batch()
    torch.testing.assert_close(again(**pair(own)), model.eval()(**pair(own)))


def pair(given):
    return {"captions": given["caption"], "tokens": given["tokens"]}


def test_predict_writes_what_generate_gives(tmp_path):
    words = save_words(tmp_path / "words", ["a", "red", "square"])
    (tmp_path / "captions.txt").write_text("a red square\nred\n\n")
    model = module()
    requests = CaptionRequests(
        str(tmp_path / "captions.txt"), text_tokenizer=words, cfg_scale=2.0, seed=4, batch_size=2
    )
    run = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[VideoWriter(output=str(tmp_path / "videos"))],
    )
    run.predict(model, datamodule=requests)
    captions = torch.tensor([[0, 1, 2], [-1, -1, 1], [-1, -1, -1]])
    expected = generate_from_text(model, captions, cfg_scale=2.0, seed=4)
    written = [np.load(tmp_path / "videos" / f"{number:04d}.npy") for number in range(3)]
    assert np.array_equal(np.stack(written), expected.view(3, *GRID).numpy())


@pytest.mark.slow
def test_fit_on_shards_from_the_command_line(tmp_path):
    words = save_words(tmp_path / "words", [f"w{number}" for number in range(TEXT - 1)])
    with TokenShardWriter(tmp_path / "tokens", vocab_size=VIDEO, grid=GRID) as writer:
        ids = np.random.default_rng(0).integers(0, VIDEO, (8, *GRID))
        writer.write(ids, np.zeros(8, dtype=np.int64), captions=["w1 w2", "w3", None, "w0 w4 w5"] * 2)
    sampler = {"class_path": "WindowSampler", "init_args": {"frame_blocks": 1, "tokens_per_block": 1}}
    config = {
        "sizes_from_shards": True,
        "model": {
            "class_path": "reco_lightning.models.text_video.lightning_module.TextVideoModel",
            "init_args": {
                "network": {
                    "class_path": "reco_lightning.models.text_video.network.TextVideoNetwork",
                    "init_args": {"vocab_size": 1, "grid": [1, 1, 1], "architecture": LLAMA},
                }
            },
        },
        "data": {
            "class_path": "reco_lightning.data.tokens.caption_module.CaptionDataModule",
            "init_args": {"folder": str(tmp_path / "tokens"), "text_tokenizer": words, "batch_size": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "runs")}},
            "callbacks": [{"class_path": "ReCoCallback", "init_args": {"sampler": sampler}}],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert "10 video tokens" in run_module("reco_lightning", "fit", "--config", "run.yaml", folder=tmp_path)
    path = next((tmp_path / "runs").rglob("*.ckpt"))
    model = TextVideoModel.load_from_checkpoint(path, weights_only=True)
    assert model.network.grid == GRID
    assert model.network.vocab_size == VIDEO


def test_a_text_tokenizer_of_other_ids_is_refused(tmp_path):
    words = save_words(tmp_path / "words", [f"w{number}" for number in range(40)])
    with TokenShardWriter(tmp_path / "tokens", vocab_size=VIDEO, grid=GRID) as writer:
        writer.write(np.zeros((4, *GRID), dtype=np.int64), np.zeros(4, dtype=np.int64), captions=["w30"] * 4)
    data = CaptionDataModule(str(tmp_path / "tokens"), text_tokenizer=words, val_fraction=0)
    with pytest.raises(ValueError, match="ids below 11, got id 30"):
        trainer().fit(module(), datamodule=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"weight_decay": -1}, "weight_decay must be a finite number of 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more"),
        ({"caption_dropout": 1.0}, r"caption_dropout must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must hold 'caption' and 'tokens', got"):
        module().validation_step({"tokens": torch.zeros(1, TOKENS)}, 0)
    with pytest.raises(ValueError, match="must hold 10 tokens a sample"):
        module().validation_step({"caption": CAPTIONS[:1], "tokens": torch.zeros(1, 4)}, 0)
    with pytest.raises(ValueError, match="must hold 'index'"):
        module().predict_step({"caption": CAPTIONS}, 0)
