# SPDX-License-Identifier: Apache-2.0
"""Every packaged recipe opens with commands that parse, has the paper's numbers, and runs when made small."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from reco_lightning.cli.entry_point import main
from reco_lightning.data.tokens.shards import ClipSource, TokenShardWriter
from reco_lightning.models.transformer import SIZES
from reco_lightning.recipes.files import Recipe, load_recipe, options_for, recipe_names, tables
from reco_lightning.support.media import write_video
from tests.helpers.processes import run_module
from tests.helpers.words import save_words

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "reco_lightning" / "recipes"
RECIPES: dict[str, Recipe] = {name: load_recipe(name) for name in recipe_names()}
ROWS = [name for name in RECIPES if name.startswith("table")]
FILES = [name for name in RECIPES if name not in ROWS]
METHODS = ("baseline", "fewer-frames", "local-opt", "local-opt-balanced", "reco")
#: The same run on any of them: only names of folders differ.
ALIKE = ("ffs", "sky", "taichi")


def network(recipe: Recipe) -> dict[str, Any]:
    return recipe.config["model"]["init_args"]["network"]


def callback(recipe: Recipe, kind: str) -> dict[str, Any] | None:
    trainer = recipe.config["trainer"]
    entries = trainer.get("callbacks") or trainer.get("callbacks+") or []
    found = [entry["init_args"] for entry in entries if entry["class_path"] == kind]
    assert len(found) < 2
    return found[0] if found else None


def nameless(recipe: Recipe, command: str = "fit") -> dict[str, Any]:
    """What a recipe holds for a command but for the recipe's own name."""
    return json.loads(json.dumps(options_for(recipe, command)).replace(recipe.name, "NAME"))


def kind_of(options: Mapping[str, Any]) -> str:
    """The options but for the name of a data set without classes: equal for runs that differ in folders alone."""
    return re.sub(rf"\b({'|'.join(ALIKE)})\b", "DATA", json.dumps(options, sort_keys=True))


def form_of(options: Mapping[str, Any]) -> str:
    """The kind of options, numbers replaced by their type: what parses alike."""
    return re.sub(r"(?<=[ \[])-?\d+(\.\d+)?(?=[,}\]])", lambda n: "float" if "." in n[0] else "int", kind_of(options))


def one_of_each(names: list[str], command: str) -> list[str]:
    """The first recipe of every form."""
    forms: dict[str, str] = {}
    for name in names:
        options = nameless(RECIPES[name], command)
        # the options of evaluate are those of fit, and a section
        forms.setdefault(form_of(options["evaluation"] if command == "evaluate" else options), name)
    return list(forms.values())


# -- the paper's numbers


@pytest.mark.parametrize("name", [name for name in ROWS if "table5" not in name])
def test_row_trains_as_section_6_1_says(name: str) -> None:
    config = RECIPES[name].config
    model = config["model"]["init_args"]
    assert model["learning_rate"] == 1e-4
    assert config["trainer"]["max_epochs"] == 300
    assert (config["trainer"]["devices"], config["trainer"]["strategy"]) == (4, "ddp")
    assert config["trainer"]["precision"] == "bf16-mixed"
    small = network(RECIPES[name])["init_args"]["dim"] == 768
    assert config["data"]["init_args"]["batch_size"] * 4 == (96 if small else 40)
    assert network(RECIPES[name])["init_args"].get("num_classes", 0) == (101 if "ucf101" in name else 0)


@pytest.mark.parametrize("size", ["110m", "343m", "770m"])
def test_sizes_are_those_of_the_network(size: str) -> None:
    init = network(RECIPES[f"table4/ffs-{size}-reco"])["init_args"]
    assert {key: init[key] for key in ("dim", "depth", "heads")} == SIZES[size]
    assert (init["vocab_size"], init["grid"]) == (8192, [5, 32, 32])


def test_larp_has_the_released_sizes() -> None:
    assert network(RECIPES["table4/sky-larp-reco"]) == {
        "class_path": "LARPTransformer",
        "init_args": {
            "vocab_size": 8192, "video_tokens": 1024, "dim": 1280, "depth": 30, "heads": 20, "num_classes": 0,
        },
    }  # fmt: skip


