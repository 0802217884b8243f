# SPDX-License-Identifier: Apache-2.0
"""Text-to-video from end to end on generated pairs: captions, token shards, a tiny Llama, windows, guidance, a score.

    python examples/text_to_video.py

A square of one of three colours crosses four frames in one of four directions, and a caption of three to five words
says so. A Llama of 85,000 parameters learns the pairs with `ReCoCallback`. Then it is given captions, and a classifier
written by hand reads colour and direction from the ids that it sampled: both right by chance in one clip of twelve.
"""

from __future__ import annotations

import random
import tempfile
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reco_lightning import ReCoCallback, WindowSampler
from reco_lightning.data.tokens.caption_module import CaptionDataModule
from reco_lightning.data.tokens.shards import TokenShardWriter
from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.models.text_video.lightning_module import TextVideoModel
from reco_lightning.models.text_video.network import TextVideoNetwork

SIDE = 4  # frames, rows and columns
COLOURS = ("red", "green", "blue")  # ids 1 to 3; id 0 is the background
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
WORDS = ("a", "square", "moves", "to", "the", *COLOURS, *STEPS)
PHRASES = ("{} moves {}", "a {} square moves {}", "a {} square {}")


def clip(colour: int, direction: str, lane: int) -> np.ndarray:
    """Ids (4, 4, 4) of a square that crosses the picture in a row or column."""
    frames = np.zeros((SIDE, SIDE, SIDE), dtype=np.int64)
    for time in range(SIDE):
        row, column = (lane if step == 0 else time if step > 0 else SIDE - 1 - time for step in STEPS[direction])
        frames[time, row, column] = colour + 1
    return frames


def classify(frames: np.ndarray) -> tuple[int, str]:
    """Colour and direction that are seen most in a clip (4, 4, 4)."""
    colour = int(np.argmax([(frames == 1 + number).sum() for number in range(len(COLOURS))]))
    square = frames > 0
    moved = {
        name: sum((np.roll(now, step, (0, 1)) & later).sum() for now, later in pairwise(square))
        for name, step in STEPS.items()
    }
    return colour, max(moved, key=lambda name: moved[name])


def write_pairs(folder: Path, count: int) -> None:
    """Token shards with captions, as `reco tokenize --captions` makes them of videos."""
    draw = random.Random(0)
    pairs = [(draw.randrange(3), draw.choice(list(STEPS)), draw.randrange(SIDE)) for _ in range(count)]
    captions = [draw.choice(PHRASES).format(COLOURS[colour], direction) for colour, direction, _ in pairs]
    with TokenShardWriter(folder, vocab_size=1 + len(COLOURS), grid=(SIDE, SIDE, SIDE)) as writer:
        writer.write(np.stack([clip(*pair) for pair in pairs]), np.zeros(count, dtype=np.int64), captions=captions)


def write_words(folder: Path) -> None:
    """A text tokenizer of whole words, as a folder of transformers."""
    ids = {word: number for number, word in enumerate(("[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def accuracy(model: TextVideoModel, words: Path, *, captioned: bool = True) -> float:
    """Share of 96 sampled clips that show what their captions say."""
    wanted = [(colour, direction) for colour in range(3) for direction in STEPS] * 8
    captions = [PHRASES[i % 3].format(COLOURS[c], d) if captioned else "" for i, (c, d) in enumerate(wanted)]
    ids = generate_from_text(model, captions, tokenizer=str(words), cfg_scale=1.5, batch_size=96)
    clips = ids.view(-1, SIDE, SIDE, SIDE).numpy()
    return float(np.mean([classify(frames) == pair for frames, pair in zip(clips, wanted, strict=True)]))


def main(steps: int = 1200, seed: int = 0) -> dict[str, float]:
    """Trains, samples and judges; returns the shares of right clips with captions and without."""
    pl.seed_everything(seed, verbose=False)
    llama = {"model_type": "llama", "vocab_size": 1 + len(WORDS), "hidden_size": 64, "intermediate_size": 128}
    llama |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    network = TextVideoNetwork(vocab_size=1 + len(COLOURS), grid=(SIDE, SIDE, SIDE), architecture=llama)
    model = TextVideoModel(network, learning_rate=2e-3, warmup_steps=50, caption_dropout=0.1)
    sampler = WindowSampler(frame_blocks=SIDE, tokens_per_block=SIDE * SIDE, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        shards, words = Path(folder, "tokens"), Path(folder, "words")
        write_pairs(shards, count=2000)
        write_words(words)
        data = CaptionDataModule(str(shards), text_tokenizer=str(words), batch_size=8, val_fraction=0.0, seed=seed)
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[ReCoCallback(sampler, continuity_weight=0.01)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        shares = {"captions": accuracy(model, words), "no captions": accuracy(model, words, captioned=False)}
    print(
        f"after {steps} steps {shares['captions']:.0%} of the clips show colour and direction of their captions; "
        f"sampled without captions {shares['no captions']:.0%}; by chance {1 / 12:.0%}"
    )
    return shares


if __name__ == "__main__":
    main()
