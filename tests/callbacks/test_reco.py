# SPDX-License-Identifier: Apache-2.0
"""``ReCoCallback`` on modules that know nothing of it, inside real fits."""

from __future__ import annotations

import copy
import csv
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning import ReCoCallback, WindowSampler, continuity_loss, explain
from tests.helpers import foreign
from tests.helpers.foreign import MODULES, PER_BLOCK, TOKENS, VOCAB, batches, trainer


def sampler(**options):
    return WindowSampler(foreign.BLOCKS, PER_BLOCK, **options)


def build(cls, **options):
    torch.manual_seed(3)
    return cls(**options)


def reference_gradients(module, ids, window, weight):
    """Cross-entropy and continuity of a window with attention written out; the context's keys and values cut."""
    prefix = module.prefix
    shift = prefix - 1
    first, start, stop = (
        (0 if window.start == 0 else window.start + shift),
        max(window.start + shift, 0),
        window.stop + shift,
    )
    module.net.set_cut(first)
    states = {}
    hook = module.net.lm_head.register_forward_pre_hook(lambda _m, inputs: states.update(h=inputs[0]))
    prompt = module.prompt.expand(len(ids), -1, -1) if prefix else None
    logits = module.net(ids[:, :-1], prefix=prompt)
    hook.remove()
    smoothing = 0.1 if isinstance(module, foreign.FullInput) else 0.0
    targets = ids[:, start - shift : stop - shift].flatten()
    loss = F.cross_entropy(logits[:, start:stop].flatten(0, 1), targets, label_smoothing=smoothing)
    loss = loss + weight * continuity_loss(states["h"][:, start:stop])
    names = [name for name, p in module.named_parameters() if p.requires_grad and not name.startswith("other")]
    parameters = [module.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    module.net.set_cut(None)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients, strict=True)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_one_step_moves_the_weights_by_the_reference_gradient(cls, seed):
    module = build(cls)
    windows = sampler(seed=seed)
    before = copy.deepcopy(module)
    data = batches(count=1)
    trainer(ReCoCallback(windows, continuity_weight=0.5)).fit(module, data)
    ids = next(iter(data))[0]
    expected = reference_gradients(before, ids, windows.sample(0), 0.5)
    for name, gradient in expected.items():
        moved = (before.get_parameter(name) - module.get_parameter(name)) / 0.1
        torch.testing.assert_close(moved, gradient, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def whole(**options):
    return ReCoCallback(sampler(window_blocks=foreign.BLOCKS), continuity_weight=0.0, **options)


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_a_whole_window_without_continuity_is_plain_training_bitwise(cls):
    plain, windowed = build(cls), build(cls)
    trainer().fit(plain, batches())
    trainer(whole(chunked_loss=False)).fit(windowed, batches())
    for (name, a), b in zip(plain.named_parameters(), windowed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_dropout_draws_are_those_of_the_plain_run():
    plain, windowed = build(foreign.ShiftedInput, dropout=0.3), build(foreign.ShiftedInput, dropout=0.3)
    torch.manual_seed(5)
    trainer().fit(plain, batches())
    torch.manual_seed(5)
    trainer(whole(chunked_loss=False)).fit(windowed, batches())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), windowed.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"sequential": True}, {"zero_head": True}, {"dropout": 0.2}], ids=str)
@pytest.mark.parametrize("context", ["frozen", "keys", "attached", "dropped"])
def test_trains_other_forms_of_network(options, context):
    module = build(foreign.ShiftedInput, **options)
    before = copy.deepcopy(module.state_dict())
    trainer(ReCoCallback(sampler(), context=context, windows_per_batch=2), max_epochs=2).fit(module, batches())
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert not torch.equal(before["net.h.0.attention.q.weight"], module.state_dict()["net.h.0.attention.q.weight"])


