# SPDX-License-Identifier: Apache-2.0
"""Compares the speed of sampling with ``generate`` of transformers on the same weights.

Over a grid of one row and one column the reference network is a Llama: `as_llama` makes it, and both give the same ids.
A taller or wider grid would only change the numbers in the table of rotary positions, not the work.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reco_lightning.experiments.benchmark.training_steps import network_of_size
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.transformer import VideoTransformer, rotary_table, rotate
from reco_lightning.support.argument_checks import check_flag, check_int
from reco_lightning.support.devices import pick_device

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["GenerationSpeed", "as_llama", "compare_generation", "write_generation_speeds"]


@dataclass(frozen=True)
class GenerationSpeed:
    """Two ways of sampling the same network.

    Args:
        own: Tokens per second of ``reco_lightning.generate``, over all videos of the batch.
        transformers: Tokens per second of ``transformers``.
        same_ids: Share of ids that both give without randomness; 1 unless rounding decides between equal logits.
        setting: Device, type, sizes and batch, in words.

    Example:
        >>> GenerationSpeed(300.0, 200.0, 1.0, "cpu").ratio
        1.5
    """

    own: float
    transformers: float
    same_ids: float
    setting: str

    @property
    def ratio(self) -> float:
        """How many times as fast ``reco_lightning.generate`` is."""
        return self.own / self.transformers

    def __str__(self) -> str:
        return (
            f"{self.setting}\n"
            f"reco_lightning.generate               {self.own:10.1f} tokens/s\n"
            f"transformers generate, static cache   {self.transformers:10.1f} tokens/s\n"
            f"ratio {self.ratio:.2f}, same ids without randomness: {self.same_ids:.1%}"
        )


def as_llama(network: VideoTransformer) -> LlamaForCausalLM:
    """Builds the same function as a Llama of transformers: same logits from the same weights.

    The reference network turns a query by the place that its row predicts, one further than the row's own. That turn is
    the same for every row, and goes into the queries' weights.

    Args:
        network: Of a grid (N, 1, 1), without a start token.

    Returns:
        The Llama, with copies of the weights, in their type and place, in evaluation mode.

    Raises:
        ValueError: If the grid has more than one row or column, or there is a start token.
        ModuleNotFoundError: If transformers is not installed.

    Example:
        >>> network = VideoTransformer(vocab_size=16, grid=(8, 1, 1), dim=32, depth=1, heads=2, start_token=False)
        >>> ids = torch.arange(8)[None]
        >>> torch.allclose(as_llama(network)(ids).logits[:, :-1], network(ids)[:, :-1], atol=1e-5)
        True
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the comparison needs transformers: pip install "reco_lightning[hf]"', name=error.name
        ) from error
    config = network.config
    if network.prefix or config["grid"][1:] != (1, 1):
        raise ValueError(
            "network must have a grid of one row and one column and no start token to be a Llama, got grid "
            f"{config['grid']} and start_token={config['start_token']}"
        )
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["dim"],
            intermediate_size=config["hidden_dim"],
            num_hidden_layers=config["depth"],
            num_attention_heads=config["heads"],
            num_key_value_heads=config["heads"],
            max_position_embeddings=network.num_tokens,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    llama.load_state_dict(_llama_weights(network))
    llama.to(network.head.weight.device, network.head.weight.dtype).eval()
    # angles of place 1: those of time, and none of rows and columns, where all tokens share a place
    table = _turn(network)
    llama.model.rotary_emb.inv_freq = torch.atan2(table[1], table[0]).to(network.head.weight.device)
    return llama


def compare_generation(
    *,
    dim: int = 256,
    depth: int = 6,
    heads: int = 8,
    vocab_size: int = 1024,
    tokens: int = 512,
    batch: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    repeats: int = 3,
    seed: int = 0,
) -> GenerationSpeed:
    """Measures both on one device, in turns; sampling at temperature 1 from all ids.

    Each is run once before the clock starts, which covers compilation.

    Args:
        dim: Width of the network.
        depth: Blocks.
        heads: Attention heads.
        vocab_size: Ids.
        tokens: Tokens of a sequence; the first is given.
        batch: Sequences side by side.
        device: Where to.
        dtype: Of weights and caches.
        compile: Whether ``reco_lightning.generate`` compiles its step. Transformers compiles its own where it would:
            with a static cache on a GPU, not on a CPU.
        repeats: Timed runs of each, 1 or more; the medians count.
        seed: Of weights and draws.

    Returns:
        Both speeds.

    Raises:
        ValueError: If an argument is out of its range.
        ModuleNotFoundError: If transformers is not installed.
    """
    check_int(dim=dim, depth=depth, heads=heads, vocab_size=vocab_size, seed=seed)
    check_int(at_least=2, tokens=tokens)  # the first is given
    check_int(at_least=1, batch=batch, repeats=repeats)
    check_flag(compile=compile)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, got {dtype!r}")
    device = device if isinstance(device, torch.device) else pick_device(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = VideoTransformer(
            vocab_size=vocab_size, grid=(tokens, 1, 1), dim=dim, depth=depth, heads=heads, start_token=False
        )
        network.to(device, dtype).eval()
        llama: Any = as_llama(network)
        first = torch.zeros(batch, 1, dtype=torch.long, device=device)

        def own(temperature: float) -> torch.Tensor:
            return generate(
                network, batch, first_tokens=first, temperature=temperature, batch_size=batch, compile=compile
            )

        def other(temperature: float) -> torch.Tensor:
            return llama.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=temperature > 0,
                top_k=0 if temperature else None,
                max_new_tokens=tokens - 1,
                cache_implementation="static",
            )

        same = (own(0.0) == other(0.0)).double().mean().item()
        times: dict[Callable[[float], torch.Tensor], list[float]] = {own: [], other: []}
        for timed in (False, *[True] * repeats):
            for way, seconds in times.items():
                took = _seconds(way, first.device)
                seconds.extend([took] * timed)
    rate = {way: batch * (tokens - 1) / statistics.median(seconds) for way, seconds in times.items()}
    setting = (
        f"{first.device}, {str(dtype).removeprefix('torch.')}, {depth} blocks of width {dim}, {vocab_size} ids, "
        f"{batch} x {tokens} tokens{', compiled' if compile else ''}"
    )
    return GenerationSpeed(rate[own], rate[other], same, setting)


