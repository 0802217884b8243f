# SPDX-License-Identifier: Apache-2.0
"""The VQ-VAE: causal ids, a way back, training, checkpoints."""

from __future__ import annotations

import copy
import sys

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from reco_lightning.data.loading.resumable_loader import ResumableDataLoader
from reco_lightning.tokenizers.base import VideoTokenizer, to_unit_range
from reco_lightning.tokenizers.vqvae import VQVAE, gradient_loss, perplexity, psnr, rate_factor


class Clips(Dataset):
    """Coloured squares that move: something to learn."""

    def __init__(self, count=16, frames=9, size=32):
        generator = torch.Generator().manual_seed(0)
        self.videos = torch.full((count, frames, size, size, 3), 40, dtype=torch.uint8)
        for video in self.videos:
            row, column = torch.randint(0, size - 16, (2,), generator=generator).tolist()
            colour = torch.randint(60, 256, (3,), generator=generator).to(torch.uint8)
            for t in range(frames):
                video[t, row + t : row + t + 8, column : column + 8] = colour

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        return {"video": self.videos[index]}


def make(**options):
    torch.manual_seed(0)
    return VQVAE(**{"codebook_size": 64, "width": 8, **options})


def randomised(**options):
    """Every layer does something, also those that start at zero."""
    model = make(**options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def train(model, folder, *, steps=4, batch_size=4, resume=None, callbacks=(), val=False):
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
    )
    loader = ResumableDataLoader(Clips(), batch_size)
    trainer.fit(model, loader, DataLoader(Clips(4), 4) if val else None, ckpt_path=resume)
    return trainer


