# SPDX-License-Identifier: Apache-2.0
"""`reco recipes ls`, `show` and `cp`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reco_lightning.cli.entry_point import main
from reco_lightning.cli.recipes import copy_recipe, recipe_text
from reco_lightning.recipes.files import load_recipe, recipe_names


@pytest.mark.slow
def test_ls_has_every_recipe_once_below_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "ls"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(recipe_names())
    groups = [line for line in lines if line and not line.startswith(" ")]
    assert len(groups) == len(set(groups))
    assert "table7: Weight of the continuity loss." in groups
    (row,) = [line for line in lines if "table7/sky-lambda-0.05 " in line]
    assert row.split(maxsplit=1)[1] == "table4/sky-110m-reco, continuity_weight 0.05; in the paper fvd 89.22"


@pytest.mark.parametrize("name", ["reco", "recipe:reco", "table8/ffs-overlap-75", "method/local-opt"])
def test_show_opens_with_the_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "show", name])
    out = capsys.readouterr().out
    plain = name.removeprefix("recipe:")
    assert any(line.startswith("#   reco fit ") for line in out.split("\n\n")[0].splitlines())
    assert yaml.safe_load(out) == load_recipe(plain).config


@pytest.mark.parametrize("name", recipe_names())
def test_text_stands_alone(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "copy.yaml"
    path.write_text(recipe_text(recipe, "copy.yaml"))
    copy = load_recipe(str(path))
    assert copy.config == recipe.config
    assert len(copy.commands) == len(recipe.commands) >= 1
    assert not any(f"recipe:{name} " in f"{line} " for line in copy.commands)


def test_cp_writes_what_show_prints_with_the_file_in_its_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "mine.yaml"
    main(["recipes", "cp", "reco", str(path)])
    assert capsys.readouterr().out == f"Wrote {path}: reco fit --config {path}\n"
    assert f"#   reco fit --config {path} --data.folder tokens\n" in path.read_text()
    assert yaml.safe_load(path.read_text()) == load_recipe("reco").config


def test_cp_replaces_no_file_unless_told_to(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kept")
    with pytest.raises(ValueError, match=r"FILE must not be there yet, got \S*mine.yaml', which is; --overwrite"):
        copy_recipe("reco", str(path))
    assert path.read_text() == "kept"
    copy_recipe("reco", str(path), overwrite=True)
    assert yaml.safe_load(path.read_text())["model"]["class_path"] == "VideoModel"


def test_cp_wants_a_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FILE must end in .yaml or .yml, got"):
        copy_recipe("reco", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show"], "NAME"),
        (["show", "model/110"], "Did you mean 'model/110m'"),
        (["cp", "reco"], "FILE"),
        (["list"], "invalid choice: 'list'"),
    ],
)
def test_mistakes(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["recipes", *args])
    assert info.value.code == 2
    assert message in capsys.readouterr().err
