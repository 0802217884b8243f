# SPDX-License-Identifier: Apache-2.0
"""Files from strangers run no code when they are loaded: each holds a payload that would make a folder."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.core import saving

from reco_lightning import metrics
from reco_lightning.cli.entry_point import main
from reco_lightning.data.index.captions import read_captions
from reco_lightning.data.index.layouts import open_index
from reco_lightning.data.tokens.caption_ids import load_text_tokenizer
from reco_lightning.data.tokens.manifest import read_manifest
from reco_lightning.data.tokens.shards import TokenShards
from reco_lightning.data.tokens.writer import TokenShardWriter
from reco_lightning.experiments.methods import load_method
from reco_lightning.experiments.study.plan import load_plan
from reco_lightning.metrics.moments import load_moments
from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.models.video_model import VideoModel
from reco_lightning.pipelines.predict.requests import GenerationRequests
from reco_lightning.recipes import files as recipe_files
from reco_lightning.recipes.files import load_recipe
from reco_lightning.support.checkpoints import checkpoint_model, load_module
from reco_lightning.tokenizers import Emu3Tokenizer, LARPTokenizer, OmniTokenizer, VidTokTokenizer, load_tokenizer
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.bad_input.samples import model_file, text_network
from tests.helpers.checkpoints import save
from tests.helpers.tiny_tokenizers import emu3_network, save_larp, vidtok_network
from tests.helpers.words import save_words

PACKAGE = Path(__file__).parents[2] / "reco_lightning"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def trap(tmp_path):
    """The folder that a payload would make."""
    return tmp_path / "ran"


def as_zip(path, trap):
    torch.save({"state_dict": {}, "hyper_parameters": Payload(trap)}, path)


def as_legacy(path, trap):
    torch.save({"state_dict": Payload(trap)}, path, _use_new_zipfile_serialization=False)


def as_pickle(path, trap):
    path.write_bytes(pickle.dumps({"state_dict": Payload(trap)}, protocol=2))


def as_array(path, trap):
    with path.open("wb") as file:
        np.save(file, np.array([Payload(trap)], dtype=object), allow_pickle=True)


def as_arrays(path, trap):
    with path.open("wb") as file:
        payload = np.array([Payload(trap)], dtype=object)
        np.savez(file, about=payload, count=payload, total=payload)


def as_yaml(path, trap):
    path.write_text(f"trainer: !!python/object/apply:os.mkdir ['{trap}']\n")


CARRIERS = {
    "zip": (as_zip, lambda path: torch.load(path, weights_only=False)),
    "legacy": (as_legacy, lambda path: torch.load(path, weights_only=False)),
    "pickle": (as_pickle, lambda path: pickle.loads(path.read_bytes())),
    "array": (as_array, lambda path: np.load(path, allow_pickle=True)),
    "arrays": (as_arrays, lambda path: np.load(path, allow_pickle=True)["about"]),
}
TORCH, NUMPY = ("zip", "legacy", "pickle"), ("array", "arrays", "pickle")

LOADERS = {
    "checkpoint_model": (checkpoint_model, TORCH),
    "load_module": (lambda path: load_module(str(path), VideoModel), TORCH),
    "load_tokenizer": (load_tokenizer, TORCH),
    "OmniTokenizer": (OmniTokenizer.from_pretrained, TORCH),
    "load_i3d": (metrics.load_i3d, TORCH),
    "FrechetVideoDistance": (metrics.FrechetVideoDistance, TORCH),
    "TorchScriptFeatures": (metrics.TorchScriptFeatures, TORCH),
    "load_moments": (lambda path: load_moments(path, {}), NUMPY),
    "GenerationRequests-prefix": (lambda path: GenerationRequests(1, prefix=str(path)), NUMPY),
    "GenerationRequests-first_tokens": (lambda path: GenerationRequests(1, first_tokens=str(path)), NUMPY),
    "MotionManifest": (metrics.MotionManifest.load, ("pickle",)),
}


@pytest.mark.parametrize("kind", CARRIERS)
def test_the_payload_is_one(kind, tmp_path, trap):
    write, load_unsafely = CARRIERS[kind]
    write(tmp_path / "file.ckpt", trap)
    load_unsafely(tmp_path / "file.ckpt")
    assert trap.is_dir()


@pytest.mark.parametrize(("loader", "kind"), [(name, kind) for name, (_, kinds) in LOADERS.items() for kind in kinds])
def test_a_loader_refuses_the_file_and_runs_nothing(loader, kind, tmp_path, trap):
    path = tmp_path / "file.ckpt"
    CARRIERS[kind][0](path, trap)
    with pytest.raises(ValueError, match=r"file\.ckpt"):
        LOADERS[loader][0](path)
    assert not trap.exists()


@pytest.mark.parametrize("loader", [name for name, (_, kinds) in LOADERS.items() if kinds in (TORCH, NUMPY)])
def test_a_file_of_any_bytes_is_named(loader, tmp_path):
    path = tmp_path / "file.ckpt"

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.one_of(st.binary(), st.binary().map(lambda tail: b"\x80\x02" + tail), st.text().map(str.encode)))
    @example(b"runs:\n- method: reco\n")
    @example(b"PK\x03\x04")
    @example(b"\x93NUMPY\x01\x00")
    def is_named(content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.ckpt"):
            LOADERS[loader][0](path)

    is_named()


def test_a_checkpoint_that_would_run_code_is_told_by_what_it_holds(tmp_path, trap):
    as_zip(tmp_path / "a.ckpt", trap)
    with pytest.raises(ValueError, match=r"checkpoint must be .* got '.*a\.ckpt': it holds a posix.mkdir, and reading"):
        checkpoint_model(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["os.system", "nothing.at.all", "VideoModel", "os.path"])
def test_a_checkpoint_names_no_class_but_a_module(name, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"_class_path": name}}, path)
    with pytest.raises(ValueError, match=rf"checkpoint must hold .*{name}"):
        load_module(str(path), VideoModel)


# the last two are where Lightning looks for arguments that its older releases wrote
@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
def test_a_checkpoint_names_no_function_that_is_called(key, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "stranger", lambda *arguments: calls.append(arguments), raising=False)
    # Lightning before 2.6.6 has no list of functions that it calls
    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", {"os.stranger"}, raising=False)
    path = Path(save(VQVAE(codebook_size=4, width=8), tmp_path / "a.ckpt"))
    stored = torch.load(path, weights_only=True)
    named = {"_class_path": "reco_lightning.tokenizers.vqvae.VQVAE", "_instantiator": "os.stranger"}
    stored[key] = stored.get(key, {}) | named
    torch.save(stored, path)
    for read in (lambda: load_module(str(path), VQVAE), lambda: checkpoint_model(path)):
        with pytest.raises(
            ValueError, match=r"checkpoint must name no function but lightning.* got 'os\.stranger' in '.*a\.ckpt'"
        ):
            read()
    assert calls == []
    with contextlib.suppress(Exception):  # what comes of it is no module
        VQVAE.load_from_checkpoint(path)
    assert len(calls) == 1  # Lightning alone would have called it


@pytest.mark.parametrize("number", [0, 1], ids=["tokens", "table"])
def test_shards_of_objects_are_refused(number, tmp_path, trap):
    with TokenShardWriter(tmp_path / "shards", vocab_size=8, grid=(1, 1, 2)) as writer:
        writer.write(np.zeros((1, 1, 1, 2), np.int64))
    path = tmp_path / "shards" / read_manifest(tmp_path / "shards").files[number].file
    as_array(path, trap)
    about = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    about["shards"][0]["table" if number else "tokens"]["bytes"] = path.stat().st_size
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"{path.name} must be a .npy file of numbers"):
        TokenShards(tmp_path / "shards")[0]
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../outside.npy", "/etc/passwd", "a/b.npy", "a.pkl"])
def test_a_manifest_leads_to_no_other_file(name, tmp_path):
    with TokenShardWriter(tmp_path, vocab_size=8, grid=(1, 1, 2)) as writer:
        writer.write(np.zeros((1, 1, 1, 2), np.int64))
    about = json.loads((tmp_path / "manifest.json").read_text())
    about["shards"][0]["tokens"]["file"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"must name \.npy files beside it"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("load", [LARPTokenizer.from_pretrained, LARPTransformer.from_pretrained, load_tokenizer])
def test_a_larp_folder_whose_weights_are_a_pickle_is_refused(load, tmp_path, trap):
    folder = tmp_path / "larp"
    save_larp(folder)
    as_pickle(folder / "model.safetensors", trap)
    with pytest.raises(ValueError, match="larp"):
        load(folder)
    assert not trap.exists()


@pytest.mark.parametrize("carrier", [as_zip, as_pickle])
@pytest.mark.parametrize("kind", ["emu3", "vidtok"])
def test_a_folder_of_a_hub_with_a_pickle_for_weights_is_refused(kind, carrier, tmp_path, trap):
    network, load, name = {
        "emu3": (emu3_network, Emu3Tokenizer.from_pretrained, "pytorch_model.bin"),
        "vidtok": (vidtok_network, VidTokTokenizer.from_pretrained, "diffusion_pytorch_model.bin"),
    }[kind]
    network().save_pretrained(tmp_path / "hub")
    for weights in (tmp_path / "hub").glob("*.safetensors"):
        weights.unlink()
    carrier(tmp_path / "hub" / name, trap)
    with pytest.raises((ValueError, OSError)):
        load(tmp_path / "hub")
    assert not trap.exists()


def test_code_beside_the_weights_of_a_hub_is_not_run(tmp_path, trap):
    network = emu3_network()
    network.save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own.Emu3VQVAE", "AutoConfig": "own.Emu3VQVAEConfig"}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hub" / "own.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    assert Emu3Tokenizer.from_pretrained(tmp_path / "hub").codebook_size == network.config.codebook_size
    assert not trap.exists()


class Program(torch.nn.Module):
    """Makes a file when it is loaded: TorchScript calls `__setstate__` then."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.seen = torch.zeros(1)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips + self.seen.sum()

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.target, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        self.seen = torch.from_file(state[0], True, 4)


