# SPDX-License-Identifier: Apache-2.0
"""Every block of the README and of the documentation does what it shows, on tiny files and networks.

The Python blocks of a page run in order, in one process and one folder, as a reader would type them; the README's each
by itself. Before them the folder holds what `page_files` makes: clips of noise, and tiny networks under the names of
real ones. Every command of `reco` is read by its own parser; those that are cheap run, between the Python blocks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from reco_lightning.cli.entry_point import main
from reco_lightning.data.clips.folder import VideoFolder
from reco_lightning.experiments.study.plan import load_plan
from reco_lightning.metrics.protocols import PROTOCOLS
from reco_lightning.recipes.files import load_recipe, options_for, recipe_names, tables
from tests.helpers.pages import PAGES, ROOT, Block, blocks_in, blocks_of, command_lines, reco_words
from tests.helpers.processes import clean_environment, finish, forked
from tests.helpers.run_pages import DONE

pytestmark = pytest.mark.slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What may stand behind a fence. Nothing checks `text`, but for the blocks that tests below name.
KINDS = {"python", "console", "bash", "yaml", "json", "text", "{toctree}", "{image}", "{eval-rst}"}
#: Programs of others, which are taken at their word.
OTHERS = {"cd", "export", "git", "hf", "wandb"}
#: Packages that `pip install` may name beside those of pyproject.toml: what litdata reads object storage with.
STORAGE = {"boto3", "obstore"}
#: Configs that an earlier run has saved, by the paths that the pages give them.
SAVED = {"outputs/reco/reco/RUN/config.yaml": "reco"}

BLOCKS = {page.name: blocks_of(page) for page in PAGES}
each_page = pytest.mark.parametrize("page", BLOCKS)


def fences(*kinds: str) -> Any:
    chosen = [block for blocks in BLOCKS.values() for block in blocks if block.kind in kinds]
    return pytest.mark.parametrize("block", chosen, ids=[block.place for block in chosen])


def is_cheap(words: list[str]) -> bool:
    """Whether a command of `reco` is run: those that encode or sample with a tiny network, and those that print."""
    at_hand = {"vqvae.ckpt", "larp-tokenizer"} & set(words)
    return words[0] in ("tokenize", "generate") and bool(at_hand) and "DIR" not in words


def only_prints(words: list[str]) -> bool:
    return words[0] == "recipes" or words[-1] in ("--help", "--version")


# -- a process for each page


class Runner:
    """Takes the steps of a page in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = clean_environment(
            PYTHONPATH=str(ROOT),
            WANDB_MODE="offline",
            HF_HUB_OFFLINE="1",
            MPLBACKEND="agg",
            XDG_CACHE_HOME=str(folder / "cache"),
        )

    def succeed(self, folder: Path, steps: list[list[Any]]) -> None:
        """Fails with the whole output where a step does."""
        if output := self(folder, steps):
            pytest.fail(output, pytrace=False)

    def __call__(self, folder: Path, steps: list[list[Any]]) -> str:
        """What goes wrong when the steps are taken in the folder."""
        request = Path(f"{folder}.json")
        request.write_text(json.dumps(steps))
        with forked("tests.helpers.run_pages", request, environment=self.environment, folder=folder) as processes:
            text = finish(processes, 300)
        (process,) = processes
        return "" if process.returncode == 0 and DONE in text else text[-6000:] or f"ended with {process.returncode}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def files(run: Runner) -> Path:
    folder = run.folder / "files"
    folder.mkdir()
    code = "from tests.helpers.page_files import save_all; save_all()"
    run.succeed(folder, [["python", code, "files", 1]])
    return folder


def sessions(page: str) -> Iterator[list[list[Any]]]:
    """What runs on a page, as the steps of one process each."""
    steps = []
    for block in BLOCKS[page]:
        if block.kind == "python":
            steps.append(["python", block.code, block.page, block.line])
        elif block.kind == "console":
            words = [reco_words(command) for command in command_lines(block)]
            steps += [["run", line] for line in words if line and is_cheap(line)]
    yield from [[step] for step in steps] if page == "README.md" else [steps] if steps else []


