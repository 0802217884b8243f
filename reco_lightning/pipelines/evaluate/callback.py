# SPDX-License-Identifier: Apache-2.0
"""`EvaluateVideos`: generates videos and scores them against a data set in the test loop.

Heavy extractors and the tokenizer live here and not in the model: a checkpoint never holds them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.metrics.clip_score import CLIPScore
from reco_lightning.metrics.frechet import FrechetVideoDistance, RandomFeatureDistance
from reco_lightning.metrics.interval import INTERVALS, IntervalPSNR
from reco_lightning.metrics.motion_groups import MotionGroups
from reco_lightning.metrics.optical_flow import IntervalOpticalFlow
from reco_lightning.metrics.position_loss import PositionLoss
from reco_lightning.metrics.protocols import fvd_protocol
from reco_lightning.models.sampling.decoding import decode_videos
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions
from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.models.text_video.lightning_module import TextVideoModel
from reco_lightning.models.video_model import VideoModel
from reco_lightning.pipelines.evaluate.real_clips import RealClips, clips_of_test
from reco_lightning.pipelines.evaluate.report import write_report
from reco_lightning.support.argument_checks import check_flag, check_int, check_path
from reco_lightning.support.atomic_write import atomic_write
from reco_lightning.support.disk_errors import named_disk_errors
from reco_lightning.support.fingerprint import fingerprint
from reco_lightning.tokenizers.base import VideoTokenizer
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["EvaluateVideos"]

_REMEDY = "ids generated before are kept: free space, and give the same command again"


class EvaluateVideos(pl.Callback):
    """Generates a video for every test clip, with its label or caption, and compares the two sets.

    Real clips are read from the video files where ``videos`` names their folder, and are the tokenizer's
    reconstructions otherwise; the report says which. Cross-entropy by position is measured on the data, on what was
    generated, and with ``first_blocks`` true frame blocks in front. A video depends on the seed and its clip's number
    alone: any number of processes gives the same scores. Ids that were generated are kept in ``output/ids``: an
    interrupted evaluation goes on with them.

    Args:
        tokenizer: Checkpoint or folder of the tokenizer that made the shards.
        output: Folder of the report: ``evaluation.json``, ``evaluation.md`` and figures.
        n: At most so many clips; ``None`` is all.
        videos: Folder of the video files that the shards were made from; needed with ``length``.
        extractor: File of an Inception-I3D, as in ``fvd_extractor`` (``reco convert-i3d`` writes one), for the Fréchet
            video distance; without it the distance is one of random features, and named so.
        protocol: ``styleganv``, ``tats``, ``omnitokenizer`` or ``larp``; read where ``extractor`` is given.
        clip: Folder of a CLIP model of transformers, for shards with captions; ``None`` measures no CLIP score.
        flow: Whether to measure optical flow and the distance by groups of motion, which needs OpenCV.
        first_blocks: True frame blocks that every generated video continues, 0 or more. For a `TextVideoModel` it and
            ``length``, ``window_blocks`` and ``context_blocks`` stay as they are.
        sampling: The fields of `VideoSamplingOptions` by name. With a ``length``, real clips are read over as many
            frames from their start on; those whose video ends earlier are left out, and the next ones taken. The
            Fréchet video distance is then of all frames, whatever number the protocol has.

    Raises:
        ValueError: If an argument is out of its range, or there is a ``length`` without ``videos``.

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
        **sampling: Any,
    ) -> None:
        check_path(tokenizer=tokenizer, output=output)
        check_path(videos=videos, extractor=extractor, clip=clip, or_none=True)
        check_int(at_least=2, or_none=True, n=n)
        check_int(at_least=0, first_blocks=first_blocks)
        check_flag(flow=flow)
        fvd_protocol(protocol)
        self.options = asdict(VideoSamplingOptions(**sampling))
        self.blocks = {name: self.options.pop(name) for name in ("length", "window_blocks", "context_blocks")}
        if (length := self.blocks["length"]) is not None and videos is None:
            raise ValueError(
                f"videos must be the folder of the video files where length is given, got None with length={length}: "
                "the shards' clips have one length alone"
            )
        self.tokenizer = tokenizer
        self.output = Path(output)
        self.n = n
        self.videos = videos
        self.extractor, self.protocol = extractor, protocol
        self.clip = clip
        self.flow = flow
        self.first_blocks = first_blocks
        self._decoder: VideoTokenizer | None = None
        self._real: RealClips
        self._metrics: dict[str, Metric] = {}
        self._places: Container[int] = ()
        self._frames = self._left_out = self._done = 0

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the tokenizer and the extractors, and refuses ids of another evaluation."""
        if not isinstance(pl_module, (VideoModel, TextVideoModel)):
            raise MisconfigurationException(
                f"EvaluateVideos scores a VideoModel or a TextVideoModel, got {type(pl_module).__name__}"
            )
        if trainer.world_size > 1 and pl_module.device_mesh is not None:
            raise MisconfigurationException(
                "EvaluateVideos needs a whole model on every device, as each process generates videos of its own, got "
                f"one in shards; choose --trainer.strategy ddp in place of {type(trainer.strategy).__name__}"
            )
        self._refuse_blocks(pl_module)
        self._decoder = load_tokenizer(self.tokenizer, vocab_size=pl_module.network.vocab_size)
        if isinstance(self._decoder, nn.Module):
            self._decoder.to(pl_module.device)
        self._frames = self._count_frames(pl_module)
        clips, length = clips_of_test(trainer), self.blocks["length"]
        self._real = RealClips(clips, self.videos, frames=None if length is None else self._frames)
        count = len(clips) if self.n is None else min(self.n, len(clips))
        self._done, self._left_out, self._places = 0, 0, range(count)
        if length is not None:
            chosen, self._left_out = self._real.long_enough(count, trainer)
            self._places = set(chosen)
        self._metrics = {name: metric.to(pl_module.device) for name, metric in self._build(pl_module).items()}
        self._keep_settings(pl_module)

    def _refuse_blocks(self, module: VideoModel | TextVideoModel) -> None:
        grid, text = module.network.grid, isinstance(module, TextVideoModel)
        given = {name: value for name, value in self.blocks.items() if value is not None}
        if text and self.first_blocks:
            given["first_blocks"] = self.first_blocks
        if given and (text or len(grid) != 3):
            raise ValueError(
                f"{' and '.join(given)} must be left out for a {type(module if text else module.network).__name__}, "
                f"which generates whole videos of one length alone, got {', '.join(map(str, given.values()))}"
            )
        most = min(grid[0], (self.blocks["length"] or grid[0]) - 1)
        if self.first_blocks > most:
            raise ValueError(
                f"first_blocks must be 0 to {most}, what is given and leaves a rest, got {self.first_blocks}"
            )

    def _count_frames(self, module: VideoModel | TextVideoModel) -> int:
        assert self._decoder is not None
        grid, length = module.network.grid, self.blocks["length"]
        count = module.network.num_tokens if length is None else length * math.prod(grid[1:])
        probe = torch.zeros(1, count, dtype=torch.int64, device=module.device)
        return decode_videos(self._decoder, probe, grid, context_blocks=self.blocks["context_blocks"]).shape[1]

    def _build(self, module: VideoModel | TextVideoModel) -> dict[str, Metric]:
        intervals = [interval for interval in INTERVALS if interval < self._frames]
        distance: Metric = RandomFeatureDistance()
        if self.extractor is not None:
            protocol = fvd_protocol(self.protocol)
            if self.blocks["length"] is not None:
                protocol = replace(protocol, name=f"{protocol.name}, whole videos", frames=self._frames, place="first")
            distance = FrechetVideoDistance(self.extractor, protocol)
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
            metrics["clip_score"] = CLIPScore(self.clip, frames=self._frames)
        return metrics

    def _keep_settings(self, module: VideoModel | TextVideoModel) -> None:
        """Writes what the ids in ``output/ids`` depend on, or compares it with what is there."""
        settings = {"model": fingerprint(module), "first_blocks": self.first_blocks, **self.options, **self.blocks}
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
            with named_disk_errors(path, _REMEDY), atomic_write(path) as part:
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
        assert isinstance(pl_module, (VideoModel, TextVideoModel))
        assert self._decoder is not None
        tokens = batch["tokens"].flatten(1)
        # Lightning deals clips out in turns, and fills the last turn up with clips from the beginning.
        places = [trainer.global_rank + trainer.world_size * (self._done + row) for row in range(len(tokens))]
        self._done += len(tokens)
        rows = [row for row, place in enumerate(places) if place in self._places]
        if not rows:
            return
        places, tokens = [places[row] for row in rows], tokens[rows]
        known = "caption" if isinstance(pl_module, TextVideoModel) else "label" if pl_module.network.num_classes else ""
        condition = batch[known][rows] if known else None
        ids = self._generate(pl_module, tokens, condition, places)
        self._metrics["position_loss_data"].update(*_predict(pl_module, tokens, condition))
        self._metrics["position_loss_generated"].update(*_predict(pl_module, ids, condition))
        grid = pl_module.network.grid
        made = decode_videos(self._decoder, ids, grid, context_blocks=self.blocks["context_blocks"])
        real = decode_videos(self._decoder, tokens, grid) if self.videos is None else self._real.read(places).to(made)
        distance = self._metrics["distance"]
        for kind, videos in ((True, real), (False, made)):
            frames = videos.permute(0, 4, 1, 2, 3).contiguous()  # (B, 3, T, H, W)
            measured = distance.protocol.cut(frames) if isinstance(distance, FrechetVideoDistance) else frames
            for name, metric in self._metrics.items():
                if not name.startswith(("position", "clip")):
                    metric.update(measured if name in ("distance", "motion_groups") else frames, real=kind)
        if "clip_score" in self._metrics:
            self._metrics["clip_score"].update(made.permute(0, 4, 1, 2, 3), self._real.captions(places))

    def _generate(
        self, module: VideoModel | TextVideoModel, tokens: Tensor, condition: Tensor | None, places: list[int]
    ) -> Tensor:
        paths = [self.output / "ids" / f"{place:08d}.npy" for place in places]
        missing = [row for row, path in enumerate(paths) if not path.is_file()]
        if missing:
            asked = None if condition is None else condition[missing]
            options = {"indices": [places[row] for row in missing], "batch_size": len(missing), **self.options}
            if isinstance(module, TextVideoModel):
                assert asked is not None
                fresh = generate_from_text(module, asked, **options)
            else:
                per_block = module.network.num_tokens // module.network.grid[0]
                given = tokens[missing, : self.first_blocks * per_block] if self.first_blocks else None
                fresh = generate(module, len(missing), condition=asked, first_tokens=given, **options, **self.blocks)
            for row, ids in zip(missing, fresh.cpu().numpy(), strict=True):
                with named_disk_errors(paths[row], _REMEDY), atomic_write(paths[row]) as part, open(part, "wb") as file:
                    np.save(file, ids)
        return torch.from_numpy(np.stack([np.load(path) for path in paths])).to(tokens.device)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Joins the processes' sums, logs the numbers and writes the report."""
        records = {name: metric.record() for name, metric in self._metrics.items()}  # type: ignore[operator]
        assert isinstance(pl_module, (VideoModel, TextVideoModel))
        blocks = {} if isinstance(pl_module, TextVideoModel) else {"first_blocks": self.first_blocks, **self.blocks}
        grid = pl_module.network.grid
        setting = {
            "real clips": f"files in {self.videos}" if self.videos else "reconstructions by the tokenizer",
            "tokenizer": self.tokenizer,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else "",
            "generation": {**self.options, **blocks},
            "length": self.blocks["length"] or (grid[0] if len(grid) == 3 else None),
            "frames": self._frames,
        }
        if self.blocks["length"] is not None:
            setting["clips left out"] = self._left_out
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


def _predict(module: VideoModel | TextVideoModel, ids: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and targets at the N places that the network knows, of videos of any length; -100 where one has no id."""
    total = module.network.num_tokens
    values = F.pad(ids[:, :total], (0, max(0, total - ids.shape[1])))
    if isinstance(module, TextVideoModel):
        logits, targets = module(condition, values), values + module.network.text_ids
    else:
        logits, targets = module(values, condition), values.clone()
    targets[:, ids.shape[1] :] = -100
    return logits, targets[:, -logits.shape[1] :]