def write_generation_speeds(
    folder: Path,
    *,
    sizes: Sequence[str],
    grid: tuple[int, int, int],
    vocab_size: int,
    batch: int,
    dtype: torch.dtype,
    compile: bool,
    device: torch.device,
) -> list[GenerationSpeed]:
    """Runs `compare_generation` for networks of several sizes, and writes and prints what came out.

    Args:
        folder: Where `generation.md` and `generation.json` are written.
        sizes: As in `reco_lightning.experiments.benchmark.training_steps.network_of_size`.
        grid: Its number of tokens counts.
        vocab_size: Ids.
        batch: Sequences side by side.
        dtype: Of weights and caches.
        compile: As in `compare_generation`.
        device: Where to.

    Returns:
        The speeds, in the order of the sizes.
    """
    speeds = []
    for size in sizes:
        with torch.device("meta"):
            config = network_of_size(size, vocab_size=vocab_size, grid=grid).config
        speed = compare_generation(
            **{name: config[name] for name in ("dim", "depth", "heads", "vocab_size")},
            tokens=math.prod(grid),
            batch=batch,
            device=device,
            dtype=dtype,
            compile=compile,
        )
        speeds.append(speed)
        print(f"{speed}\n")
    rows = [
        f"| {speed.setting} | {speed.own:.1f} | {speed.transformers:.1f} | {speed.ratio:.2f} | {speed.same_ids:.1%} |"
        for speed in speeds
    ]
    head = ["| setting | generate, tokens/s | transformers, tokens/s | ratio | same ids |", "|---|---|---|---|---|"]
    (folder / "generation.md").write_text("\n".join([*head, *rows, ""]))
    (folder / "generation.json").write_text(json.dumps([asdict(speed) for speed in speeds], indent=2))
    print(f"Wrote {folder / 'generation.md'} and generation.json")
    return speeds


def _seconds(way: Callable[[float], torch.Tensor], device: torch.device) -> float:
    begun = time.perf_counter()
    way(1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _turn(network: VideoTransformer) -> torch.Tensor:
    """Cosines and sines of one step in time, (2, head_dim / 2)."""
    return rotary_table(torch.tensor([[1, 0, 0]]), network.config["dim"] // network.heads)[0]


def _llama_weights(network: VideoTransformer) -> dict[str, torch.Tensor]:
    heads = network.heads
    weights = {
        "model.embed_tokens.weight": network.embedding.weight,
        "model.norm.weight": network.norm.weight,
        "lm_head.weight": network.head.weight,
    }
    for number, block in enumerate(network.blocks):
        parts: dict[str, Any] = dict(block.named_modules())
        query, key, value = parts["attention.qkv"].weight.chunk(3)
        columns = query.unflatten(0, (heads, -1)).transpose(1, 2)[None]  # (1, H, D, head_dim)
        turn = _turn(network).to(query.device).expand(columns.shape[2], -1, -1)
        query = rotate(columns, turn)[0].transpose(1, 2).flatten(0, 1)
        gate, up = parts["gate_up"].weight.chunk(2)
        weights |= {
            f"model.layers.{number}.{name}.weight": weight
            for name, weight in {
                "self_attn.q_proj": query,
                "self_attn.k_proj": key,
                "self_attn.v_proj": value,
                "self_attn.o_proj": parts["attention.out"].weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": parts["down"].weight,
                "input_layernorm": parts["attention_norm"].weight,
                "post_attention_layernorm": parts["feed_forward_norm"].weight,
            }.items()
        }
    return {name: weight.detach().clone() for name, weight in weights.items()}