def test_functions():
    target = torch.zeros(2, 3, 4, 2, 2)
    noisy = target.clone()
    noisy[1] += 0.2
    torch.testing.assert_close(psnr(noisy, target), torch.tensor([100.0, 20.0]))
    assert psnr(target + 9, target + 1)[0] == 100  # shown, both are white
    assert perplexity(torch.zeros(5, dtype=torch.int64), 8) == 1
    torch.testing.assert_close(perplexity(torch.arange(8), 8), torch.tensor(8.0))
    assert gradient_loss(target + 1, target) == 0
    assert gradient_loss(torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)) == 0
    assert [rate_factor(s, warmup_steps=0, decay_steps=None) for s in (0, 9)] == [1, 1]
    assert rate_factor(99, warmup_steps=2, decay_steps=10) == 0


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("frames", "size"), [(1, (32, 32)), (9, (32, 64))])
def test_shapes(stride, frames, size):
    model = make(spatial_stride=stride)
    assert isinstance(model, VideoTokenizer)
    video = torch.rand(2, 3, frames, *size) * 2 - 1
    grid = model.grid(frames, *size)
    assert grid == (1 + (frames - 1) // 4, size[0] // stride, size[1] // stride)
    ids = model.encode(video)
    assert (ids.shape, ids.dtype) == ((2, *grid), torch.int64)
    assert model.decode(ids).shape == video.shape


@pytest.mark.parametrize("stride", [8, 16])
def test_ids_of_a_block_do_not_depend_on_later_frames(stride):
    model = randomised(spatial_stride=stride, depth=2)
    video = torch.rand(2, 3, 17, 32, 32) * 2 - 1
    ids = model.encode(video)
    assert len(ids.unique()) > 4
    for block in range(4):
        changed = video.clone()
        changed[:, :, 4 * block + 1 :] = torch.rand(2, 3, 16 - 4 * block, 32, 32) * 2 - 1
        new = model.encode(changed)
        assert torch.equal(new[:, : block + 1], ids[:, : block + 1])
        assert not torch.equal(new[:, block + 1], ids[:, block + 1])
        # a clip that ends there has the same ids
        assert torch.equal(model.encode(video[:, :, : 4 * block + 1]), ids[:, : block + 1])


def test_decoding_a_prefix_gives_the_prefix():
    model = randomised()
    ids = torch.randint(0, 64, (2, 4, 4, 4))
    video = model.decode(ids)
    for blocks in (1, 2, 3):
        part = model.decode(ids[:, :blocks])
        assert part.shape[2] == 1 + 4 * (blocks - 1)
        torch.testing.assert_close(part, video[:, :, : part.shape[2]], rtol=0, atol=1e-5)


def test_encode_and_decode_change_nothing_and_make_no_graph():
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    video = torch.rand(3, 3, 5, 32, 32, requires_grad=True)
    ids = model.encode(video)
    decoded = model.decode(ids)
    assert not decoded.requires_grad
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert torch.equal(model.encode(video), ids)
    assert torch.equal(model.decode(ids), decoded)


def test_encode_does_not_depend_on_the_batch():
    model = randomised()
    video = torch.rand(4, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(torch.cat([model.encode(clip[None]) for clip in video]), model.encode(video))


def test_ids_are_those_of_the_quantiser():
    model = randomised().eval()
    video = torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        features = model.encoder(video).movedim(1, -1).flatten(1, 3)
        model.quantizer.train()(features)  # k-means
        codes, ids, _ = model.quantizer.eval()(features)
    assert torch.equal(model.encode(video).flatten(1), ids)
    torch.testing.assert_close(model.quantizer.codebook[ids], codes)


def test_clamp():
    model = randomised()
    with torch.no_grad():
        model.decoder[-1].conv.bias.fill_(5)
    ids = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    assert model.decode(ids).max() > 1
    assert model.decode(ids, clamp=True).max() == 1


@pytest.mark.slow
def test_training_learns_and_logs(tmp_path):
    model = make(codebook_size=32, warmup_steps=5)
    seen = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer = train(model, tmp_path, steps=60, callbacks=[Record()], val=True)
    assert {"train/loss", "train/reconstruction", "train/perplexity"} <= seen[0].keys()
    assert seen[-1]["train/reconstruction"] < 0.5 * seen[0]["train/reconstruction"]
    assert seen[-1]["train/perplexity"] > 4
    assert {"val/loss", "val/psnr"} <= trainer.callback_metrics.keys()
    video = to_unit_range(Clips(4).videos)
    assert (
        psnr(model.decode(model.encode(video)), video).mean() > psnr(torch.full_like(video, video.mean()), video).mean()
    )


def test_sanity_validation_does_not_set_the_codebook(tmp_path):
    """K-means has to see training data."""
    model = make()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    before = model.quantizer.codebook.clone()
    trainer.validate(model, DataLoader(Clips(4), 4), verbose=False)
    assert torch.equal(model.quantizer.codebook, before)
    assert not model.quantizer.state_dict()["_codebook.initted"]


def test_gradient_term_changes_the_loss(tmp_path):
    video = {"video": Clips(4).videos}
    plain, sharp = make(), make(gradient_weight=1.0)
    for model in (plain, sharp):
        model._trainer = None
        model.log_dict = lambda *_, **__: None
    assert sharp.training_step(video, 0) > plain.training_step(video, 0)


def test_training_does_not_touch_the_global_random_state(tmp_path):
    model = make()
    model.log_dict = lambda *_, **__: None
    before = torch.random.get_rng_state()
    model.training_step({"video": Clips(4).videos}, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    whole = make(codebook_size=16, dead_code_threshold=2.0, decay_steps=10)  # codes die at every step
    train(whole, tmp_path, steps=8)
    trainer = train(make(codebook_size=16, dead_code_threshold=2.0, decay_steps=10), tmp_path, steps=stop)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    torch.manual_seed(123)
    resumed = VQVAE(codebook_size=16, width=8, dead_code_threshold=2.0, decay_steps=10)
    train(resumed, tmp_path, steps=8, resume=str(tmp_path / "stop.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_checkpoint_loads_with_weights_only(tmp_path):
    model = make(spatial_stride=16, learning_rate=1e-2, decay_steps=7)
    train(model, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    loaded = VQVAE.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    assert (loaded.codebook_size, loaded.spatial_stride, loaded.learning_rate) == (64, 16, 1e-2)
    video = to_unit_range(Clips(2).videos)
    assert torch.equal(loaded.encode(video), model.encode(video))


def test_learning_rate_rises_and_falls():
    model = make(learning_rate=0.5, warmup_steps=2, decay_steps=4)
    parts = model.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.25, 0.375, 0.25, 0.125, 0]


def test_every_parameter_is_trained():
    model = make()
    trained = {
        id(parameter)
        for group in model.configure_optimizers()["optimizer"].param_groups
        for parameter in group["params"]
    }
    assert trained == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spatial_stride": 4}, "spatial_stride must be 8 or 16, got 4"),
        ({"width": 12}, r"width must be a positive multiple of 8 .*, got 12"),
        ({"codebook_size": 1}, "codebook_size must be a whole number of 2 or more, got 1"),
        ({"depth": 0}, "depth must be a whole number of 1 or more, got 0"),
        ({"code_dim": 1}, "code_dim must be a whole number of 2 or more, got 1"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more, got -1"),
        ({"decay_steps": 0}, "decay_steps must be a whole number of 1 or more or None, got 0"),
        ({"mse_weight": -1.0}, "mse_weight must be a finite number of 0 or more, got -1.0"),
        ({"gradient_weight": -1.0}, "gradient_weight must be a finite number of 0 or more, got -1.0"),
        ({"commitment_weight": -1.0}, "commitment_weight must be a finite number of 0 or more, got -1.0"),
        ({"dead_code_threshold": -1.0}, "dead_code_threshold must be a finite number of 0 or more, got -1.0"),
        ({"codebook_decay": 1.0}, "codebook_decay must be at least 0 and below 1, got 1.0"),
    ],
)
def test_argument_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_input_errors():
    model = make()
    with pytest.raises(ValueError, match=r"video must be floating point of shape \(B, 3, T, H, W\) .* got torch.uint8"):
        model.encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"video must be .* got torch.float32 of shape \(1, 1, 8, 8, 3\)"):
        model.encode(torch.zeros(1, 1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"frames must be .*, got 4"):
        model.encode(torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match="height must be a multiple of 8 pixels, got 12"):
        model.encode(torch.zeros(1, 3, 1, 12, 8))
    with pytest.raises(
        ValueError, match=r"ids must be integers of shape \(B, t, h, w\), got torch.int64 of shape \(1, 4\)"
    ):
        model.decode(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids must be 0 to 63, got 0 to 64; were they made by another tokenizer"):
        model.decode(torch.tensor([0, 64]).view(1, 1, 1, 2))


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match=r"reco_lightning\[tokenizers\]"):
        make()
