# SPDX-License-Identifier: Apache-2.0
"""Writes the demo's results: JSON, Markdown, figures and `index.html`."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from reco_lightning.experiments.demo.evaluation import Row
from reco_lightning.support.plots import loss_curves, position_cross_entropy

__all__ = ["Curve", "Table", "findings", "markdown_table", "tables", "write_report"]

#: Head and rows.
Table = tuple[list[str], list[list[str]]]
#: (step, operations so far, validation loss).
Curve = Sequence[tuple[int, float, float]]
_SAME = 0.005  # nats: less is called the same


def tables(rows: Sequence[Row]) -> tuple[Table, Table]:
    """Returns the heads and cells of the two tables: cost, and cross-entropy by frame block.

    Args:
        rows: The trained models, the plain one first.
    """
    plain = rows[0]
    cost_head = ["training", "steps", "time per step", "operations per step", "saved for backward", "whole training"]
    cost_head += ["validation cross-entropy"]
    cost = [
        [
            row.name,
            f"{row.steps}",
            f"{1000 * row.step_seconds:.0f} ms ({row.step_seconds / plain.step_seconds:.0%})",
            f"{row.operations / 1e9:.2f} GFLOP ({row.operations / plain.operations:.0%})",
            f"{row.saved_bytes / 2**20:.1f} MiB ({row.saved_bytes / plain.saved_bytes:.0%})",
            f"{row.train_seconds:.0f} s, {row.steps * row.operations / 1e12:.2f} TFLOP",
            f"{row.cross_entropy:.3f}",
        ]
        for row in rows
    ]
    blocks_head = ["training", *(f"block {block}" for block in range(plain.blocks)), "all"]
    blocks = [[row.name, *(f"{value:.3f}" for value in row.by_block), f"{row.cross_entropy:.3f}"] for row in rows]
    return (cost_head, cost), (blocks_head, blocks)


def markdown_table(table: Table) -> str:
    """Returns a table in Markdown, first column to the left, numbers to the right.

    Example:
        >>> print(markdown_table((["training", "steps"], [["plain", "400"]])))
        | training | steps |
        |:---|---:|
        | plain | 400 |
    """
    head, cells = table
    rule = "|:---" + "|---:" * (len(head) - 1) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in cells)])


def findings(rows: Sequence[Row]) -> list[str]:
    """Says in sentences what the numbers show, and no more than that.

    Args:
        rows: The trained models: plain, ReCo after the same steps, ReCo after the same operations.
    """
    plain, same, longer = rows
    return [
        f"A ReCo step takes {same.operations / plain.operations:.0%} of the operations of a plain one, keeps "
        f"{same.saved_bytes / plain.saved_bytes:.0%} of the bytes for the backward pass and takes "
        f"{same.step_seconds / plain.step_seconds:.0%} of its time on this machine.",
        f"After the same {plain.steps} steps the validation cross-entropy is {plain.cross_entropy:.3f} (plain) and "
        f"{same.cross_entropy:.3f} (ReCo) nats per token: {_compare(same, plain)}. ReCo has then computed less than "
        "the plain training: fewer tokens per step feed its loss.",
        f"After about the same operations, which ReCo reaches with {longer.steps} steps, it is "
        f"{plain.cross_entropy:.3f} (plain) and {longer.cross_entropy:.3f} (ReCo): {_compare(longer, plain)}. ReCo has "
        "then seen more batches than the plain training.",
        "This is one seed, a small model and a few minutes on few clips: it shows that everything works and what a "
        "step costs. Differences in cross-entropy of this experiment say nothing about long trainings.",
    ]


def write_report(folder: Path, *, rows: Sequence[Row], curves: Mapping[str, Curve], about: Mapping[str, Any]) -> Path:
    """Writes all files of the report.

    Args:
        folder: The output folder; the videos are there already.
        rows: The trained models: plain, ReCo after the same steps, ReCo after the same operations.
        curves: (step, operations so far, validation loss) of `plain` and of `reco`.
        about: Settings, clips, hardware and times.

    Returns:
        `index.html`.
    """
    cost, blocks = tables(rows)
    said = findings(rows)
    results = {
        "rows": [asdict(row) | {"cross_entropy": row.cross_entropy, "by_block": row.by_block} for row in rows],
        "curves": {name: [list(point) for point in curve] for name, curve in curves.items()},
        "findings": said,
        **about,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(
        "\n\n".join(
            [
                markdown_table(cost),
                "Validation cross-entropy by frame block, in nats per token:",
                markdown_table(blocks),
                *said,
                _setting(about),
            ]
        )
        + "\n",
        encoding="utf-8",
    )
    figures = _figures(folder / "figures", rows, curves, about)
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        findings="\n".join(f"<li>{html.escape(text)}</li>" for text in said),
        cost=_html_table(cost),
        blocks=_html_table(blocks),
        loss_steps=figures["loss-by-step"],
        loss_operations=figures["loss-by-operations"],
        positions=figures["cross-entropy-by-position"],
        samples=about["settings"]["samples"],
        continued=_videos(
            [("held-out", "held-out clips, through the tokenizer")]
            + [(f"continued-{row.key.replace('_', '-')}", f"{row.name} ({row.steps} steps)") for row in rows]
        ),
        free=_videos([(f"free-{row.key.replace('_', '-')}", f"{row.name} ({row.steps} steps)") for row in rows]),
        setting=html.escape(_setting(about)),
        engine=html.escape(about["engine"]),
        times=_html_table((["stage", "seconds"], [[name, f"{s:.0f}"] for name, s in about["stage_seconds"].items()])),
        details=html.escape(json.dumps(about["settings"] | {"seed": about["seed"]}, indent=1)),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _compare(row: Row, plain: Row) -> str:
    difference = row.cross_entropy - plain.cross_entropy
    if abs(difference) < _SAME:
        return f"the same to {_SAME} nats"
    return f"ReCo is {abs(difference):.3f} nats {'lower' if difference < 0 else 'higher'}"


def _setting(about: Mapping[str, Any]) -> str:
    machine, settings = about["hardware"], about["settings"]
    names = ", ".join(video["name"] for video in about["videos"][:6])
    more = f" and {len(about['videos']) - 6} more" if len(about["videos"]) > 6 else ""
    grid = " x ".join(map(str, about["grid"]))
    side, memory = settings["size"], about["peak_memory_bytes"]
    return " ".join(
        [
            f"Clips of {settings['frames']} frames of {side} x {side} pixels from {names}{more}:",
            f"{about['training_clips']} for training, {about['held_out_clips']} held out from the last part of each",
            "video. Clips overlap; each video is cut to several squares, also mirrored, all split at the same time.",
            f"The tokenizer makes {grid} tokens of {settings['codebook_size']} codes of a clip and reaches",
            f"{about['tokenizer_psnr_db']:.1f} dB on held-out clips. Model: {settings['depth']} blocks of width",
            f"{settings['dim']}, {about['model_parameters'] / 1e6:.2f} million parameters, batches of",
            f"{settings['batch_size']} clips. Both trainings start from the same weights and see the same batches in",
            f"the same order. Guessing evenly would give {about['chance_cross_entropy']:.3f} nats.",
            f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, accelerator:",
            f"{machine['accelerator']}, torch {machine['torch']}. In all {about['total_seconds'] / 60:.1f} minutes"
            + (f", peak memory {memory / 2**30:.1f} GiB." if memory else "."),
        ]
    )


def _figures(
    folder: Path, rows: Sequence[Row], curves: Mapping[str, Curve], about: Mapping[str, Any]
) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    names = {"plain": "plain", "reco": "ReCo"}
    _, height, width = about["grid"]
    made = {
        "loss-by-step": loss_curves({names[key]: [(step, loss) for step, _, loss in c] for key, c in curves.items()}),
        "loss-by-operations": loss_curves(
            {names[key]: [(operations / 1e12, loss) for _, operations, loss in c] for key, c in curves.items()},
            x_label="operations of the training so far (TFLOP)",
        ),
        "cross-entropy-by-position": position_cross_entropy({row.name: row.positions for row in rows}, height * width),
    }
    images = {}
    for name, (fig, _) in made.items():
        if name.startswith("loss"):
            fig.set_size_inches(5.6, 3.8)  # the page shows the two side by side
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
        fig.savefig(folder / f"{name}.png", dpi=144)
        encoded = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        images[name] = f"data:image/svg+xml;base64,{encoded}"
    return images


def _html_table(table: Table) -> str:
    head, cells = table
    rows = [
        "<tr>" + f'<th scope="row">{html.escape(row[0])}</th>' + "".join(f"<td>{html.escape(c)}</td>" for c in row[1:])
        for row in cells
    ]
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(f"{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _videos(items: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f'<figure><video src="videos/{name}.mp4" autoplay loop muted playsinline controls></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, caption in items
    )
