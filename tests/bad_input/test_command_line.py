# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong on a command line or in a config: exit code 2, and an error that names it, without a traceback."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reco_lightning.cli import COMMANDS, main

NETWORK = ["--model.network.class_path=VideoTransformer", "--model.network.init_args.grid=[2,1,2]"]
FIT = ["fit", "--model=VideoModel", *NETWORK, "--data=TokenDataModule", "--data.folder=none", "--trainer.logger=false"]
SIZE = "--model.network.init_args.vocab_size"

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


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("tokenize", "frames"),
        ("tokenize", "batch_size"),
        ("tokenize", "overwrite"),
        ("tokenize", "clip_step"),
        ("generate", "n"),
        ("generate", "temperature"),
        ("generate", "top_k"),
        ("generate", "bf16"),
        ("benchmark", "steps"),
        ("demo", "steps"),
        ("convert-i3d", "allow_unknown"),
        ("fit", "trainer.max_steps"),
        ("fit", "data.batch_size"),
        ("fit", "model.learning_rate"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(command, option, capsys):
    @few
    @given(words)
    def is_named(value):
        args = FIT if command == "fit" else [command]
        said = refused([*args, f"--{option}={value}x"], capsys)
        assert option.rpartition(".")[2] in said
        assert f"{value}x" in said

    is_named()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (
            ["tokenize", "--tokenizer=none.ckpt", "--videos=nowhere", "--output=out", "--frames=0"],
            ("tokenizer", "none"),
        ),
        (["tokenize", "--tokenizer=none.ckpt", "--videos=nowhere", "--output=out", "--size=0"], ("size", "got 0")),
        (["tokenize", "--tokenizer=none", "--videos=x", "--output=out", "--device=moon"], ("device", "'moon'")),
        (["tokenize", "--tokenizer=none", "--videos=x", "--output=out", "--num_workers=-1"], ("num_workers", "-1")),
        (["generate", "--checkpoint=none.ckpt"], ("checkpoint", "'none.ckpt'")),
        (["generate", "--checkpoint=none.ckpt", "-n", "0"], ("n must", "got 0")),
        (["generate", "--checkpoint=none.ckpt", "--fps=0"], ("fps", "got 0")),
        (["generate", "--checkpoint=none.ckpt", "--device=moon"], ("device", "'moon'")),
        (["convert-i3d", "--checkpoint=none", "--output=out"], ("checkpoint", "'none'")),
        (["demo", "--videos=nowhere"], ("videos", "'nowhere'")),
        (["recipes", "show", "nothing"], ("recipe", "'nothing'")),
        (["fit", "--config=recipe:nothing"], ("recipe", "'nothing'")),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]),
)
def test_a_value_out_of_range_is_named_in_the_last_line(args, named, capsys, tmp_path, monkeypatch):
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
        (f"{SIZE}=0", "must be 1 or more, got"),
        ("--model.learning_rate=-1", "learning_rate must be above 0, got -1.0"),
        ("--data.batch_size=0", "batch_size must be at least 1, got 0"),
    ],
)
def test_what_a_constructor_refuses_in_a_fit_is_said_in_its_own_words(wrong, said, capsys):
    assert said in refused([*FIT, f"{SIZE}=8", wrong], capsys).splitlines()[-1]
