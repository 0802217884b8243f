# SPDX-License-Identifier: Apache-2.0
"""Sizes of LARP's autoregressive network (Wang et al., arXiv 2410.21264), and how its `config.json` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reco_lightning.support.argument_checks import check_finite, check_flag, check_int

__all__ = ["arguments_from_json", "check_arguments", "hidden_width"]

# The options of a released config.json, with the published class's own defaults for what is missing.
_DEFAULTS: dict[str, Any] = {
    "dim": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "token_dropout_p": 0.1,
    "attn_dropout_p": 0.0,
    "resid_dropout_p": 0.1,
    "ffn_dropout_p": 0.1,
    "drop_path_rate": 0.0,
    "num_classes": 101,
    "model_type": "class_cond",
    "vocab_size": 8192,
    "cls_token_num": 1,
    "max_seq_len": 1024,
    "use_fixed_pe": False,
    "frame_prediction": False,
}

# Options without a meaning for the network: unused, for its initial weights, for a cache, or for the loss.
_UNREAD = {"rope_base", "initializer_range", "max_batch_size", "class_dropout_prob"}


def hidden_width(dim: int, multiple: int = 256, factor: float | None = None) -> int:
    """Returns the width of the feed-forward network: 8/3 of the network's, times a factor, rounded up.

    Args:
        dim: D.
        multiple: What the result is a multiple of.
        factor: None is 1.

    Example:
        >>> hidden_width(1280)
        3584
    """
    hidden = int(8 * dim / 3)
    if factor is not None:
        hidden = int(factor * hidden)
    return -(-hidden // multiple) * multiple


def arguments_from_json(stored: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """Reads the options of a released network.

    Args:
        stored: What `config.json` holds.
        source: What to call it in an error.

    Returns:
        Arguments of `LARPTransformer`.

    Raises:
        ValueError: An option is unknown, or has a value that no layout of LARP has.

    Example:
        >>> arguments = arguments_from_json({"dim": 1280, "n_layer": 30, "n_head": 20})
        >>> arguments["hidden_dim"], arguments["video_tokens"], arguments["condition_tokens"]
        (3584, 1024, 0)
    """
    if unknown := sorted(stored.keys() - _DEFAULTS.keys() - _UNREAD):
        raise ValueError(
            f"{source} must hold the options of LARP's video model alone, got {', '.join(unknown)} too; what they "
            "change is not known here"
        )
    options = {name: stored.get(name, default) for name, default in _DEFAULTS.items()}
    condition = options["cls_token_num"] - 1
    for name, allowed, fits in (
        ("model_type", "'class_cond'", options["model_type"] == "class_cond"),
        ("drop_path_rate", "0", not options["drop_path_rate"]),
        (
            "cls_token_num",
            "1, or with frame_prediction the ids of the condition and a separator",
            condition > 0 if options["frame_prediction"] else condition == 0,
        ),
    ):
        if not fits:
            raise ValueError(f"{source}: {name} must be {allowed}, got {options[name]!r}")
    return {
        "vocab_size": options["vocab_size"],
        "video_tokens": options["max_seq_len"],
        "condition_tokens": condition,
        "num_classes": 0 if condition else options["num_classes"],
        "dim": options["dim"],
        "depth": options["n_layer"],
        "heads": options["n_head"],
        "kv_heads": options["n_kv_head"],
        "hidden_dim": hidden_width(options["dim"], options["multiple_of"], options["ffn_dim_multiplier"]),
        "norm_eps": options["norm_eps"],
        "learned_positions": not options["use_fixed_pe"],
        "token_dropout": options["token_dropout_p"],
        "attention_dropout": options["attn_dropout_p"],
        "residual_dropout": options["resid_dropout_p"],
        "feed_forward_dropout": options["ffn_dropout_p"],
    }


def check_arguments(config: Mapping[str, Any]) -> None:
    """Raises unless a network can be made of the sizes.

    Args:
        config: Arguments of `LARPTransformer`.

    Raises:
        ValueError: One is out of its range, or does not divide.
    """
    sizes = ("vocab_size", "video_tokens", "dim", "depth", "heads", "kv_heads", "hidden_dim")
    rates = ("token_dropout", "attention_dropout", "residual_dropout", "feed_forward_dropout")
    check_int(at_least=1, **{name: config[name] for name in sizes})
    check_int(at_least=0, **{name: config[name] for name in ("condition_tokens", "num_classes")})
    check_finite(**{name: config[name] for name in rates})
    check_finite(above=0, norm_eps=config["norm_eps"])
    check_flag(learned_positions=config["learned_positions"])
    for name, part in (("dim", "heads"), ("heads", "kv_heads")):
        if config[name] % config[part]:
            raise ValueError(f"{name} must be a multiple of {part}, got {config[name]} and {config[part]}")
    condition, classes = config["condition_tokens"], config["num_classes"]
    if condition and classes:
        raise ValueError(
            "condition_tokens and num_classes must not both be above 0 (the network is conditioned on a class or on "
            f"frames), got {condition} and {classes}"
        )
    for name in rates:
        if not 0 <= config[name] < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {config[name]}")