@pytest.mark.parametrize(
    "load",
    [
        lambda path: metrics.fvd_extractor(path, "styleganv"),
        metrics.FrechetVideoDistance,
        metrics.load_i3d,
        load_tokenizer,
        checkpoint_model,
    ],
)
def test_a_torchscript_program_is_refused_and_not_run(load, tmp_path, trap):
    path = tmp_path / "program.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises torch.export, and torch.load says what it sees
        torch.jit.script(Program(str(trap))).save(path)
        with pytest.raises(ValueError, match=r"program\.pt"):
            load(path)
        assert not trap.exists()
        torch.jit.load(path)
    assert trap.exists()  # it would have run


def test_a_folder_of_a_language_model_runs_no_code(tmp_path, trap):
    text_network().language_model.save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hub" / "own.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    TextVideoNetwork(6, (2, 1, 2), pretrained=str(tmp_path / "hub")).build()
    assert not trap.exists()


def test_a_folder_of_a_text_tokenizer_runs_no_code(tmp_path, trap):
    folder = Path(save_words(tmp_path / "words", ["a"]))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    assert load_text_tokenizer(str(folder))(["a"]).input_ids == [[0]]
    assert not trap.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\0\1"])
def test_a_broken_folder_of_transformers_is_named(content, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer must be a folder of transformers .*{tmp_path.name}"):
        load_text_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=f"pretrained must be a folder of transformers .*{tmp_path.name}"):
        TextVideoNetwork(6, (2, 1, 2), pretrained=str(tmp_path))


