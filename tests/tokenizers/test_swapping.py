# SPDX-License-Identifier: Apache-2.0
"""One path names the tokenizer from videos to tokens and back to videos; nothing else changes from one to the next."""

from __future__ import annotations

import numpy as np
import pytest
from jsonargparse import Namespace

from reco_lightning import VideoModel, VideoTransformer
from reco_lightning.cli.entry_point import main
from reco_lightning.cli.shard_sizes import infer_sizes, sizes_of
from reco_lightning.data.tokens.manifest import read_manifest
from reco_lightning.data.tokens.shards import ClipSource, TokenShardWriter
from reco_lightning.data.video.clip import probe
from reco_lightning.support.media import write_video
from tests.helpers import tiny_tokenizers as tiny
from tests.helpers.checkpoints import save

#: How each is written to a path, and the frames of a clip for it.
TOKENIZERS = {
    "vqvae": (lambda path: save(tiny.vqvae(), path), 5),
    "omnitokenizer": (tiny.save_omnitokenizer, 5),
    "larp": (tiny.save_larp, 16),
    "emu3": (lambda path: tiny.emu3_network().save_pretrained(path), 4),
    "vidtok": (lambda path: tiny.vidtok_network().save_pretrained(path), 5),
    "vidtok-blockwise": (lambda path: tiny.vidtok_network(causal=False).save_pretrained(path), 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_videos_to_tokens_to_videos(name, tmp_path):
    write, frames = TOKENIZERS[name]
    tokenizer, tokens, out = tmp_path / "tokenizer", tmp_path / "tokens", tmp_path / "out"
    write(tokenizer)
    (tmp_path / "videos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "videos" / "a.mp4", noise)

    clips = [f"--frames={frames}", "--size=16", "--device=cpu"]
    main(["tokenize", f"--tokenizer={tokenizer}", f"--videos={tmp_path / 'videos'}", f"--output={tokens}", *clips])
    manifest = read_manifest(tokens)
    assert manifest.clips == 1

    sizes, _ = sizes_of(manifest, frame_blocks=4)
    network = VideoTransformer(**sizes, dim=32, depth=1, heads=2)
    model = save(VideoModel(network), tmp_path / "model.ckpt")
    options = [f"--tokenizer={tokenizer}", f"--output={out}", "-n", "2", "--device=cpu"]
    main(["generate", f"--checkpoint={model}", *options])
    shown = probe(out / "0001.mp4")
    assert (shown.frames, shown.height, shown.width) == (frames, 16, 16)


def write_shards(folder, *, vocab_size, grid, frame_aligned=True):
    ids = np.random.default_rng(0).integers(0, vocab_size, (8, *grid))
    with TokenShardWriter(folder, vocab_size=vocab_size, grid=grid, frame_aligned=frame_aligned) as writer:
        writer.write(ids, np.zeros(8, dtype=np.int64), [ClipSource(f"{i}.mp4", 0, 17) for i in range(8)])
    return folder


def arguments(folder, blocks=5):
    return Namespace(
        data=Namespace(init_args=Namespace(folder=str(folder))),
        model=Namespace(
            init_args=Namespace(network=Namespace(init_args=Namespace(vocab_size=1024, grid=(5, 16, 16), dim=8)))
        ),
        trainer=Namespace(
            callbacks=[
                Namespace(class_path="LearningRateMonitor"),
                Namespace(
                    init_args=Namespace(
                        sampler=Namespace(
                            init_args=Namespace(frame_blocks=blocks, tokens_per_block=256, window_blocks=2)
                        )
                    )
                ),
            ]
        ),
    )


def test_sizes_are_those_of_the_shards(tmp_path):
    found = arguments(write_shards(tmp_path, vocab_size=300, grid=(3, 4, 2)))
    changed = infer_sizes(found)
    assert changed == {
        "model.network.vocab_size": (1024, 300),
        "model.network.grid": ([5, 16, 16], [3, 4, 2]),
        "trainer.callbacks[1].sampler.frame_blocks": (5, 3),
        "trainer.callbacks[1].sampler.tokens_per_block": (256, 8),
    }
    assert vars(found.model.init_args.network.init_args) == {"vocab_size": 300, "grid": [3, 4, 2], "dim": 8}
    sampler = found.trainer.callbacks[1].init_args.sampler.init_args
    assert vars(sampler) == {"frame_blocks": 3, "tokens_per_block": 8, "window_blocks": 2}
    assert infer_sizes(found) == {}


def test_ids_without_an_order_of_time_are_split_evenly(tmp_path):
    write_shards(tmp_path, vocab_size=300, grid=(48,), frame_aligned=False)
    found = arguments(tmp_path, blocks=5)
    infer_sizes(found)
    assert found.trainer.callbacks[1].init_args.sampler.init_args.frame_blocks == 4  # 5 does not divide 48
    assert found.model.init_args.network.init_args.grid == [4, 1, 12]
    assert found.trainer.callbacks[1].init_args.sampler.init_args.tokens_per_block == 12


def test_what_is_not_there_changes_nothing(tmp_path):
    assert infer_sizes(arguments(tmp_path)) == {}
    assert infer_sizes(Namespace(data=None)) == {}
    shards = str(write_shards(tmp_path, vocab_size=300, grid=(3, 4, 2)))
    assert infer_sizes(Namespace(data=Namespace(init_args=Namespace(folder=shards)))) == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["reco", "baseline"])
@pytest.mark.parametrize("adopt", [True, False])
def test_a_recipe_changes_its_tokenizer_with_one_line(recipe, adopt, tmp_path, capsys):
    shards = write_shards(tmp_path / "tokens", vocab_size=300, grid=(3, 4, 2))
    network = ["--model.network.dim=32", "--model.network.depth=1", "--model.network.heads=2"]
    size = [
        "--data.batch_size=2",
        "--data.val_fraction=0.25",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
    ]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    run = ["fit", f"--config=recipe:{recipe}", *network, *size, *quiet, "--trainer.fast_dev_run=1"]
    run += [f"--data.folder={shards}", f"--sizes_from_shards={adopt}", f"--trainer.default_root_dir={tmp_path}"]
    if adopt:
        main(run)
    else:
        with pytest.raises(SystemExit):
            main(run)
        assert "the shards have vocab_size 300, the model 8192" in capsys.readouterr().err
