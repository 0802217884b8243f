# SPDX-License-Identifier: Apache-2.0
"""`LARPTransformer` against vectors of the published code and its formulas; trained in windows, and sampled from."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, VideoModel, WindowSampler, continuity_loss, generate
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.writer import TokenShardWriter
from reco_lightning.models.larp.config import arguments_from_json
from reco_lightning.models.larp.network import Guided, LARPTransformer
from reco_lightning.tokenizers import LARPTokenizer
from reco_lightning.tokenizers.base import to_unit_range
from reco_lightning.windowing.sampler import Window
from tests.helpers.foreign import trainer

DATA = Path(__file__).parents[2] / "data" / "larp_ar"
TOKENIZER = DATA.parent / "larp"
V, N, C, DIM, HEADS = 16, 12, 6, 32, 4
SMALL = {
    "dim": DIM,
    "n_layer": 2,
    "n_head": HEADS,
    "multiple_of": 8,
    "vocab_size": V,
    "max_seq_len": N,
    "num_classes": 3,
}
LAYOUTS = {
    "class": {},
    "frame prediction": {"frame_prediction": True, "cls_token_num": C + 1},
    "fewer heads of keys": {"n_kv_head": 2},
    "wider": {"ffn_dim_multiplier": 1.3},
    "fixed positions": {"use_fixed_pe": True},
    "another epsilon": {"norm_eps": 1e-2},
}


@pytest.fixture(scope="module")
def released():
    return LARPTransformer.from_pretrained(DATA).eval()


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "vectors.safetensors")


def build(layout="class", **options):
    """A network with random weights, its head too, and no dropout."""
    quiet = {f"{name}_dropout_p": 0.0 for name in ("token", "resid", "ffn")}
    torch.manual_seed(0)
    network = LARPTransformer(**arguments_from_json(SMALL | LAYOUTS[layout] | quiet | options))
    for name, value in network.named_parameters():
        value.data = torch.randn_like(value) * (1.0 if "emb" in name or value.ndim == 3 else 0.3) + float(
            value.ndim == 1
        )
    return network


def tokens_of(network, batch=3):
    return torch.randint(V, (batch, network.num_tokens), generator=torch.Generator().manual_seed(1))


def reference(network, tokens, labels=None):
    """Logits of the rows that predict the clip, in float64, by the formulas; tokens are all but the last one."""
    weights, options = {k: v.double() for k, v in network.state_dict().items()}, network.config
    read = {"abs_pe", "tok_embeddings.weight"}

    def weight(name):
        read.add(f"{name}.weight")
        return weights[f"{name}.weight"]

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + options["norm_eps"]).sqrt() * weight(name)

    condition = network.condition_tokens
    if condition:
        separator = torch.full((len(tokens), 1), V)
        x = weights["tok_embeddings.weight"][torch.cat([tokens[:, :condition], separator, tokens[:, condition:]], 1)]
    else:
        rows = [3 if label is None or label < 0 else label for label in (labels or [None] * len(tokens))]
        start = weight("cls_embedding.embedding_table")[torch.tensor(rows)]
        x = torch.cat([start[:, None], weights["tok_embeddings.weight"][tokens]], 1)
    x = x + weights["abs_pe"][:, : x.shape[1]]
    size, kv = DIM // HEADS, options["kv_heads"]
    hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    for index in range(options["depth"]):
        layer = f"layers.{index}"
        qkv = norm(x, f"{layer}.attention_norm") @ weight(f"{layer}.attention.wqkv").T
        q, k, v = qkv[..., :DIM], qkv[..., DIM : DIM + kv * size], qkv[..., DIM + kv * size :]
        heads = []
        for head in range(HEADS):
            own, shared = slice(head * size, (head + 1) * size), head * kv // HEADS
            other = slice(shared * size, (shared + 1) * size)
            scores = (q[..., own] @ k[..., other].mT / size**0.5).masked_fill(hidden, float("-inf"))
            heads.append(scores.softmax(-1) @ v[..., other])
        x = x + torch.cat(heads, -1) @ weight(f"{layer}.attention.wo").T
        y = norm(x, f"{layer}.ffn_norm")
        gate = y @ weight(f"{layer}.feed_forward.w1").T
        inner = gate / (1 + (-gate).exp()) * (y @ weight(f"{layer}.feed_forward.w3").T)
        x = x + inner @ weight(f"{layer}.feed_forward.w2").T
    logits = norm(x, "norm") @ weight("output").T
    assert read == weights.keys()
    return logits[:, condition:]


def test_logits_and_loss_are_those_of_the_published_code(released, vectors):
    logits = released(vectors["tokens"][:, :-1], vectors["cond"])  # one label is -1, which is "no class"
    torch.testing.assert_close(logits[:, vectors["logit_rows"]], vectors["logits"], atol=2e-5, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), vectors["tokens"].flatten())
    torch.testing.assert_close(loss, vectors["loss"][0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_sequences_are_those_of_the_published_code(released, vectors, cache):
    options = {"condition": vectors["greedy_cond"], "temperature": 0, "cache": cache}
    assert torch.equal(generate(released, 2, **options), vectors["greedy_cfg1.0"])
    assert torch.equal(generate(Guided(released, 1.25), 2, **options), vectors["greedy_cfg1.25"])
    assert not torch.equal(vectors["greedy_cfg1.0"], vectors["greedy_cfg1.25"])


@pytest.mark.parametrize(
    ("condition", "vocab", "rows", "count"), [(0, 8192, 1024, 631_975_680), (1024, 8193, 2048, 633_157_120)]
)
def test_the_release_has_these_weights(condition, vocab, rows, count):
    """Names and shapes of `hywang66/LARP-L-long-AR` and `LARP-L-long-AR-FP`, written out."""
    d, h = 1280, 3584
    layer = {
        "attention.wqkv": (3 * d, d),
        "attention.wo": (d, d),
        "feed_forward.w1": (h, d),
        "feed_forward.w3": (h, d),
        "feed_forward.w2": (d, h),
        "attention_norm": (d,),
        "ffn_norm": (d,),
    }
    expected = {
        "abs_pe": (1, rows, d),
        "tok_embeddings.weight": (vocab, d),
        "norm.weight": (d,),
        "output.weight": (8192, d),
        **{f"layers.{index}.{name}.weight": shape for index in range(30) for name, shape in layer.items()},
    }
    if not condition:
        expected["cls_embedding.embedding_table.weight"] = (102, d)
    stored = {"dim": 1280, "n_layer": 30, "n_head": 20, "cls_token_num": 1 + condition}
    with torch.device("meta"):
        network = LARPTransformer(**arguments_from_json(stored | {"frame_prediction": bool(condition)}))
        defaults = LARPTransformer(condition_tokens=condition, num_classes=0 if condition else 101)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected
    assert defaults.config == network.config
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_its_formulas(layout, tmp_path):
    fresh = build(layout)
    save_file(fresh.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL | LAYOUTS[layout]))
    network = LARPTransformer.from_pretrained(tmp_path).eval()
    tokens = tokens_of(network)
    labels = None if network.condition_tokens else [2, -1, 0]
    logits = network(tokens[:, :-1], labels and torch.tensor(labels))
    assert logits.shape == (3, N, V)
    torch.testing.assert_close(logits.double(), reference(network, tokens[:, :-1], labels), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_sampling_is_that_without_a_cache(layout):
    network = build(layout)
    first = tokens_of(network)[:, : network.condition_tokens] if network.condition_tokens else None
    condition = None if network.condition_tokens else torch.tensor([0, 2, 1])
    drawn = [
        generate(network, 3, condition=condition, first_tokens=first, seed=4, batch_size=2, cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (3, network.num_tokens)
    if first is not None:
        assert torch.equal(drawn[0][:, :C], first)
    greedy = generate(network, 3, condition=condition, first_tokens=first, temperature=0)
    labels = None if condition is None else condition.tolist()
    assert torch.equal(reference(network, greedy[:, :-1], labels).argmax(-1), greedy[:, network.condition_tokens :])


def test_sampling_goes_on_from_ids_of_the_clip():
    network = build("frame prediction")
    whole = generate(network, 2, first_tokens=tokens_of(network, 2)[:, :C], temperature=0)
    for cache in (True, False):
        again = generate(network, 2, first_tokens=whole[:, : C + 5], temperature=0, cache=cache)
        assert torch.equal(again, whole)


def test_guidance_is_away_from_no_class():
    network = build()
    tokens, labels = tokens_of(network)[:, :-1], torch.tensor([0, 1, 2])
    given, free = network(tokens, labels), network(tokens)
    torch.testing.assert_close(Guided(network, 1.25)(tokens, labels), free + 1.25 * (given - free))
    torch.testing.assert_close(Guided(network, 1.0)(tokens, labels), given)
    assert (given - free).abs().max() > 0.1
    drawn = generate(Guided(network, 3.0), 2, condition=1, seed=2)
    assert torch.equal(drawn, generate(Guided(network, 3.0), 2, condition=1, seed=2, cache=False))
    with pytest.raises(ValueError, match="network must have classes to be guided by"):
        Guided(build("frame prediction"), 1.25)


def test_fresh_weights():
    network = LARPTransformer(**arguments_from_json(SMALL | {"dim": 64}))
    assert not network.output.weight.any()
    assert network.abs_pe.std().item() == pytest.approx(0.02, rel=0.2)
    assert network.training
    fixed = LARPTransformer(**arguments_from_json(SMALL | {"use_fixed_pe": True}))
    assert "abs_pe" not in dict(fixed.named_parameters())
    torch.testing.assert_close(fixed.abs_pe[0, 1, [0, 16]], torch.tensor([0.841471, 0.540302]))  # sine and cosine of 1


@pytest.mark.slow
def test_bfloat16_and_compile():
    torch._dynamo.reset()
    network = build().eval()
    tokens, labels = tokens_of(network)[:, :-1], torch.tensor([0, 1, -1])
    plain = network(tokens, labels)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, labels), plain, atol=2e-5, rtol=1e-4)
    half = copy.deepcopy(network).bfloat16()(tokens, labels)
    assert half.dtype == torch.bfloat16
    assert (half - plain).abs().mean() < 0.1 * plain.abs().mean()


# Training in windows over equal ranges of ids.


class Plain(pl.LightningModule):
    """A module of a user's own, with the network in it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        tokens = batch["tokens"]
        logits = self.network(tokens[:, :-1], batch["label"] if self.network.num_classes else None)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, -N:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(network, count=1):
    tokens = tokens_of(network, 4 * count)
    return DataLoader([{"tokens": ids, "label": index % 3} for index, ids in enumerate(tokens)], batch_size=4)


