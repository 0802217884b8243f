# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong on a command line or in a config: exit code 2, and an error that names it, without a traceback."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from typing import Literal, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reco_lightning.cli.entry_point import COMMANDS, main
from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions
from reco_lightning.tokenizers.base import VideoTokenizer
from tests.bad_input.samples import model_file, videos, vqvae_file

pytestmark = pytest.mark.slow

NETWORK = ["--model.network.class_path=VideoTransformer", "--model.network.init_args.grid=[2,1,2]"]
FIT = ["fit", "--model=VideoModel", *NETWORK, "--data=TokenDataModule", "--data.folder=none", "--trainer.logger=false"]
SIZE = "--model.network.init_args.vocab_size"
PREDICT = ["predict", "--model=VideoModel", *NETWORK, f"{SIZE}=8", "--data=GenerationRequests"]

few = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
words = st.text(alphabet="abcdefgh", min_size=3, max_size=8)


@pytest.fixture(autouse=True)
def _quiet_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's handlers keep the stderr of the test that imported it, which is closed by now."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def refused(args, capsys):
    """What stderr says of arguments that are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(args)
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("command", [command.name for command in COMMANDS if command.name != "recipes"])
def test_an_unknown_option_is_named(command, capsys):
    @few
    @given(words, words)
    def is_named(option, value):
        assert f"--no_{option}={value}" in refused([command, f"--no_{option}={value}"], capsys)

    is_named()


@few
@given(words)
def test_an_unknown_command_is_named(word):
    with pytest.raises(SystemExit) as left:
        main([f"no-{word}"])
    assert left.value.code == 2


def functions():
    """Commands whose options are the arguments of a function."""
    for command in (command for command in COMMANDS if not command.takes_args):
        module, _, name = command.target.partition(":")
        yield command.name, getattr(importlib.import_module(module), name)


def options(function):
    """Types of what a command takes, by name; ``**sampling`` stands for the fields of `VideoSamplingOptions`."""
    hints = {name: get_type_hints(function)[name] for name in inspect.signature(function).parameters}
    return hints if hints.pop("sampling", None) is None else hints | get_type_hints(VideoSamplingOptions)


KINDS = {(command, option): kind for command, function in functions() for option, kind in options(function).items()}
TEXTS = (str, str | None, str | VideoTokenizer)  # any word is one


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(key for key, kind in KINDS.items() if kind not in TEXTS),
        ("fit", "trainer.max_steps"),
        ("fit", "data.batch_size"),
        ("fit", "model.learning_rate"),
        ("explain", "trainer.max_steps"),
        ("evaluate", "evaluation.n"),
        ("evaluate", "evaluation.flow"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(command, option, capsys):
    args = [command, *FIT[1:]] if command in ("fit", "explain", "evaluate") else [command]
    said = refused([*args, f"--{option}=fewx"], capsys).rpartition("error:")[2]
    assert option.rpartition(".")[2] in said
    assert "fewx" in said


def tokenize():
    return [
        f"--tokenizer={vqvae_file()}",
        f"--videos={videos()}",
        "--output=out",
        "--frames=5",
        "--size=16",
        "--device=cpu",
    ]


def nothing():
    return []


COMMON = {"temperature": "-1", "top_k": "0", "top_p": "2", "cfg_scale": "-1"}
OUT_OF_RANGE = {
    "tokenize": (
        tokenize,
        {
            **{"tokenizer": "none.ckpt", "videos": "nowhere", "output": "", "captions": "none.jsonl", "split": "none"},
            **{"frames": "0", "stride": "0", "size": "0", "clip_step": "0", "batch_size": "0", "shard_size": "0"},
            **{"num_workers": "-1", "device": "moon", "devices": "-2", "strategy": "none", "index": "none.jsonl"},
        },
    ),
    "generate": (
        lambda: [f"--checkpoint={model_file()}", "--output=out", "--device=cpu"],
        {
            **COMMON,
            **{"checkpoint": "none.ckpt", "tokenizer": "none.ckpt", "output": "", "first_frames": "none.mp4"},
            **{"n": "0", "label": "9", "given_frames": "0", "length": "0", "window_blocks": "9", "context_blocks": "9"},
            **{"fps": "0", "batch_size": "0", "device": "moon"},
        },
    ),
    "convert-i3d": (lambda: ["--checkpoint=none", "--output=out"], {"checkpoint": "nowhere", "output": ""}),
    "demo": (lambda: ["--videos=nowhere"], {"videos": "none", "output": "", "steps": "9"}),
    "benchmark": (
        nothing,
        {
            **{"sizes": "[none]", "methods": "[none]", "grid": "[0,1,1]", "vocab_size": "0", "batch_size": "0"},
            **{"steps": "0", "burn_in": "-1", "device": "moon", "output": ""},
        },
    ),
    "study": (nothing, {"plan": "none", "seeds": "0", "output": "", "workers": "0", "steps": "0"}),
    "plan": (
        nothing,
        {
            **{"sizes": "[none]", "methods": "[none]", "grid": "[0,1,1]", "vocab_size": "0", "batch_size": "0"},
            **{"devices": "0", "rate": "0"},
        },
    ),
    "evaluate": (  # of the others EvaluateVideos, which is in the table, says the same words
        lambda: [*FIT[1:], f"{SIZE}=8", "--evaluation.tokenizer=none.ckpt"],
        {"evaluation.tokenizer": "", "evaluation.n": "1", "evaluation.temperature": "-1"},
    ),
}


def of_any_value(kind, option):
    """Whether no value of the option's kind is wrong: switches, choices that the parser knows, and seeds."""
    return kind is bool or get_origin(kind) is Literal or option.rpartition(".")[2] == "seed"