@pytest.mark.parametrize(("name", "epochs"), [("loong-7b", 10), ("reco-7b", 20), ("reco-7b-half", 10)])
def test_text_to_video(name: str, epochs: int) -> None:
    config = RECIPES[f"table5/{name}"].config
    assert config["model"]["class_path"].endswith(".TextVideoModel")
    assert config["model"]["init_args"]["gradient_checkpointing"] is True
    architecture = network(RECIPES[f"table5/{name}"])["init_args"]["architecture"]
    width, inner, layers = (architecture[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    tables = 2 * width * (architecture["vocab_size"] + 8192 + 1)
    assert (layers * (4 * width**2 + 3 * width * inner) + tables) / 1e9 == pytest.approx(7, abs=0.3)
    assert config["data"]["init_args"]["folder"] == config["tokenize"]["output"] == "tokens/vimeo"
    assert config["trainer"]["strategy"]["class_path"] == "ModelParallelStrategy"
    assert config["trainer"]["precision"].startswith("bf16")
    assert config["trainer"]["max_epochs"] == epochs


@pytest.mark.parametrize(
    ("name", "weight", "first", "context"),
    [
        ("table1/sky-fewer-frames", 0.0, None, "dropped"),
        ("table2/ffs-local-opt", 0.0, None, "frozen"),
        ("table3/sky-first-frame", 0.0, None, "frozen"),
        ("table3/ffs-balanced", 0.0, 0.5, "frozen"),
        ("table4/taichi-770m-reco", 0.1, 0.5, "frozen"),
        ("table4/ucf101-larp-reco", 0.1, 0.5, "frozen"),
        ("table5/reco-7b-half", 0.1, 0.5, "frozen"),
    ],
)
def test_method(name: str, weight: float, first: float | None, context: str) -> None:
    reco = callback(RECIPES[name], "ReCoCallback")
    assert (reco["continuity_weight"], reco.get("context", "frozen")) == (weight, context)
    sampler = reco["sampler"]["init_args"]
    assert (sampler["window_blocks"], sampler["first_window_prob"]) == (2, first)


@pytest.mark.parametrize("name", [name for name in ROWS if "baseline" in name])
def test_baseline_has_no_windows(name: str) -> None:
    assert callback(RECIPES[name], "ReCoCallback") is None


@pytest.mark.parametrize("data", ["ffs", "sky"])
def test_sweeps_change_one_value(data: str) -> None:
    base = nameless(RECIPES[f"table4/{data}-110m-reco"])
    for weight in (0, 0.01, 0.05, 0.1, 0.5, 1):
        swept = nameless(RECIPES[f"table7/{data}-lambda-{weight}"])
        assert swept["trainer"]["callbacks"][-1]["init_args"].pop("continuity_weight") == weight
        swept["trainer"]["callbacks"][-1]["init_args"]["continuity_weight"] = 0.1
        assert swept == base
    for overlap, stride in ((0, 2), (50, 1), (75, 0.5)):
        swept = nameless(RECIPES[f"table8/{data}-overlap-{overlap}"])
        assert swept["trainer"]["callbacks"][-1]["init_args"]["sampler"]["init_args"].pop("stride_blocks") == stride
        assert swept == base


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("table1/sky-baseline", "table4/sky-110m-baseline"),
        ("table2/ffs-fewer-frames", "table1/ffs-fewer-frames"),
        ("table3/sky-first-frame", "table2/sky-local-opt"),
        ("table6/ucf101-reco", "table4/ucf101-110m-reco"),
        ("table7/ffs-lambda-0", "table3/ffs-balanced"),
        ("table7/sky-lambda-0.1", "table4/sky-110m-reco"),
        ("table9/sky-baseline-64", "table4/sky-110m-baseline"),
    ],
)
def test_runs_that_several_tables_print_are_the_same(name: str, same: str) -> None:
    assert nameless(RECIPES[name]) == nameless(RECIPES[same])


