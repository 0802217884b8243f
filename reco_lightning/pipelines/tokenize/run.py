# SPDX-License-Identifier: Apache-2.0
"""`reco tokenize`: encodes a data set of videos into token shards."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from reco_lightning.callbacks.stop_on_signal import StopOnSignal
from reco_lightning.data.clips.folder import Clip, VideoFolder
from reco_lightning.data.index.captions import read_captions
from reco_lightning.data.index.layouts import Layout
from reco_lightning.data.tokens.manifest import MANIFEST, Manifest, check_grid, file_sha256
from reco_lightning.data.tokens.writer import ClipSource, TokenShardWriter, refuse_shards
from reco_lightning.data.video.clip import OnDamage, Resize, VideoError, fit_size, open_source
from reco_lightning.pipelines.tokenize.encoding import (
    ClipsToEncode,
    EncodeModule,
    PartsCallback,
    as_it_was,
    usual_workers,
)
from reco_lightning.pipelines.tokenize.partial_output import PartialTokens
from reco_lightning.support.argument_checks import check_flag, check_int, check_path
from reco_lightning.support.devices import pick_device
from reco_lightning.support.fingerprint import fingerprint
from reco_lightning.tokenizers.base import ClipShape, VideoTokenizer
from reco_lightning.tokenizers.loading import load_tokenizer

__all__ = ["tokenize_folder"]

_UNFINISHED = ".unfinished"  # below the output
_COPIED = 1024  # clips at a time, from the unfinished files to the shards


def tokenize_folder(
    *,
    tokenizer: str | VideoTokenizer,
    videos: str,
    output: str,
    frames: int | None = None,
    stride: int | None = None,
    size: int | tuple[int, int] | None = None,
    resize: Resize = "short_side_crop",
    clip_step: int | None = None,
    on_damage: OnDamage = "skip",
    captions: str | None = None,
    batch_size: int = 8,
    num_workers: int | None = None,
    device: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    shard_size: int = 8192,
    overwrite: bool = False,
    progress: bool = True,
    layout: Layout = "folders",
    split: str | None = None,
    index: str | None = None,
) -> Path:
    """Tokenises all videos below a folder, or a data set in another layout.

    Files that cannot be used are left out and named. The shards remember classes, captions, files and frames of the
    clips, and which tokenizer made them. What is encoded is kept in `output` until the shards are there: a run that
    was interrupted, in whatever way, goes on where it stopped when it is started again with the same arguments, and
    ends with the same shards. Devices, workers, clips per shard and `captions` may change in between.

    Args:
        tokenizer: Checkpoint or folder of any tokenizer of the package, whose content tells which; or a
            `VideoTokenizer`.
        videos: Folder of videos; see `VideoFolder`. Some layouts take a zip file of frames.
        output: Folder to write the token shards to.
        frames: Frames per clip, T; what the tokenizer takes, as 1 + a multiple of 4. None is what it was trained on,
            and 17 where its checkpoint does not tell.
        stride: Distance between two frames of a clip, in frames of the file; None likewise, or 1.
        size: Side, or (height, width), of the clips in pixels; None likewise, or 128.
        resize: `short_side_crop` or `squash`.
        clip_step: Distance between the starts of two clips of a file; by default they lie end to end.
        on_damage: `skip` leaves videos out that are damaged anywhere; `keep` takes the clips in front of and behind the
            damage.
        captions: File of JSON lines `{"file": "cats/a.mp4", "caption": "A cat."}`, files relative to `videos`;
            none where `index` has captions.
        batch_size: Clips that are encoded at a time, on each device.
        num_workers: Worker processes for each device that read videos; 0 reads in the encoding process. None is one
            for each core, at most 8, where the platform forks processes, and 0 elsewhere.
        device: A torch device, or `auto`.
        devices: How many of them, each with a process of its own; -1 takes all GPUs. On a CPU, processes.
        strategy: Lightning's, for more than one device: `auto`, `ddp`, `ddp_spawn` and so on.
        shard_size: Clips per shard.
        overwrite: Replace token shards that lie in `output`, and what is left there of a tokenisation with other
            arguments.
        progress: Show a progress bar and a summary.
        layout: How the data set lies in `videos`: `folders` of videos by class; `frames`, a folder of pictures for
            each video; a `list` of paths; a `manifest` of JSON lines; or that of `ffs`, `sky`, `taichi`, `ucf101` or
            `msrvtt`.
        split: Part of the data set, as `train`; without it all.
        index: The list, the manifest, UCF101's list or MSR-VTT's annotations.

    Returns:
        The folder of token shards.

    Raises:
        ValueError: An argument is out of range, the tokenizer cannot encode such clips, `videos` has another layout,
            or `output` holds shards, or an unfinished tokenisation with other arguments.
        VideoError: No file can be used.
    """
    check_path(videos=videos, output=output)
    check_path(captions=captions, index=index, or_none=True)
    check_int(devices=devices)
    check_int(at_least=1, batch_size=batch_size, shard_size=shard_size)
    check_int(at_least=1, or_none=True, frames=frames, stride=stride, clip_step=clip_step)
    check_int(at_least=0, or_none=True, num_workers=num_workers)
    check_flag(overwrite=overwrite, progress=progress)
    if not isinstance(strategy, Strategy) and strategy not in (known := ["auto", *StrategyRegistry]):
        raise ValueError(f"strategy must be one of Lightning's, {', '.join(known)}, got {strategy!r}")
    fit_size(1, 1, size=1 if size is None else size, resize=resize)  # checks both
    placement = _placement(pick_device(device), devices)
    kept = Path(output, _UNFINISHED)
    first = getattr(rank_zero_only, "rank", 0) == 0  # the other processes use what the first one begins
    if first and not overwrite and not (kept.is_dir() and not Path(output, MANIFEST).exists()):
        refuse_shards(output)  # before the videos are scanned, which can take long
    model, name = _open_tokenizer(tokenizer)
    clips, said = _clip_shape(model, frames, size, stride)
    if first and progress:
        sys.stdout.write(said + "\n")
    frames, (height, width), stride = clips
    grid = check_grid(model.grid(frames, height, width), frame_aligned=model.frame_aligned)
    weights = fingerprint(model)
    folder = VideoFolder(
        videos,
        frames=frames,
        stride=stride,
        size=clips.size,
        resize=resize,
        clip_step=clip_step,
        on_damage=on_damage,
        layout=layout,
        split=split,
        index=index,
    )
    work = PartialTokens(kept, grid=grid, vocab_size=model.codebook_size, clips=len(folder))
    reading = {"frames": frames, "stride": stride, "size": [height, width], "resize": resize}
    # nothing for plain folders, so that their shards are those of versions that knew no others
    chosen = {key: value for key, value in (("layout", layout), ("split", split)) if value not in ("folders", None)}
    header = {
        "vocab_size": model.codebook_size,
        "grid": grid,
        "frame_aligned": model.frame_aligned,
        "tokenizer": name,
        "tokenizer_sha256": weights,
        "classes": folder.classes,
        "video": {**reading, **chosen},
        "shard_size": shard_size,
    }
    publisher = _Publisher(Path(output), folder, work, header, _captions(captions, folder), overwrite, progress)
    plan = {
        **({"tokenizer_sha256": weights} if weights else {"tokenizer": name}),  # a checkpoint may be renamed
        **reading,
        **chosen,
        **({"index_sha256": file_sha256(index)} if index else {}),
        "clip_step": folder.clip_step,
        **{key: header[key] for key in ("vocab_size", "grid", "frame_aligned")},
        "videos": {_relative(path, folder): _state_of(path, folder) for path in folder.infos},
    }
    if first:
        work.begin(plan, anew=overwrite)
    trainer = L.Trainer(
        **placement,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # ClipsToEncode deals out the batches
        callbacks=[
            PartsCallback(work, [clip.path for clip in folder.clips], publisher.publish, progress=progress),
            StopOnSignal(),
        ],
    )
    workers = usual_workers(trainer.num_devices) if num_workers is None else num_workers
    with as_it_was(model):
        parts = ClipsToEncode(folder, work, plan=plan, batch_size=batch_size, num_workers=workers)
        trainer.predict(EncodeModule(model), datamodule=parts, return_predictions=False)
    return Path(output)


@dataclass(frozen=True)
class _Publisher:
    """Turns what is encoded into shards; may be sent to another process."""

    output: Path
    folder: VideoFolder
    work: PartialTokens
    header: Mapping[str, Any]
    captions: Mapping[str, str] | None
    overwrite: bool
    progress: bool

    def publish(self) -> None:
        """Writes the shards in the order of the clips, removes the unfinished files, and says what was done."""
        if not self.overwrite and (self.output / MANIFEST).exists():
            refuse_shards(self.output)  # another run was quicker
        encoded, failed = self.work.read(), self.work.failures()
        numbers, missing = np.flatnonzero(encoded.done), np.flatnonzero(~encoded.done).tolist()
        if forgotten := [number for number in missing if number not in failed]:
            raise RuntimeError(
                f"{len(forgotten)} clips were neither encoded nor given up, clip {forgotten[0]} for one; "
                f"{self.work.folder} keeps the others: start the same tokenisation again"
            )
        if not len(numbers):
            raise VideoError(self.folder.root, "none of its videos can be read any more; is the disk still there?")
        # overwrite: shards without a manifest are of a run that was killed here
        workspace = self.work.folder / "shards"
        with TokenShardWriter(self.output, overwrite=True, workspace=workspace, **self.header) as writer:
            for start in range(0, len(numbers), _COPIED):
                part = numbers[start : start + _COPIED]
                clips = [self.folder.clips[number] for number in part.tolist()]
                sources = [_source(clip, self.folder) for clip in clips]
                texts = [clip.caption for clip in clips]
                if self.captions:
                    texts = [self.captions.get(source.path) for source in sources]
                writer.write(encoded.ids(part), np.array([clip.label for clip in clips]), sources, texts)
        del encoded  # its files are mapped
        self.work.remove()
        if self.progress:
            summary = [
                *_written(writer.manifest, self.output),
                *self._left_out({number: failed[number] for number in missing}),
                *self._without_caption(writer.manifest),
            ]
            sys.stdout.write("\n".join(summary) + "\n")

    def _left_out(self, lost: Mapping[int, str]) -> list[str]:
        lines = []
        if self.folder.skipped:
            lines += [f"Left out {len(self.folder.skipped)} video(s):"]
            lines += [f"  {_relative(path, self.folder)}: {reason}" for path, reason in self.folder.skipped]
        if lost:
            lines += [f"Left out {len(lost)} clip(s) of videos that could be scanned but not read again:"]
            counts = Counter((self.folder.clips[number].path, reason) for number, reason in lost.items())
            lines += [
                f"  {_relative(path, self.folder)}, {count} clip(s): {reason}"
                for (path, reason), count in counts.items()
            ]
        return lines

    def _without_caption(self, manifest: Manifest) -> list[str]:
        known = {_relative(clip.path, self.folder) for clip in self.folder.clips if clip.caption is not None}
        known.update(self.captions or ())
        missing = [source for source in manifest.sources if source not in known]
        wanted = bool(known) or self.captions is not None
        return [f"{len(missing)} video(s) have no caption, {missing[0]} for one."] if wanted and missing else []


def _placement(device: torch.device, devices: int) -> dict[str, Any]:
    if devices < 1 and devices != -1:
        raise ValueError(f"devices must be at least 1, or -1 for all GPUs, got {devices}")
    if device.index is None or device.type == "cpu":
        return {"accelerator": device.type, "devices": devices}
    if devices != 1:
        raise ValueError(f"devices must be 1 for device={str(device)!r}, which is one alone, got {devices}")
    return {"accelerator": device.type, "devices": [device.index]}


def _open_tokenizer(tokenizer: str | VideoTokenizer) -> tuple[VideoTokenizer, str]:
    if isinstance(tokenizer, str):
        loaded = load_tokenizer(tokenizer)
        return loaded, f"{type(loaded).__name__} {Path(tokenizer).name}"
    if not isinstance(tokenizer, VideoTokenizer):
        raise ValueError(
            f"tokenizer must be a checkpoint or have the members of VideoTokenizer, got a {type(tokenizer).__name__}"
        )
    return tokenizer, type(tokenizer).__name__


def _clip_shape(
    model: VideoTokenizer, frames: int | None, size: int | tuple[int, int] | None, stride: int | None
) -> tuple[ClipShape, str]:
    """The clips to cut, and what to say of them."""
    trained: ClipShape | None = getattr(model, "trained_on", None)
    usual = trained or ClipShape(17, (128, 128))
    sides = (size, size) if isinstance(size, int) else size
    shape = ClipShape(frames or usual.frames, (sides[0], sides[1]) if sides else usual.size, stride or usual.stride)
    if trained is None:
        return shape, f"Clips: {shape}; the tokenizer does not tell what it was trained on."
    if shape == trained:
        return shape, f"Clips: {shape}, as the tokenizer was trained on."
    return shape, f"Clips: {shape}; the tokenizer was trained on {trained}."


def _captions(path: str | None, folder: VideoFolder) -> dict[str, str] | None:
    if path is None:
        return None
    if any(clip.caption is not None for clip in folder.clips):
        raise ValueError(f"captions must be left out where the index of videos has captions, got {path!r}")
    files = [*folder.infos, *(file for file, _ in folder.skipped)]
    return read_captions(path, files=[_relative(file, folder) for file in files])


def _relative(path: str, folder: VideoFolder) -> str:
    return os.path.relpath(path, folder.root)


def _state_of(path: str, folder: VideoFolder) -> str:
    try:
        size, _ = open_source(path).stamp()
    except FileNotFoundError:
        size = 0
    return f"{size} bytes, {folder.infos[path].frames} frames"


def _source(clip: Clip, folder: VideoFolder) -> ClipSource:
    stop = clip.start + (folder.frames - 1) * folder.stride + 1
    return ClipSource(_relative(clip.path, folder), clip.start, stop, folder.stride)


def _written(manifest: Manifest, output: Path) -> list[str]:
    tokens = " x ".join(map(str, manifest.grid))
    return [
        f"Wrote {manifest.clips} clips of {tokens} tokens (ids below {manifest.vocab_size}) from "
        f"{len(manifest.sources)} videos in {len(manifest.classes)} class(es) to {output}."
    ]
