# SPDX-License-Identifier: Apache-2.0
"""Scores a model's generated videos against a data set, as a callback of the trainer's test loop: `reco evaluate`.

Heavy extractors and the tokenizer live here and not in the model: a checkpoint never holds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.checks import check_path, check_switch, check_whole
from reco_lightning.data.frames import is_frame_folder
from reco_lightning.data.tokens import TokenShards
from reco_lightning.data.video import read_clip
from reco_lightning.decoding import decode_videos
from reco_lightning.disk_errors import named_disk_errors
from reco_lightning.draws import check_sampling
from reco_lightning.evaluation_report import write_report
from reco_lightning.generation import generate
from reco_lightning.metrics.clip_score import CLIPScore
from reco_lightning.metrics.frechet import FrechetVideoDistance, RandomFeatureDistance
from reco_lightning.metrics.interval import INTERVALS, IntervalPSNR
from reco_lightning.metrics.motion_groups import MotionGroups
from reco_lightning.metrics.optical_flow import IntervalOpticalFlow
from reco_lightning.metrics.position_loss import PositionLoss
from reco_lightning.metrics.protocols import fvd_protocol
from reco_lightning.models.video_model import VideoModel
from reco_lightning.tokenizers.base import VideoTokenizer, fingerprint
from reco_lightning.tokenizers.loading import load_tokenizer
from reco_lightning.whole_file import whole_file

__all__ = ["EvaluateVideos"]

_REMEDY = "ids generated before are kept: free space, and give the same command again"


class EvaluateVideos(pl.Callback):
    """Generates a video for every test clip, with its label, and compares the two sets.

    Real clips are read from the video files where ``videos`` names their folder, and are the tokenizer's
    reconstructions otherwise; the report says which. Cross-entropy by position is measured on the data, on what was
    generated, and with ``first_blocks`` true frame blocks in front. A video depends on the seed and its clip's number
    alone: any number of processes gives the same scores. Ids that were generated are kept in ``output/ids``: an
    interrupted evaluation goes on with them.

    Args:
        tokenizer: Checkpoint or folder of the tokenizer that made the shards.
        output: Folder of the report: ``evaluation.json``, ``evaluation.md`` and figures.
        n: At most so many clips; ``None`` is all.
        videos: Folder of the video files that the shards were made from.
        extractor: File of an Inception-I3D, as in ``fvd_extractor`` (``reco convert-i3d`` writes one), for the Fréchet
            video distance; without it the distance is one of random features, and named so.
        protocol: ``styleganv``, ``tats``, ``omnitokenizer`` or ``larp``; read where ``extractor`` is given.
        clip: Folder of a CLIP model of transformers, for shards with captions; ``None`` measures no CLIP score.
        flow: Whether to measure optical flow and the distance by groups of motion, which needs OpenCV.
        first_blocks: True frame blocks that every generated video continues, 0 or more.
        temperature: As in ``generate``, like all that follows.
        top_k: As in ``generate``.
        top_p: As in ``generate``.
        cfg_scale: As in ``generate``.
        seed: As in ``generate``.
        window_blocks: As in ``generate``: what a model of Fewer-Frames sees at once.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> evaluation = EvaluateVideos("vqvae.ckpt", n=2048)
        >>> trainer = pl.Trainer(callbacks=[evaluation], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        output: str = "outputs/evaluation",
        n: int | None = None,
        videos: str | None = None,
        extractor: str | None = None,
        protocol: str = "styleganv",
        clip: str | None = None,
        flow: bool = True,
        first_blocks: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scale: float = 1.0,
        seed: int = 0,
        window_blocks: int | None = None,
    ) -> None:
        check_path(tokenizer=tokenizer, output=output)
        check_path(videos=videos, extractor=extractor, clip=clip, or_none=True)
        check_whole(n=n, or_none=True)
        check_whole(first_blocks=first_blocks)
        check_switch(flow=flow)
        fvd_protocol(protocol)
        check_sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cfg_scale=cfg_scale,
            seed=seed,
            window_blocks=window_blocks,
        )
        if n is not None and n < 2:
            raise ValueError(f"n must be 2 clips or more, or None for all, got {n}")
        if first_blocks < 0:
            raise ValueError(f"first_blocks must be 0 or more, got {first_blocks}")
        self.tokenizer = tokenizer
        self.output = Path(output)
        self.n = n
        self.videos = videos
        self.extractor, self.protocol = extractor, protocol
        self.clip = clip
        self.flow = flow
        self.first_blocks = first_blocks
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "cfg_scale": cfg_scale,
            "seed": seed,
            "window_blocks": window_blocks,
        }
        self._decoder: VideoTokenizer | None = None
        self._metrics: dict[str, Metric] = {}
        self._done = 0

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the tokenizer and the extractors, and refuses ids of another evaluation."""
        if not isinstance(pl_module, VideoModel):
            raise MisconfigurationException(f"EvaluateVideos scores a VideoModel, got {type(pl_module).__name__}")
        network = pl_module.network
        self._done = 0
        self._decoder = load_tokenizer(self.tokenizer, vocab_size=network.vocab_size)
        if isinstance(self._decoder, nn.Module):
            self._decoder.to(pl_module.device)
        self._metrics = {name: metric.to(pl_module.device) for name, metric in self._build(pl_module).items()}
        self._keep_settings(pl_module)

    def _build(self, module: VideoModel) -> dict[str, Metric]:
        assert self._decoder is not None
        grid = module.network.grid
        probe = torch.zeros(1, module.network.num_tokens, dtype=torch.int64, device=module.device)
        frames = decode_videos(self._decoder, probe, grid).shape[1]
        intervals = [interval for interval in INTERVALS if interval < frames]
        distance: Metric = RandomFeatureDistance()
        if self.extractor is not None:
            distance = FrechetVideoDistance(self.extractor, self.protocol)
        metrics: dict[str, Metric] = {
            "distance": distance,
            "interval_psnr": IntervalPSNR(intervals),
            "interval_psnr_from_first": IntervalPSNR(intervals, pairs="from_first"),
            "position_loss_data": PositionLoss.of(module),
            "position_loss_generated": PositionLoss.of(module),
        }
        if self.flow:
            metrics["interval_flow"] = IntervalOpticalFlow(intervals)
            metrics["interval_flow_from_first"] = IntervalOpticalFlow(intervals, pairs="from_first")
            metrics["motion_groups"] = MotionGroups(distance)
        if self.clip is not None:
            metrics["clip_score"] = CLIPScore(self.clip)
        return metrics

    def _keep_settings(self, module: VideoModel) -> None:
        """Writes what the ids in ``output/ids`` depend on, or compares it with what is there."""
        settings = {"model": fingerprint(module), "first_blocks": self.first_blocks, **self.options}
        path = self.output / "ids" / "settings.json"
        if path.is_file():
            stored = json.loads(path.read_text())
            if differing := {key for key in settings if stored.get(key) != settings[key]}:
                raise ValueError(
                    f"{path.parent} holds ids of another evaluation: {', '.join(sorted(differing))} differ; choose "
                    "another output, or delete that folder"
                )
            return
        if module.trainer.is_global_zero:
            with named_disk_errors(path, _REMEDY), whole_file(path) as part:
                part.write_text(json.dumps(settings, indent=2))

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generates as many videos as the batch has clips, and adds both to the scores."""
        assert isinstance(pl_module, VideoModel)
        assert self._decoder is not None
        clips = _clips(trainer)
        tokens = batch["tokens"].flatten(1)
        # Lightning deals clips out in turns, and fills the last turn up with clips from the beginning.
        places = [trainer.global_rank + trainer.world_size * (self._done + row) for row in range(len(tokens))]
        self._done += len(tokens)
        count = len(clips) if self.n is None else min(self.n, len(clips))
        rows = [row for row, place in enumerate(places) if place < count]
        if not rows:
            return
        places = [places[row] for row in rows]
        tokens, labels = tokens[rows], batch["label"][rows] if pl_module.network.num_classes else None
        ids = self._generate(pl_module, tokens, labels, places)
        for name, values in (("position_loss_data", tokens), ("position_loss_generated", ids)):
            logits = pl_module(values, labels)
            self._metrics[name].update(logits, values[:, -logits.shape[1] :])
        real = self._real(clips, places, tokens, pl_module.network.grid)
        made = decode_videos(self._decoder, ids, pl_module.network.grid)
        for kind, videos in ((True, real), (False, made)):
            frames = videos.permute(0, 4, 1, 2, 3).contiguous()  # (B, 3, T, H, W)
            for name, metric in self._metrics.items():
                if not name.startswith(("position", "clip")):
                    metric.update(frames, real=kind)
        if "clip_score" in self._metrics:
            self._metrics["clip_score"].update(made.permute(0, 4, 1, 2, 3), self._captions(clips, places))

    def _generate(self, module: VideoModel, tokens: Tensor, labels: Tensor | None, places: list[int]) -> Tensor:
        paths = [self.output / "ids" / f"{place:08d}.npy" for place in places]
        missing = [row for row, path in enumerate(paths) if not path.is_file()]
        if missing:
            per_block = module.network.num_tokens // module.network.grid[0]
            given = tokens[missing, : self.first_blocks * per_block] if self.first_blocks else None
            fresh = generate(
                module,
                len(missing),
                condition=None if labels is None else labels[missing],
                first_tokens=given,
                indices=[places[row] for row in missing],
                batch_size=len(missing),
                **self.options,
            )
            for row, ids in zip(missing, fresh.cpu().numpy(), strict=True):
                with named_disk_errors(paths[row], _REMEDY), whole_file(paths[row]) as part, open(part, "wb") as file:
                    np.save(file, ids)
        return torch.from_numpy(np.stack([np.load(path) for path in paths])).to(tokens.device)

    def _real(self, clips: Any, places: list[int], tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        assert self._decoder is not None
        if self.videos is None:
            return decode_videos(self._decoder, tokens, grid)
        shards, numbers = _origin(clips, places)
        how = dict(shards.manifest.video)
        read = []
        for number in numbers:
            source = shards.source(number)
            if source is None:
                raise ValueError("videos must be None: these shards do not say which file their clips come from")
            path = Path(self.videos, source.path)
            if not path.is_file() and not is_frame_folder(path):
                raise ValueError(f"videos must hold {source.path}, which the shards name; got {self.videos!r}")
            read.append(
                read_clip(
                    path,
                    start=source.start,
                    frames=how["frames"],
                    stride=how["stride"],
                    size=tuple(how["size"]),
                    resize=how["resize"],
                )
            )
        return torch.from_numpy(np.stack(read)).to(tokens.device)

    def _captions(self, clips: Any, places: list[int]) -> list[str]:
        shards, numbers = _origin(clips, places)
        captions = [shards.caption(number) for number in numbers]
        if None in captions:
            raise ValueError("clip must be None: these shards have clips without a caption")
        return [str(caption) for caption in captions]

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Joins the processes' sums, logs the numbers and writes the report."""
        records = {name: metric.record() for name, metric in self._metrics.items()}  # type: ignore[operator]
        generation = {"first_blocks": self.first_blocks, **self.options}
        setting = {
            "real clips": f"files in {self.videos}" if self.videos else "reconstructions by the tokenizer",
            "tokenizer": self.tokenizer,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else "",
            "generation": generation,
        }
        numbers = {
            f"test/{'fvd' if self.extractor else 'random_feature_distance'}": records["distance"]["value"],
            "test/loss_on_generated": records["position_loss_generated"]["value"]["mean"],
        }
        if "clip_score" in records:
            numbers["test/clip_score"] = records["clip_score"]["value"]["score"]
        pl_module.log_dict(numbers)
        self._write(records, setting)

    @rank_zero_only
    def _write(self, records: dict[str, Any], setting: dict[str, Any]) -> None:
        write_report(self.output, records, setting, self._metrics)


def _clips(trainer: pl.Trainer) -> Any:
    loaders: Any = trainer.test_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    return loader.dataset


def _origin(clips: Any, places: list[int]) -> tuple[TokenShards, list[int]]:
    """The shards behind a data set of clips, and the clips' numbers in them."""
    if isinstance(clips, TokenShards):
        return clips, places
    if isinstance(getattr(clips, "dataset", None), TokenShards):
        return clips.dataset, [clips.indices[place] for place in places]
    raise ValueError(f"videos and clip need the test clips to be of token shards, got {type(clips).__name__}")