def test_transformer_encoder_layers_train():
    module = build(foreign.EncoderLayers)
    callback = ReCoCallback(sampler(first_window_prob=None, seed=1))
    trainer(callback, max_epochs=2).fit(module, batches())
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_dropped_trains_the_window_as_a_sequence_of_its_own():
    module = build(foreign.ShiftedInput)
    windows = sampler(seed=1, first_window_prob=None)
    window = windows.sample(0)
    assert window.start > 0
    before = copy.deepcopy(module)
    data = batches(count=1)
    trainer(ReCoCallback(windows, continuity_weight=0.0, context="dropped")).fit(module, data)
    ids = next(iter(data))[0][:, window.start : window.stop]
    logits = before.net(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, a), b in zip(before.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(
            (a - b) / 0.1, a.grad, atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_logs_once_per_step_what_it_optimised(cls, tmp_path):
    module = build(cls)
    windows = sampler()
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer(ReCoCallback(windows), logger=logger, log_every_n_steps=1).fit(module, batches())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["reco/window_start"]]
    assert [float(row["reco/window_start"]) for row in rows] == [windows.sample(step).start for step in range(3)]
    assert all(0 < float(row["reco/cross_entropy"]) < 10 and float(row["reco/continuity"]) > 0 for row in rows)


def test_validation_is_plain():
    class Validated(foreign.ShiftedInput):
        def validation_step(self, batch, batch_idx):
            ids = batch[0]
            logits = self.net(ids[:, :-1])
            assert logits.isfinite().all()
            self.log("val", F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    module = build(Validated)
    run = trainer(ReCoCallback(sampler()), num_sanity_val_steps=1)
    run.fit(module, batches(), batches(seed=1))
    inside = float(run.callback_metrics["val"])
    after = trainer().validate(module, batches(seed=1), verbose=False)[0]["val"]
    assert inside == after


def patched(module):
    return [name for name, part in module.named_modules() if {"forward", "training_step"} & set(vars(part))]


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise KeyError("stop")


class During(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.patched = patched(pl_module)
        self.keys = list(pl_module.state_dict())
        self.copied = patched(copy.deepcopy(pl_module))
        ids = torch.zeros(1, TOKENS - 1, dtype=torch.long)
        with torch.no_grad():
            self.same = torch.equal(copy.deepcopy(pl_module.net)(ids), pl_module.net(ids))
            self.unpickled = torch.equal(pickle.loads(pickle.dumps(pl_module.net))(ids), pl_module.net(ids))
        self.flags = [parameter.requires_grad for parameter in pl_module.parameters()]


def test_installed_during_the_fit_and_gone_after_it():
    module = build(foreign.ShiftedInput)
    keys, flags = list(module.state_dict()), [parameter.requires_grad for parameter in module.parameters()]
    during = During()
    trainer(ReCoCallback(sampler()), during).fit(module, batches())
    assert set(during.patched) == {"", "net.h.0", "net.h.1", "net.h.2", "net.lm_head"}
    assert during.keys == keys
    assert during.flags == flags
    assert during.same
    assert during.unpickled
    assert patched(module) == []


def test_gone_after_an_exception_and_a_second_fit_works():
    module = build(foreign.ShiftedInput)
    callback = ReCoCallback(sampler())
    with pytest.raises(KeyError, match="stop"):
        trainer(callback, Stop()).fit(module, batches())
    assert patched(module) == []
    trainer(callback).fit(module, batches())
    assert patched(module) == []
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def refused(module, match, **options):
    before = copy.deepcopy(module.state_dict())
    windows = options.pop("sampler", sampler())
    with pytest.raises((MisconfigurationException, RuntimeError), match=match):
        trainer(ReCoCallback(windows, **options)).fit(module, batches())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert patched(module) == []


class NoCrossEntropy(foreign.ShiftedInput):
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


class BothWays(foreign.SelfAttention):
    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None])[:, 0])


class NotCausal(foreign.ShiftedInput):
    def __init__(self):
        super().__init__()
        for layer in self.net.h:
            layer.attention = BothWays()


class HandWritten(foreign.ShiftedInput):
    def __init__(self):
        super().__init__()
        self.net.set_cut(0)


class Shuffled(foreign.ShiftedInput):
    def training_step(self, batch, batch_idx):
        ids = batch[0]
        order = torch.arange(TOKENS - 1).flip(0)
        return F.cross_entropy(self.net(ids[:, :-1])[:, order].flatten(0, 1), ids[:, 1:][:, order].flatten())


class NoBlocks(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB))

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        return F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("cls", "match", "options"),
    [
        (NoCrossEntropy, "no call of torch.nn.functional.cross_entropy", {}),
        (NotCausal, "is not causal: scaled_dot_product_attention is called with", {}),
        (
            HandWritten,
            "attend without torch.nn.functional.scaled_dot_product_attention",
            {"engine": "frozen"},
        ),
        (Shuffled, "not in one order", {}),
        (NoBlocks, "no stack of blocks was found", {}),
        (foreign.ShiftedInput, "the loss covers 29 tokens of a sample", {"sampler": WindowSampler(5, 5)}),
        (foreign.ShiftedInput, "has room for 30 video tokens", {"sampler": WindowSampler(5, 9)}),
        (foreign.ShiftedInput, "these exist: \\['net.h'\\]", {"blocks": "layers"}),
        (foreign.ShiftedInput, "no module turns the states", {"head": "nothing"}),
        (
            foreign.ShiftedInput,
            "engine='frozen' cannot serve context='dropped'",
            {"engine": "frozen", "context": "dropped"},
        ),
        (foreign.ShiftedInput, "behind prefix_tokens=2", {"prefix_tokens": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refuses_before_any_weight_changes(cls, match, options):
    refused(build(cls), match, **options)


def test_refuses_two_callbacks_and_a_dataloader_iter():
    with pytest.raises(MisconfigurationException, match="two ReCoCallbacks"):
        trainer(ReCoCallback(sampler()), ReCoCallbackTwin(sampler())).fit(build(foreign.ShiftedInput), batches())

    class Iterating(foreign.ShiftedInput):
        def training_step(self, dataloader_iter):
            return None

    told = pytest.warns(UserWarning, match="dataloader_iter")  # Lightning's own
    with told, pytest.raises(MisconfigurationException, match="fetches its batches itself"):
        trainer(ReCoCallback(sampler())).fit(build(Iterating), batches())


class ReCoCallbackTwin(ReCoCallback):
    """Lightning itself refuses two of one class."""


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"continuity_weight": -1}, "continuity_weight must be a finite number of 0 or more, got -1"),
        ({"continuity_norm": "max"}, "continuity_norm must be one of 'mean', 'sum', got 'max'"),
        ({"context": "thawed"}, "context must be one of .* got 'thawed'"),
        ({"engine": "fast"}, "engine must be one of 'auto', 'frozen', 'cache', 'prefix', 'masked', got 'fast'"),
        ({"windows_per_batch": 0}, "windows_per_batch must be a whole number of 1 or more, got 0"),
        ({"prefix_tokens": -1}, "prefix_tokens must be a whole number of 0 or more or None"),
    ],
)
def test_refuses_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        ReCoCallback(sampler(), **options)