def test_rows_differ_from_their_baseline_in_the_callback_alone() -> None:
    for data in ("ffs", "sky", "ucf101", "taichi"):
        for model in ("110m", "343m", "770m", "larp"):
            reco, baseline = (nameless(RECIPES[f"table4/{data}-{model}-{method}"]) for method in ("reco", "baseline"))
            assert reco["trainer"]["callbacks"].pop()["class_path"] == "ReCoCallback"
            assert reco == baseline


def test_figures_of_the_paper() -> None:
    fvd = {
        "110m-reco": (72.6, 87.5, 590.3, 104.3), "110m-baseline": (73.7, 89.1, 630.8, 115.5),
        "770m-reco": (42.5, 58.8, 251.4, 98.3), "770m-baseline": (46.1, 62.7, 254.5, 105.5),
        "larp-reco": (46.2, 61.7, 56.1, 104.6), "larp-baseline": (62.6, 70.4, 57.0, 119.5),
    }  # fmt: skip
    for what, values in fvd.items():
        for data, value in zip(("ffs", "sky", "ucf101", "taichi"), values, strict=True):
            assert RECIPES[f"table4/{data}-{what}"].paper == {"fvd": value}
    methods = {
        "table1/{}-fewer-frames": (229.32, 292.41, 1.75), "table2/{}-fewer-frames": (229.32, 292.41, 2.10),
        "table2/{}-local-opt": (190.46, 256.94, 1.47), "table3/{}-first-frame": (134.73, 186.63, 1.47),
        "table3/{}-balanced": (127.11, 179.84, 1.68), "table1/{}-baseline": (73.65, 89.09, 0.84),
    }  # fmt: skip
    for name, (ffs, sky, speed) in methods.items():
        assert RECIPES[name.format("ffs")].paper == {"fvd": ffs, "speed": speed}
        assert RECIPES[name.format("sky")].paper == {"fvd": sky, "speed": speed}
    sweep = {0: (127.11, 179.84), 0.01: (91.42, 105.30), 0.05: (73.85, 89.22), 0.5: (76.93, 94.15), 1: (88.24, 112.67)}
    for weight, (ffs, sky) in sweep.items():
        assert RECIPES[f"table7/ffs-lambda-{weight}"].paper == {"fvd": ffs}
        assert RECIPES[f"table7/sky-lambda-{weight}"].paper == {"fvd": sky}
    assert [RECIPES[f"table8/ffs-overlap-{o}"].paper["fvd"] for o in (0, 50, 75)] == [98.4, 72.6, 71.9]
    assert [RECIPES[f"table8/sky-overlap-{o}"].paper["fvd"] for o in (0, 50, 75)] == [112.1, 87.5, 86.9]
    assert list(RECIPES["table6/ucf101-reco"].paper.values()) == [204.6, 390.2, 815.7]
    assert list(RECIPES["table6/ucf101-baseline"].paper.values()) == [215.4, 542.7, 985.2]
    text = [RECIPES[f"table5/{name}"].paper for name in ("loong-7b", "reco-7b", "reco-7b-half")]
    assert [tuple(p.values()) for p in text] == [(0.2903, 274, 1.0), (0.3056, 212, 1.0), (0.2911, 267, 0.5)]
    long = [RECIPES[f"table9/sky-{m}-{n}"].paper["fvd"] for m in ("baseline", "reco") for n in (32, 64)]
    assert long == [83.5, 79.2, 78.8, 71.1]