RUNS = [(page, number, steps) for page in BLOCKS for number, steps in enumerate(sessions(page))]


@pytest.mark.parametrize(("page", "steps"), [run[::2] for run in RUNS], ids=[f"{page}-{n}" for page, n, _ in RUNS])
def test_python_blocks_and_cheap_commands_run(
    page: str, steps: list[list[Any]], run: Runner, files: Path, tmp_path: Path
) -> None:
    shutil.copytree(files, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    run.succeed(tmp_path, steps)


def test_every_python_block_runs() -> None:
    shown = [block.place for blocks in BLOCKS.values() for block in blocks if block.kind == "python"]
    assert len(shown) > 30
    assert shown == [f"{step[2]}:{step[3]}" for _, _, steps in RUNS for step in steps if step[0] == "python"]


# -- commands and configs, read by the parsers of `reco`


def config_steps(block: Block, path: Path) -> list[list[Any]]:
    """How a block of YAML is read: what `reco fit` takes, a study's plan, or a row of a table of recipes."""
    content = yaml.safe_load(block.code)
    if block.file:
        return []  # read by the commands that name it
    if "runs" in content:
        load_plan(str(path))
    elif content.keys() <= {"trainer", "model", "data", "ckpt_path"}:
        videos = content.get("data", {}).get("class_path", "").endswith("VideoDataModule")
        return [["parse", ["fit", "--config", f"recipe:{'vqvae' if videos else 'reco'}", "--config", path.name]]]
    else:
        rows = {f"{table}/{name}": row for table, shown in tables().items() for name, row in shown["rows"].items()}
        for name, row in content.items():
            assert any(path.endswith(f"/{name}") and row == rows[path] for path in rows), name
    return []


@each_page
def test_commands_and_configs_are_understood(page: str, run: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    steps = []
    for path, recipe in SAVED.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(yaml.safe_dump(options_for(load_recipe(recipe), "fit")))
    for block in BLOCKS[page]:
        if block.kind == "yaml" or block.file:
            path = folder / (block.file or f"block-{block.line}.yaml")
            assert not path.exists(), f"{block.place}: {block.file} is there already"
            path.write_text(block.code)
        if block.kind == "yaml":
            steps += config_steps(block, path)
    for block in BLOCKS[page]:
        for command in command_lines(block) if block.kind in ("console", "bash") else []:
            if words := reco_words(command):
                steps.append(["run" if only_prints(words) else "parse", words])
            else:
                check_other(command, folder)
    run.succeed(folder, steps)


def check_other(command: list[str], folder: Path) -> None:
    """What can be said of a command of somebody else's: scripts, targets of make and packages have to be there."""
    program, *words = command
    if program in ("python", "torchrun"):
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file() or (folder / script).is_file(), script
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words:
            name, equals, _ = word.partition("=")
            assert re.search(rf"^{name} \?=" if equals else rf"^{name}:", makefile, re.MULTILINE), word
    elif program == "pip":
        check_packages([word for word in words[1:] if not word.startswith("-")])
    else:
        assert program in OTHERS, f"{program}: add it to OTHERS, or check it"


def check_packages(packages: list[str]) -> None:
    extras = project()["optional-dependencies"]
    required = [
        re.match(r"[\w-]+", line)[0] for group in (project()["dependencies"], *extras.values()) for line in group
    ]
    for package in packages:
        name, *named = re.findall(r"[\w-]+", package)
        assert name in {project()["name"], *required, *STORAGE}, package
        assert set(named) <= extras.keys() if name == project()["name"] else not named, package


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@each_page
def test_files_that_a_page_makes_are_named_in_its_commands(page: str) -> None:
    blocks = BLOCKS[page]
    commands = [w for b in blocks if b.kind in ("console", "bash") for command in command_lines(b) for w in command]
    for block in blocks:
        if block.file:
            assert any(word.startswith(block.file.removesuffix(".py")) for word in commands), block.place


@each_page
def test_recipes_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / ("" if page == "README.md" else "docs") / page).read_text()
    for name in re.findall(r"recipe:([a-z0-9_./-]*[a-z0-9])", text):
        load_recipe(name)
    for name in re.findall(r"`(table\d/[a-z0-9.-]+)`", text):
        assert name in recipe_names()


# -- what else stands in a block


@each_page
def test_every_block_is_of_a_known_kind(page: str) -> None:
    for block in BLOCKS[page]:
        assert block.kind.partition(" ")[0] in KINDS, f"{block.place}: {block.kind!r} is none of {sorted(KINDS)}"


@fences("json")
def test_json_loads(block: Block) -> None:
    for line in block.code.splitlines():
        json.loads(line)


@fences("console")
def test_console_begins_with_a_command(block: Block) -> None:
    assert block.code.startswith("$ ")


def test_every_fence_of_every_page_is_seen() -> None:
    rows = sum(len(re.findall(r"^\s*(?:```|~~~)", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert rows == 2 * sum(map(len, BLOCKS.values()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list\n  ```python\n  1\n  ```\n", "page.md:2: a block has to begin with ``` and no space before it"),
        ("~~~python\n1\n~~~\n", "page.md:1: a block has to begin"),
        ("```python\n1\n", "page.md:2: the block never ends"),
    ],
)
def test_blocks_that_could_go_unseen_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        blocks_in(text)


def test_blocks_and_commands_are_read_as_a_reader_does() -> None:
    text = "a\n```console\n$ reco fit \\\n    --a 'b c'   # d\nprinted\n$ X=1 reco plan && cd e\n```\n```\nf\n```\n"
    console, bare = blocks_in(text)
    assert (console.line, console.kind, bare.kind, bare.code) == (3, "console", "", "f\n")
    assert command_lines(console) == [["reco", "fit", "--a", "b c"], ["reco", "plan"], ["cd", "e"]]
    assert reco_words(["srun", "python", "-m", "reco_lightning", "fit", "--a"]) == ["fit", "--a"]
    assert reco_words(["torchrun", "--standalone", "train.py"]) is None
    assert blocks_in("```yaml\n# mine.yaml\na: 1\n```\n")[0].file == "mine.yaml"


def test_what_goes_wrong_in_a_page_is_told(run: Runner, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    first = ["python", "import os\nos.environ['LEFT'] = '1'\nname = 1\n", "page.md", 3]
    assert run(folder, [first, ["python", "assert name == 1 and __name__ == '__main__'\n", "page.md", 9]]) == ""
    found = run(folder, [["python", "import os\nassert 'LEFT' not in os.environ\nname\n", "page.md", 9]])
    assert 'File "page.md", line 11' in found
    assert "NameError" in found
    found = run(folder, [["parse", ["generate", "--checkpoint", "a", "--no_such_option", "1"]]])
    assert "unrecognized arguments: --no_such_option" in found.lower()
    assert "exit status 2" in run(folder, [["run", ["recipes", "show", "no-such-recipe"]]])


# -- output that is shown


def shown(page: str, start: str) -> str:
    return next(block.code for block in BLOCKS[page] if block.kind == "text" and block.code.startswith(start))


def test_refusal_of_another_layout_is_the_one_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("abab"):
        path = tmp_path / "videos" / ("cats", "dogs")[number // 2] / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="root must hold") as refusal:
        VideoFolder("videos", frames=17, size=32, layout="sky", split="train")
    assert str(refusal.value).strip() == shown("data.md", "root must hold").strip()


def test_label_of_a_distance_is_of_the_form_shown() -> None:
    label = shown("fvd.md", "FrechetVideoDistance")
    assert f"| protocol {PROTOCOLS['styleganv'].describe()} |" in label


def test_commands_of_the_table_are_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    ([a-z0-9-]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "cli.md").read_text().split("## ")[0], re.MULTILINE)
    assert sorted(re.findall(r"`([a-z0-9-]+)`", " ".join(rows))) == sorted(listed)


def test_extras_of_the_table_are_those_of_the_package() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(project()["optional-dependencies"])


# -- links


@each_page
def test_links_between_files_hold(page: str) -> None:
    path = next(path for path in PAGES if path.name == page)
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text()):
        assert (path.parent / target).exists(), target