def test_refuses_a_sampler_of_another_kind_and_windows_too_short_for_continuity():
    with pytest.raises(ValueError, match="sampler must be a WindowSampler, got int"):
        ReCoCallback(5)
    with pytest.raises(ValueError, match="windows of 3 tokens or more, got 2"):
        ReCoCallback(WindowSampler(5, 1))


def test_says_that_a_stride_leaves_tokens_untrained():
    with pytest.warns(UserWarning, match="never reaches the last 6 tokens"):
        trainer(ReCoCallback(sampler(stride_blocks=2))).fit(build(foreign.ShiftedInput), batches())


def test_a_resume_with_another_network_is_refused():
    callback = ReCoCallback(sampler())
    callback.load_state_dict({"choice": {"engine": "frozen", "blocks": "gpt.h", "head": "gpt.head", "tail": 0}})
    with pytest.raises(MisconfigurationException, match=r"trained with .*gpt\.h"):
        trainer(callback).fit(build(foreign.ShiftedInput), batches())


def test_a_prefix_whose_length_changes_from_batch_to_batch():
    class Varying(foreign.PrefixAndTokenizer):
        def training_step(self, batch, batch_idx):
            ids = self.encode(batch[0])
            length = 1 + batch_idx % 3
            prompt = self.prompt[:, :length].expand(len(ids), -1, -1)
            logits = self.net(ids[:, :-1], prefix=prompt)[:, length - 1 :]
            return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    module = build(Varying)
    trainer(ReCoCallback(sampler())).fit(module, batches(count=6))
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_weights(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(foreign.ShiftedInput):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            net = self.net
            x = net.wte(ids[:, :-1]) + net.wpe[:, : TOKENS - 1]
            for layer in net.h:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return F.cross_entropy(net.lm_head(net.ln_f(x)).flatten(0, 1), ids[:, 1:].flatten())

    class Plain(foreign.ShiftedInput):
        def training_step(self, batch, batch_idx):
            ids = batch[0]
            net = self.net
            x = net.wte(ids[:, :-1]) + net.wpe[:, : TOKENS - 1]
            for layer in net.h:
                x = layer(x)
            return F.cross_entropy(net.lm_head(net.ln_f(x)).flatten(0, 1), ids[:, 1:].flatten())

    own, plain = build(Checkpointed), build(Plain)
    for module in (own, plain):
        trainer(ReCoCallback(sampler(seed=1))).fit(module, batches())
    for (name, a), b in zip(own.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_blocks_inside_checkpoint_wrappers_give_the_same_weights():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    own, plain = build(foreign.ShiftedInput), build(foreign.ShiftedInput)
    apply_activation_checkpointing(own.net, check_fn=lambda part: isinstance(part, foreign.Layer))
    for module in (own, plain):
        callback = ReCoCallback(sampler(seed=1))
        trainer(callback).fit(module, batches())
        assert callback.state_dict()["choice"]["engine"] == "frozen"
    for a, b in zip(own.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_explain_refuses_a_network_that_is_no_module_of_lightning():
    with pytest.raises(MisconfigurationException, match=r"pytorch_lightning, got a Network; wrap the network in one"):
        explain(foreign.Network(), None, ReCoCallback(sampler()))


def test_a_second_pass_behind_a_backward_of_its_own_is_refused_in_the_first_step():
    class Twice(foreign.ShiftedInput):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def loss(self, ids):
            return F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

        def training_step(self, batch, batch_idx):
            self.loss(batch[0]).backward()  # and not manual_backward: the rehearsal ends here
            self.loss(batch[0]).backward()

    refused(build(Twice), "a second time on the windowed logits")