def test_what_other_commands_are_told() -> None:
    tokenize = options_for(RECIPES["table4/taichi-110m-reco"], "tokenize")
    assert (tokenize["frames"], tokenize["size"], tokenize["layout"]) == (17, 256, "taichi")
    assert tokenize["output"] == RECIPES["table4/taichi-110m-reco"].config["data"]["init_args"]["folder"]
    larp = RECIPES["table4/taichi-larp-reco"]
    tokenize = options_for(larp, "tokenize")
    assert (tokenize["frames"], tokenize["size"]) == (16, 128)
    assert tokenize["output"] == larp.config["data"]["init_args"]["folder"] == "tokens/taichi-larp"
    assert options_for(RECIPES["table3/ffs-first-frame"], "evaluate")["evaluation"]["first_blocks"] == 1
    assert options_for(RECIPES["table9/sky-reco-32"], "generate")["length"] == 1 + 32 // 4
    assert options_for(RECIPES["table9/sky-reco-64"], "generate")["length"] == 1 + 64 // 4
    for name, frames in (("table9/sky-baseline-32", 32), ("table9/sky-baseline-64", 64), ("table9/sky-reco-64", 64)):
        scored = options_for(RECIPES[name], "evaluate")
        assert (scored["evaluation"]["length"], scored["evaluation"]["videos"]) == (1 + frames // 4, "videos/sky")
        assert (scored["evaluation"]["n"], scored["data"]["init_args"]["folder"]) == (2048, "tokens/sky")
    for name in ("loong-7b", "reco-7b", "reco-7b-half"):
        recipe = RECIPES[f"table5/{name}"]
        scored, msrvtt = options_for(recipe, "evaluate"), RECIPES["data/msrvtt"].config
        assert scored["evaluation"]["tokenizer"] == recipe.config["tokenize"]["tokenizer"]
        assert scored["evaluation"]["videos"] == msrvtt["tokenize"]["videos"]
        assert scored["data"] | {"init_args": msrvtt["data"]["init_args"]} == msrvtt["data"]
        assert scored["data"]["init_args"].items() >= msrvtt["data"]["init_args"].items()
        assert scored["trainer"]["strategy"] == "ddp"  # whole networks, from a checkpoint that is one file
        assert recipe.config["trainer"]["strategy"]["init_args"] == {
            **{"data_parallel_size": 8, "tensor_parallel_size": 1},
            "save_distributed_checkpoint": False,
        }
    assert options_for(RECIPES["table1/ffs-fewer-frames"], "generate")["window_blocks"] == 2
    assert options_for(RECIPES["table1/ffs-fewer-frames"], "evaluate")["evaluation"]["window_blocks"] == 2
    test_set = options_for(RECIPES["table6/ucf101-reco"], "evaluate")
    assert test_set["data"]["init_args"]["folder"] == "tokens/ucf101-test"
    assert test_set["data"]["init_args"]["val_fraction"] == 0
    assert options_for(RECIPES["table6/ucf101-reco"], "tokenize")["output"] == "tokens/ucf101-test"


# -- text


@pytest.mark.parametrize("name", FILES)
def test_file_opens_with_a_summary_and_its_launch_command(name: str) -> None:
    head = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert head[0].endswith(".")
    assert head[1] == "#"
    assert any(line.startswith("#   reco ") and f"recipe:{name}" in line for line in head)


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_commented_loggers_are_one_line_each(logger: str) -> None:
    lines = [
        line
        for line in (FOLDER / "train" / "run.yaml").read_text().splitlines()
        if f"# logger: {{class_path: {logger}" in line
    ]
    parsed = yaml.safe_load(lines[0].replace("# ", "", 1))
    assert len(lines) == 1
    assert parsed["logger"]["init_args"]["save_dir"] == "outputs/{recipe}"


def test_runs_log_to_wandb_offline_each_to_a_folder_of_its_own() -> None:
    for name in ["baseline", "reco", "best", "vqvae", *ROWS]:
        trainer = RECIPES[name].config["trainer"]
        assert trainer["logger"] == {
            "class_path": "WandbLogger",
            "init_args": {"project": "reco", "name": name, "save_dir": f"outputs/{name}", "offline": True},
        }
        best, last = (c["init_args"] for c in trainer["callbacks"] if c["class_path"] == "ModelCheckpoint")
        assert best["auto_insert_metric_name"] is False
        assert last == {"filename": "last", "enable_version_counter": False}  # no monitor: of every epoch


def test_tables_name_every_row_once_and_stand_on_pieces() -> None:
    assert {table: len(content["rows"]) for table, content in tables().items()} == {
        "table1": 4, "table2": 6, "table3": 8, "table4": 32, "table5": 3,
        "table6": 2, "table7": 12, "table8": 6, "table9": 4,
    }  # fmt: skip
    for content in tables().values():
        assert content["title"].endswith(".")
        assert all(part in RECIPES for row in content["rows"].values() for part in row["compose"])


# -- the real parsers, in one fresh process, where no test has imported what the short names stand for


def leaves(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value.rpartition(".")[2] if path[-1] == "class_path" else value}
    return {key: leaf for name, inner in items for key, leaf in leaves(inner, (*path, name)).items()}


def commands_to_parse() -> dict[str, list[str]]:
    """Command line to arguments: all of the files', and of the rows' one of each form."""
    lines = {line for name in FILES for line in RECIPES[name].commands}
    for command in ("fit", "evaluate", "tokenize", "generate"):
        having = [name for name in ROWS if command == "fit" or RECIPES[name].config.get(command)]
        for name in one_of_each(having, command):
            lines |= {line for line in RECIPES[name].commands if line.startswith(f"reco {command} ")}
    return {line: shlex.split(line)[1:] for line in sorted(lines)}


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the parsers make of the launch commands, and of a few command lines more."""
    folder = tmp_path_factory.mktemp("parse")
    main(["recipes", "cp", "table4/ffs-110m-reco", str(folder / "copy.yaml")])
    main(["recipes", "cp", "vqvae", str(folder / "mine.yaml")])
    pieces = ("paper", "data/ffs", "model/110m", "method/reco")
    lines = commands_to_parse() | {
        "row": ["fit", "--config=recipe:table4/ffs-110m-reco"],
        "pieces": ["fit", *(f"--config=recipe:{piece}" for piece in pieces)],
        "copy": ["fit", "--config", "copy.yaml"],
        "copy, evaluate": ["evaluate", "--config", "copy.yaml"],
        "flags": ["fit", "--config", "recipe:reco", "--data.folder=elsewhere", "--trainer.max_epochs=3"],
    }
    (folder / "lines.json").write_text(json.dumps(list(lines.values())))
    run_module("tests.helpers.parse_commands", "lines.json", "configs.json", folder=folder)
    return dict(zip(lines, json.loads((folder / "configs.json").read_text()), strict=True))


def test_every_launch_command_parses(parsed: dict[str, dict[str, Any]]) -> None:
    assert {line: result["error"] for line, result in parsed.items() if "error" in result} == {}


def test_every_form_of_row_was_parsed_to_what_it_says(parsed: dict[str, dict[str, Any]]) -> None:
    seen = set()
    for line, result in parsed.items():
        match = re.match(r"reco (\S+) --config recipe:(\S+)", line)
        if not match or match[2] not in ROWS:
            continue
        options = options_for(RECIPES[match[2]], match[1])
        if match[1] == "fit":
            seen.add(form_of(nameless(RECIPES[match[2]])))
        found = leaves(result["config"])
        assert {path: found.get(path, "nothing") for path in leaves(options)} == leaves(options), line
    assert seen == {form_of(nameless(RECIPES[name])) for name in ROWS}


def test_our_merge_is_that_of_lightning_cli(parsed: dict[str, dict[str, Any]]) -> None:
    pieces = json.loads(json.dumps(parsed["pieces"]["config"]).replace('paper"', 'table4/ffs-110m-reco"'))
    assert pieces == parsed["row"]["config"]


def test_a_copy_is_the_recipe(parsed: dict[str, dict[str, Any]]) -> None:
    assert parsed["copy"] == parsed["row"]
    assert parsed["copy, evaluate"]["config"]["evaluation"]["output"] == "outputs/table4/ffs-110m-reco/evaluation"


def test_flags_win(parsed: dict[str, dict[str, Any]]) -> None:
    config = parsed["flags"]["config"]
    assert (config["data"]["init_args"]["folder"], config["trainer"]["max_epochs"]) == ("elsewhere", 3)


# -- fast_dev_run


SMALL: dict[str, Any] = {
    "data.batch_size": 4, "data.val_fraction": 0.25,
    "trainer.fast_dev_run": 2, "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.strategy": "auto",
    "trainer.precision": "32-true", "trainer.enable_progress_bar": False, "trainer.enable_model_summary": False,
}  # fmt: skip

SIZES_OF = {"model.network.dim": 32, "model.network.depth": 2, "model.network.heads": 2}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 4}  # fmt: skip
#: What only some networks take, by class.
EXTRA: dict[str, dict[str, Any]] = {
    "VideoTransformer": SIZES_OF,
    "LARPTransformer": SIZES_OF | {"model.network.video_tokens": 16},
    "TextVideoNetwork": {"model.network.architecture": json.dumps(LLAMA), "data.text_tokenizer": "words"},
}


def small_kind(name: str) -> str:
    """The options of a recipe where its flags do not replace them: equal for runs that are the same when small."""
    options = nameless(RECIPES[name])
    for key in SMALL | EXTRA.get(network(RECIPES[name])["class_path"].rpartition(".")[2], {}):
        section, *middle, last = key.split(".")
        place = options[section] if section == "trainer" else options[section]["init_args"]
        for part in middle:
            place = place[part]["init_args"]
        place[last] = "small"
    return kind_of(options)


def runs_when_small() -> list[str]:
    kinds: dict[str, str] = {}
    for name in ["baseline", "reco", "best", *ROWS]:
        kinds.setdefault(small_kind(name), name)
    return list(kinds.values())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of 16 clips, on a grid and of holistic ids, and a text tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    sources = [ClipSource(f"{i}.mp4", 0, 17) for i in range(16)]
    ids = np.random.default_rng(0).integers(0, 16, (16, 20))
    for kind, grid in (("grid", (5, 2, 2)), ("larp", (16,))):
        writer = TokenShardWriter(folder / kind, vocab_size=16, grid=grid, frame_aligned=kind == "grid")
        with writer:
            texts = ["a cat", "a dog", None, "cat"] * 4
            writer.write(ids.reshape(16, *grid) if kind == "grid" else ids[:, :16], np.arange(16), sources, texts)
    save_words(folder / "words", ["a", "cat", "dog"])
    return folder


@pytest.mark.parametrize("name", runs_when_small())
def test_row_runs(name: str, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = network(RECIPES[name])["class_path"].rpartition(".")[2]
    monkeypatch.chdir(tokens)
    folder = {"data.folder": "larp" if kind == "LARPTransformer" else "grid", "trainer.default_root_dir": tmp_path}
    flags = SMALL | EXTRA[kind] | folder
    untrained = pytest.warns(UserWarning, match="never reaches the last 4 tokens")
    with untrained if "overlap-0" in name else contextlib.nullcontext():
        main(["fit", "--config", f"recipe:{name}", *(f"--{key}={value}" for key, value in flags.items())])


def test_runs_cover_every_row_and_method() -> None:
    runs = runs_when_small()
    assert {small_kind(name) for name in ROWS} <= {small_kind(name) for name in runs}
    windowed = [callback(RECIPES[name], "ReCoCallback") for name in runs]
    for method in METHODS:
        assert callback(RECIPES[f"method/{method}"], "ReCoCallback") in windowed


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Four short clips of noise."""
    (tmp_path / "videos").mkdir()
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        write_video(tmp_path / "videos" / f"{number}.mp4", frames)
    return tmp_path / "videos"


def test_vqvae_runs(videos: Path, tmp_path: Path) -> None:
    trainer = {key: value for key, value in SMALL.items() if key.startswith("trainer.")}
    data = {"data.root": videos, "data.frames": 5, "data.size": 32, "data.batch_size": 2, "data.num_workers": 0,
            "data.val_fraction": 0.25, "trainer.default_root_dir": tmp_path}  # fmt: skip
    main(["fit", "--config=recipe:vqvae", *(f"--{key}={value}" for key, value in (trainer | data).items())])
