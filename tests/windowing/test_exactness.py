# SPDX-License-Identifier: Apache-2.0
"""The promise: values equal the plain forward's, gradients equal attention written out with the context cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.windowing.engines.base import Head
from reco_lightning.windowing.engines.frozen import FrozenEngine
from reco_lightning.windowing.losses.continuity import continuity_loss
from reco_lightning.windowing.rows import RowLayout
from reco_lightning.windowing.sampler import Window, WindowSampler
from tests.helpers import reference

N = 5 * 8
SAMPLER = WindowSampler(5, 8)
WINDOWS = (*SAMPLER.windows, *WindowSampler(5, 8, stride_blocks=0.25).windows[1:4], Window(0, N))
PREFIXES = ("class", "start", "none")


def make(prefix: str, dtype: torch.dtype = torch.float32) -> tuple[VideoTransformer, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(1)
    network = VideoTransformer(
        vocab_size=24,
        grid=(5, 2, 4),
        dim=32,
        depth=3,
        heads=2,
        num_classes=3 if prefix == "class" else 0,
        start_token=prefix != "none",
    ).to(dtype)
    for parameter in network.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # attention far from uniform, so that mistakes show
    return network, torch.randint(24, (4, N)), torch.tensor([0, 1, 2, 3]) if prefix == "class" else None


def rows_of(network: VideoTransformer, window: Window) -> tuple[int, int, int]:
    shift = network.prefix - 1
    return (0 if window.start == 0 else window.start + shift), max(window.start + shift, 0), window.stop + shift


def expected_gradients(
    network: VideoTransformer,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    window: Window,
    *,
    context: str,
    weight: float = 0.0,
    attached: int = 0,
) -> dict[str, torch.Tensor]:
    first, start, stop = rows_of(network, window)
    if attached:
        first = 0 if window.start <= attached else first - attached
    network.zero_grad()
    logits, hidden = reference.forward(network, tokens[:, :-1], labels, first=first, context=context)
    shift = network.prefix - 1
    loss = F.cross_entropy(logits[:, start:stop].flatten(0, 1), tokens[:, start - shift : stop - shift].flatten())
    (loss + weight * continuity_loss(hidden[:, start:stop])).backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def engine_gradients(
    network: VideoTransformer,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    windows: list[Window],
    *,
    context: str,
    weight: float = 0.0,
    attached: int = 0,
) -> dict[str, torch.Tensor]:
    engine = FrozenEngine(network.blocks, [Head(network.head)], RowLayout(N), trains_keys=context == "keys")
    network.zero_grad()
    engine.install()
    try:
        engine.activate(windows, attached=N if context == "attached" else attached)
        logits = network(tokens[:, :-1], labels)
        output = engine.output
        shift = network.prefix - 1
        parts, targets, continuity = [], [], 0.0
        for group, hidden in zip(output.groups, output.hidden, strict=True):
            span = slice(group.loss_start, group.stop)
            parts.append(logits[group.samples, span].flatten(0, 1))
            targets.append(tokens[group.samples, group.loss_start - shift : group.stop - shift].flatten())
            continuity = continuity + continuity_loss(hidden) * len(hidden) / len(tokens)
        (F.cross_entropy(torch.cat(parts), torch.cat(targets)) + weight * continuity).backward()
    finally:
        engine.remove()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def assert_equal_gradients(own: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-8)
        assert (own[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("prefix", PREFIXES)
def test_reference_is_the_network(prefix):
    network, tokens, labels = make(prefix, torch.float64)
    torch.testing.assert_close(
        reference.forward(network, tokens, labels)[0], network(tokens, labels), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("context", ["frozen", "keys", "attached"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_equal_the_plain_forward_on_every_window_and_nan_elsewhere(prefix, context):
    network, tokens, labels = make(prefix)
    plain = network(tokens[:, :-1], labels)
    engine = FrozenEngine(network.blocks, [Head(network.head)], RowLayout(N), trains_keys=context == "keys")
    engine.install()
    for window in WINDOWS:
        engine.activate([window], attached=N if context == "attached" else 0)
        logits = network(tokens[:, :-1], labels)
        _, start, stop = rows_of(network, window)
        torch.testing.assert_close(logits[:, start:stop], plain[:, start:stop], atol=1e-5, rtol=1e-5)
        if len(window) < N:
            assert logits[:, :start].isnan().all()
            assert logits[:, stop:].isnan().all()
    engine.remove()
    assert torch.equal(network(tokens[:, :-1], labels), plain)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("context", ["frozen", "keys", "attached"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_gradients_equal_attention_written_out(prefix, context, window):
    network, tokens, labels = make(prefix, torch.float64)
    expected = expected_gradients(network, tokens, labels, window, context=context, weight=0.3)
    own = engine_gradients(network, tokens, labels, [window], context=context, weight=0.3)
    # Double precision up to the rotary tables' and continuity's float32: what is left is rounding, not method.
    assert_equal_gradients(own, expected, 1e-5)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("attached", [8, 12, 24])
@pytest.mark.parametrize("context", ["frozen", "keys"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_attached_rows_in_front_of_the_window_are_trained_through(prefix, context, attached, window):
    network, tokens, labels = make(prefix, torch.float64)
    options = {"context": context, "weight": 0.3, "attached": attached}
    expected = expected_gradients(network, tokens, labels, window, **options)
    assert_equal_gradients(engine_gradients(network, tokens, labels, [window], **options), expected, 1e-5)


@pytest.mark.parametrize("context", ["frozen", "keys"])
def test_the_contexts_differ_so_the_comparison_can_fail(context):
    network, tokens, labels = make("start", torch.float64)
    expected = expected_gradients(network, tokens, labels, SAMPLER.windows[-1], context="attached")
    own = engine_gradients(network, tokens, labels, [SAMPLER.windows[-1]], context=context)
    with pytest.raises(AssertionError):
        assert_equal_gradients(own, expected, 1e-2)


@pytest.mark.parametrize("context", ["frozen", "keys", "attached"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_groups_give_the_weighted_mean_of_their_gradients(prefix, context):
    network, tokens, labels = make(prefix, torch.float64)
    windows = [SAMPLER.windows[0], SAMPLER.windows[2], SAMPLER.windows[3]]
    own = engine_gradients(network, tokens, labels, windows, context=context)
    samples = [slice(0, 2), slice(2, 3), slice(3, 4)]  # 4 samples in 3 groups
    total: dict[str, torch.Tensor] = {}
    counts = []
    for window, part in zip(windows, samples, strict=True):
        _, start, stop = rows_of(network, window)
        counts.append((part.stop - part.start) * (stop - start))
        part_labels = None if labels is None else labels[part]
        for name, gradient in expected_gradients(network, tokens[part], part_labels, window, context=context).items():
            total[name] = total.get(name, 0) + counts[-1] * gradient
    assert_equal_gradients(own, {name: value / sum(counts) for name, value in total.items()}, 1e-5)


def test_no_gradient_reaches_anything_through_the_context():
    network, tokens, _ = make("start", torch.float64)
    window = SAMPLER.windows[2]
    states = {}
    hook = network.dropout.register_forward_hook(lambda _m, _i, output: states.update(x=output) or output.retain_grad())
    engine_gradients(network, tokens, None, [window], context="frozen", weight=0.3)
    hook.remove()
    first, _, stop = rows_of(network, window)
    gradient = states["x"].grad
    assert gradient[:, :first].abs().max() == 0
    assert gradient[:, stop:].abs().max() == 0
    assert gradient[:, first:stop].abs().amax(-1).min() > 0


def test_the_prefix_is_trained_by_the_first_window_alone():
    network, tokens, labels = make("class")
    first = engine_gradients(network, tokens, labels, [SAMPLER.windows[0]], context="frozen")
    later = engine_gradients(network, tokens, labels, [SAMPLER.windows[1]], context="frozen")
    assert first["condition.weight"].abs().max() > 0
    assert later["condition.weight"].abs().max() == 0


def test_bf16_autocast_trains_every_weight_that_fp32_trains():
    network, tokens, _ = make("start")
    window = SAMPLER.windows[2]
    expected = engine_gradients(network, tokens, None, [window], context="frozen")
    for context in ("frozen", "keys"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = engine_gradients(network, tokens, None, [window], context=context)
        for name, gradient in expected.items():
            assert own[name].abs().max() >= 0.3 * gradient.abs().max(), name
            if context == "frozen" and gradient.any():
                cosine = F.cosine_similarity(own[name].flatten(), gradient.flatten(), dim=0)
                assert cosine > 0.97, name