def test_every_option_of_every_command_has_a_value_out_of_range():
    wanted = {key for key, kind in KINDS.items() if not of_any_value(kind, key[1])}
    given = {(command, option) for command, (_, wrong) in OUT_OF_RANGE.items() for option in wrong}
    assert {key for key in given if key[0] != "evaluate"} == wanted


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [(command, *pair) for command, (_, wrong) in OUT_OF_RANGE.items() for pair in wrong.items()],
)
def test_a_value_out_of_range_is_named_in_one_line(command, option, value, capsys, tmp_path, monkeypatch):
    args = OUT_OF_RANGE[command][0]()
    monkeypatch.chdir(tmp_path)
    said = refused([command, *args, f"--{option}={value}"], capsys).rpartition(f"reco {command}: error: ")[2]
    name = option.rpartition(".")[2].removesuffix("s" if value == "[none]" else "")  # methods and sizes: one of them
    received = value.strip("[]").split(",")[0] or "''"
    assert name in said.splitlines()[0]
    assert re.search(rf"got \W?{re.escape(received)}", said)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "--checkpoint=none.ckpt", "-n", "0"], ("n must", "got 0")),
        (["recipes", "show", "nothing"], ("recipe", "'nothing'")),
        (["recipes", "cp", "nothing", "own.yaml"], ("recipe", "'nothing'")),
        (["recipes", "cp", "reco", "own.txt"], ("FILE", "'own.txt'")),
        (["recipes", "nothing"], ("ACTION", "'nothing'")),
        (["fit", "--config=recipe:nothing"], ("recipe", "'nothing'")),
        (["explain", *FIT[1:], f"{SIZE}=8"], ("trainer.callbacks must hold a ReCoCallback", "got none")),
        ([*PREDICT, "--trainer.accelerator=cpu", "--trainer.devices=0"], ("devices", "0")),  # in Lightning's words
        ([*PREDICT, "--data.n=0"], ("n must be a whole number of 1 or more", "got 0")),
        ([*PREDICT, "--trainer.callbacks+=VideoWriter", "--trainer.callbacks.fps=0"], ("fps", "got 0")),
        (
            [*PREDICT, "--trainer.callbacks+=StopOnSignal", "--trainer.callbacks.every_n_batches=0"],
            ("batches", "got 0"),
        ),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]),
)
def test_what_is_wrong_is_named_in_the_last_line(args, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = refused(args, capsys).splitlines()[-1]
    assert all(part in last for part in named)
    assert list(tmp_path.iterdir()) == []


CONFIGS = {
    "broken YAML": ("a: [1,\n b: }", "line 2"),
    "a list": ("- 1\n", "- 1"),
    "an unknown option": ("no_such: 1\n", "no_such"),
}


@pytest.mark.parametrize("content", CONFIGS)
@pytest.mark.parametrize("command", ["fit", "evaluate", "tokenize", "generate", "benchmark"])
def test_a_config_that_is_no_config_is_refused(command, content, capsys, tmp_path):
    text, named = CONFIGS[content]
    (tmp_path / "own.yaml").write_text(text)
    others = [*FIT[1:], f"{SIZE}=8"] if command in ("fit", "evaluate") else []
    assert named in refused([command, *others, f"--config={tmp_path / 'own.yaml'}"], capsys)


@pytest.mark.parametrize("command", ["fit", "tokenize"])
def test_a_config_that_is_not_there_is_named(command, capsys):
    assert "nothing.yaml" in refused([command, "--config=nothing.yaml"], capsys)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: NoSuchModel\n", "NoSuchModel"),
        ("data: os.system\n", "os.system"),
        ("trainer:\n  callbacks:\n  - class_path: os.system\n", "os.system"),
        ("trainer:\n  callbacks:\n  - class_path: torch.nn.Linear\n", "torch.nn.Linear"),
    ],
)
def test_a_class_that_is_none_of_its_kind_is_named(text, named, capsys, tmp_path):
    """`class_path` names any class of its argument's kind, by design; of no other kind."""
    (tmp_path / "own.yaml").write_text(text)
    assert named in refused(["fit", f"--config={tmp_path / 'own.yaml'}"], capsys)


def test_a_config_that_is_not_utf_8_is_named(capsys, tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"trainer: \xff\n")
    said = refused(["tokenize", f"--config={tmp_path / 'own.yaml'}"], capsys)
    assert "must be a file of UTF-8 text" in said
    assert "own.yaml" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (f"{SIZE}=0", "must be a whole number of 1 or more, got"),
        ("--model.learning_rate=-1", "learning_rate must be a finite number above 0, got -1.0"),
        ("--data.batch_size=0", "batch_size must be a whole number of 1 or more, got 0"),
    ],
)
def test_what_a_constructor_refuses_in_a_fit_is_said_in_its_own_words(wrong, said, capsys):
    assert said in refused([*FIT, f"{SIZE}=8", wrong], capsys).splitlines()[-1]