def test_a_checkpoint_with_other_weights_is_refused_in_our_own_words(tmp_path):
    stored = torch.load(model_file(), weights_only=True)
    stored["state_dict"].popitem()
    torch.save(stored, tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"checkpoint must hold the arguments and weights of its VideoModel, got '.*a\."
    ):
        load_module(str(tmp_path / "a.ckpt"), VideoModel)


INDEXES = {
    "captions": lambda root, file: read_captions(file, files=["a.mp4"]),
    "list": lambda root, file: open_index(root, layout="list", index=file),
    "manifest": lambda root, file: open_index(root, layout="manifest", index=file),
    "msrvtt": lambda root, file: open_index(root, layout="msrvtt", index=file),
    "ucf101": lambda root, file: open_index(root, layout="ucf101", index=file),
}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2", b'{"path": 3}', b"3", b'{"videos": 3}', b"{}", b"\0"])
@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_of_anything_is_named(kind, content, tmp_path):
    (tmp_path / "v_Archery_g01_c01.avi").touch()
    for name in ("index.txt", "index.csv"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.(txt|csv)"):
            INDEXES[kind](tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "load",
    [load_recipe, load_method, load_plan],
)
def test_a_recipe_with_a_python_tag_is_refused(load, tmp_path, trap):
    as_yaml(tmp_path / "own.yaml", trap)
    with pytest.raises(ValueError, match=r"own\.yaml"):
        load(str(tmp_path / "own.yaml"))
    assert not trap.exists()


@pytest.mark.parametrize("command", ["fit", "tokenize", "generate"])
def test_a_config_with_a_python_tag_runs_nothing(command, tmp_path, trap, capsys):
    as_yaml(tmp_path / "own.yaml", trap)
    with pytest.raises(SystemExit) as left:
        main([command, f"--config={tmp_path / 'own.yaml'}"])
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not trap.exists()


@pytest.mark.parametrize(
    "args",
    [["generate", "--checkpoint=FILE"], ["fit", "--ckpt_path=FILE"], ["validate", "--ckpt_path=FILE"]],
    ids=" ".join,
)
def test_a_checkpoint_on_the_command_line_runs_nothing(args, tmp_path, trap, capsys):
    as_zip(tmp_path / "a.ckpt", trap)
    with pytest.raises(SystemExit) as left:
        main([arg.replace("FILE", str(tmp_path / "a.ckpt")) for arg in args])
    assert left.value.code == 2
    assert "a.ckpt" in capsys.readouterr().err.splitlines()[-1]
    assert not trap.exists()


def calls():
    """Every call in the package: its file, its dotted name, and its keyword arguments as text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                options = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), options


@pytest.mark.slow
def test_no_call_of_the_package_can_run_code_in_a_file():
    found = list(calls())
    assert {options.get("weights_only") for _, name, options in found if name == "torch.load"} == {"True"}
    arrays = {options.get("allow_pickle", "False") for _, name, options in found if name == "np.load"}
    assert arrays == {"False"}  # which is NumPy's default
    assert {file for file, name, _ in found if name.endswith("jit.load")} == {"metrics/features.py"}
    assert {options["trust_remote_code"] for _, _, options in found if "trust_remote_code" in options} <= {"False"}
    assert {(file, options["Loader"]) for file, name, options in found if name == "yaml.load"} == {
        ("recipes/files.py", "_LOADER")
    }
    assert issubclass(recipe_files._LOADER, (yaml.CSafeLoader, yaml.SafeLoader))
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "eval", "exec"}
    assert {name for _, name, _ in found} & forbidden == set()