def gradients(network, batch, window: Window, weight, monkeypatch):
    """Of a window's loss, with attention written out; keys and values of the rows before it are cut."""
    shift = network.condition_tokens
    first, start, stop = (window.start + shift if window.start else 0), window.start + shift, window.stop + shift

    def attention(q, k, v, *args, **kwargs):
        rows = torch.arange(q.shape[2])
        frozen = (rows[:, None] >= first) & (rows[None] < first)
        scores = torch.where(frozen, q @ k.detach().mT, q @ k.mT) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(rows[:, None] < rows[None], float("-inf")).softmax(-1)
        return (weights * frozen) @ v.detach() + (weights * ~frozen) @ v

    states = {}
    hook = network.output.register_forward_pre_hook(lambda _, inputs: states.update(h=inputs[0]))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        tokens = batch["tokens"]
        logits = network(tokens[:, :-1], batch["label"] if network.num_classes else None)
    hook.remove()
    own, targets = logits[:, window.start : window.stop], tokens[:, -N:][:, window.start : window.stop]
    loss = F.cross_entropy(own.flatten(0, 1), targets.flatten())
    (loss + weight * continuity_loss(states["h"][:, start:stop])).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("layout", ["class", "frame prediction"])
def test_a_windowed_step_moves_the_weights_by_the_reference_gradient(layout, start, monkeypatch):
    network = build(layout)
    before, data = copy.deepcopy(network), batches(network)
    samplers = (WindowSampler(frame_blocks=4, tokens_per_block=N // 4, seed=seed) for seed in range(100))
    sampler = next(sampler for sampler in samplers if sampler.sample(0).start == start)
    callback = ReCoCallback(sampler, continuity_weight=0.5)
    trainer(callback).fit(Plain(network), data)
    assert callback.state_dict()["choice"]["engine"] == "frozen"
    expected = gradients(before, next(iter(data)), sampler.sample(0), 0.5, monkeypatch)
    for name, parameter in network.named_parameters():
        moved = (before.get_parameter(name) - parameter) / 0.1
        torch.testing.assert_close(
            moved, expected[name], atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["class", "frame prediction"])
def test_video_model_trains_it_in_windows_and_its_ids_are_sampled(layout, dropout, tmp_path):
    network = build(layout, resid_dropout_p=dropout, ffn_dropout_p=dropout, token_dropout_p=dropout)
    network.reset_parameters()  # with a head of zeros, as a training begins
    model = VideoModel(network, learning_rate=1e-2)
    callback = ReCoCallback(WindowSampler(frame_blocks=4, tokens_per_block=N // 4))
    run = trainer(callback, max_epochs=5, default_root_dir=tmp_path)
    run.fit(model, batches(network, 2))
    assert run.global_step == 10
    assert callback.state_dict()["choice"]["engine"] == "frozen"
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert network.output.weight.any()
    path = tmp_path / "larp.ckpt"
    run.save_checkpoint(path)
    loaded = VideoModel.load_from_checkpoint(path)
    assert isinstance(loaded.network, LARPTransformer)
    first = tokens_of(network, 2)[:, :C] if network.condition_tokens else None
    ids = generate(model, 2, first_tokens=first, seed=1)
    assert ids.shape == (2, network.num_tokens)
    assert 0 <= ids.min() <= ids.max() < V
    assert torch.equal(generate(loaded, 2, first_tokens=first, seed=1), ids)


@pytest.mark.slow
def test_ids_of_a_clip_are_learned(tmp_path):
    """Windows that are drawn in turn teach the whole row of ids."""
    network = build()
    network.reset_parameters()
    data = DataLoader([{"tokens": tokens_of(network)[0], "label": 1}] * 4, batch_size=4)
    model = VideoModel(network, learning_rate=1e-2, label_dropout=0.0)
    trainer(ReCoCallback(WindowSampler(4, N // 4)), max_epochs=120, default_root_dir=tmp_path).fit(model, data)
    assert torch.equal(generate(network, 1, condition=1, temperature=0)[0], tokens_of(network)[0])


@pytest.mark.parametrize("predicts_frames", [False, True])
def test_from_clips_to_shards_to_clips(predicts_frames, tmp_path):
    """The tokenizer's ids, stored, train the network, and what is sampled is decoded."""
    tokenizer = LARPTokenizer.from_pretrained(TOKENIZER)
    video = to_unit_range(load_file(TOKENIZER / "video_16x32.safetensors")["input_uint8_bthwc"])
    ids, condition = tokenizer.encode(video), tokenizer.encode_first_frames(video)
    samples = torch.cat([condition, ids], dim=1) if predicts_frames else ids
    with TokenShardWriter(tmp_path, vocab_size=256, grid=(samples.shape[1],), frame_aligned=False) as writer:
        writer.write(samples.repeat(4, 1), torch.tensor([0, 1] * 4))
    windows = ReCoCallback(WindowSampler(frame_blocks=4, tokens_per_block=12))
    if predicts_frames:
        sizes = {"dim": 32, "depth": 2, "heads": 2}
        network = LARPTransformer(vocab_size=256, video_tokens=48, condition_tokens=48, num_classes=0, **sizes)
        trainer(windows).fit(VideoModel(network), datamodule=TokenDataModule(tmp_path, batch_size=4, val_fraction=0.5))
        sampled = generate(network, 2, first_tokens=condition)[:, 48:]
    else:
        network = LARPTransformer.from_pretrained(DATA)
        trainer(windows).fit(VideoModel(network), datamodule=TokenDataModule(tmp_path, batch_size=4, val_fraction=0.5))
        sampled = generate(Guided(network, 1.25), 2, condition=1)
    assert windows.state_dict()["choice"]["engine"] == "frozen"
    assert tokenizer.decode(sampled).shape == video.shape


# Refusals.


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    weights = load_file(DATA / "model.safetensors")
    del weights["norm.weight"]
    weights["freqs_cis"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((DATA / "config.json").read_text())
    with pytest.raises(ValueError, match=r"Missing: norm.weight. Unknown: freqs_cis. Download"):
        LARPTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bottleneck": {}}))
    with pytest.raises(ValueError, match=r"got a LARP tokenizer in .*LARPTokenizer.from_pretrained"):
        LARPTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surprise": 1}, "must hold the options of LARP's video model alone, got surprise too"),
        ({"model_type": "t2i"}, "model_type must be 'class_cond', got 't2i'"),
        ({"drop_path_rate": 0.1}, "drop_path_rate must be 0, got 0.1"),
        ({"cls_token_num": 3}, "cls_token_num must be 1, or with frame_prediction .*, got 3"),
        ({"frame_prediction": True}, "cls_token_num must be 1, or with frame_prediction .*, got 1"),
    ],
)
def test_options_that_no_layout_has(options, message):
    with pytest.raises(ValueError, match=message):
        arguments_from_json(SMALL | options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be a whole number of 1 or more, got 0"),
        ({"heads": 3}, "dim must be a multiple of heads, got 8 and 3"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"condition_tokens": 4, "num_classes": 3}, "must not both be above 0 .*, got 4 and 3"),
        ({"token_dropout": 1.0}, r"token_dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_arguments_that_make_no_network(arguments, message):
    with pytest.raises(ValueError, match=message):
        LARPTransformer(**{"dim": 8, "heads": 4, "depth": 1, "vocab_size": 8, "video_tokens": 4} | arguments)


def test_calls_that_do_not_fit():
    network, predictor = build(), build("frame prediction")
    ids = torch.zeros(1, N + C, dtype=torch.long)
    with pytest.raises(ValueError, match=f"tokens reach row {N + 1}, but the network has {N}; the last id is not fed"):
        network(ids[:, :N])
    with pytest.raises(ValueError, match="start must be 0 without a cache, got 3"):
        network(ids[:, :1], start=3)
    with pytest.raises(ValueError, match="labels were given to a network for frame prediction"):
        predictor(ids[:, :-1], torch.tensor([0]))
    with pytest.raises(ValueError, match="tokens must begin with the 6 ids of the condition in one call, got 5 from"):
        predictor(ids[:, :5])
    with pytest.raises(ValueError, match="ids of the condition in one call, got 1 from start=5"):
        predictor(ids[:, :1], cache=predictor.new_cache(1), start=5)
