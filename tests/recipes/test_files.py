# SPDX-License-Identifier: Apache-2.0
"""How recipes are found, composed and dealt out to commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from reco_lightning.recipes.files import load_recipe, options_for, own_recipe


def test_unknown_recipe_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r"got 'table4/ffs-110m-rec'\. Did you mean 'table4/ffs-110m-reco' or"):
        load_recipe("table4/ffs-110m-rec")
    with pytest.raises(ValueError, match=r"got 'table4'\."):
        load_recipe("table4")
    with pytest.raises(ValueError, match=r"got '\.\./recipes/reco'\."):
        load_recipe("../recipes/reco")


def test_own_recipe_stands_on_packaged_ones_and_on_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "slow.yaml").write_text("model: {init_args: {learning_rate: 1.0e-5}}\n")
    own = tmp_path / "mine.yaml"
    own.write_text(
        "# My own.\n#\n#   reco fit --config mine.yaml\n\n"
        "compose: [reco, pieces/slow.yaml]\ntrainer: {callbacks.ReCoCallback: {continuity_weight: 0.5}}\n"
    )
    recipe = load_recipe(str(own))
    assert (recipe.summary, recipe.commands) == ("My own.", ("reco fit --config mine.yaml",))
    assert recipe.config["model"]["init_args"]["learning_rate"] == 1e-5
    assert recipe.config["trainer"]["callbacks"][-1]["init_args"]["continuity_weight"] == 0.5
    assert recipe.config["trainer"]["logger"]["init_args"]["name"] == "mine"


def test_which_files_are_recipes(tmp_path: Path) -> None:
    def file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    assert own_recipe(file("a.yaml", "compose: [reco]\n"))
    assert own_recipe(file("b.yml", "tokenize: {frames: 5}\n"))
    assert not own_recipe(file("c.yaml", "trainer: {max_steps: 1}\n"))
    assert not own_recipe(file("d.yaml", "- compose\n"))
    assert not own_recipe(file("e.yaml", "compose: [\n"))
    assert not own_recipe(file("f.json", '{"compose": []}'))
    assert not own_recipe("compose: [reco]")
    assert not own_recipe(str(tmp_path))


def test_parts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "round.yaml").write_text("compose: [again.yaml]\n")
    (tmp_path / "again.yaml").write_text("compose: [round.yaml]\n")
    with pytest.raises(ValueError, match=r"must not be a part of itself, got \S*round.yaml > \S*again.yaml > \S*round"):
        load_recipe(str(tmp_path / "round.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list.yaml must hold a YAML mapping, got list"):
        load_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"broken.yaml must hold YAML, but cannot be read: "):
        load_recipe(str(tmp_path / "broken.yaml"))
    with pytest.raises(ValueError, match=r"got '\S*none.yaml'"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_sections_of_commands() -> None:
    recipe = load_recipe("reco")
    assert options_for(recipe, "fit").keys() == options_for(recipe, "explain").keys()
    assert "evaluation" not in options_for(recipe, "fit")
    evaluate = options_for(recipe, "evaluate")
    assert "model" not in evaluate
    assert evaluate["trainer"] == recipe.config["trainer"]
    assert (evaluate["data"]["init_args"]["val_fraction"], evaluate["evaluation"]["n"]) == (0, 2048)
    assert options_for(load_recipe("method/baseline"), "evaluate") == {"trainer": {}}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("vqvae", "tokenize"),
        ("method/reco", "generate"),
        ("paper-text", "evaluate"),
        ("table5/loong-7b", "generate"),
    ],
)
def test_a_recipe_without_the_command(name: str, command: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe {name} has nothing for reco {command}, only .*trainer"):
        options_for(load_recipe(name), command)


def test_a_row_of_the_same_run_is_trained_once() -> None:
    assert load_recipe("table6/ucf101-reco").commands[:3] == (
        "reco tokenize --config recipe:table4/ucf101-110m-reco",
        "reco fit --config recipe:table4/ucf101-110m-reco",
        "reco tokenize --config recipe:table6/ucf101-reco",
    )
    assert load_recipe("table2/sky-baseline").commands[1] == "reco fit --config recipe:table4/sky-110m-baseline"
    assert load_recipe("table7/sky-lambda-1").commands[1] == "reco fit --config recipe:table7/sky-lambda-1"
