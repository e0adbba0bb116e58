"""Checkpoints that are incomplete, damaged or of something else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxkontext.kernels import reference
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.checkpoint import KINDS, PARTS, find, open_component
from fluxkontext.runtime.config import ClipConfig, VaeConfig
from fluxkontext.runtime.inspection import inspect
from fluxkontext.runtime.loading import load
from fluxkontext.runtime.models.clip import ClipText
from fluxkontext.runtime.models.transformer import Flux

from .json_files import change
from .problems import problem_of


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def single_file(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer alone, in BFL's names."""
    component = open_component("transformer", small_model / "transformer")
    module = load(component, lambda c: Flux(c, reference()), torch.device("cpu"), torch.float32)
    file = tmp_path_factory.mktemp("single") / "flux1-kontext-dev.safetensors"
    save_file(dict(module.state_dict()), file)
    return file


# what is not there


@pytest.mark.parametrize("name", ["", "nothing", "no/such/path/at/all", "a b/c", "x" * 5000])
def test_no_model_of_that_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "expected" in problem_of(lambda: KontextPipeline.from_pretrained(name))


def test_a_folder_that_is_not_a_model(tmp_path: Path) -> None:
    problem = problem_of(lambda: KontextPipeline.from_pretrained(tmp_path))
    assert problem == (
        f"{tmp_path}: expected a diffusers folder (with model_index.json), found one without"
    )


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "Flux2Pipeline", None, 3, ["Flux"]])
def test_a_folder_of_another_model(model: Path, kind: object) -> None:
    change(model / "model_index.json", _class_name=kind)
    assert "this runtime is for FLUX.1" in problem_of(lambda: find(model, {}))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_named(model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    assert str(model / part) in problem_of(lambda: KontextPipeline.from_pretrained(model))


@pytest.mark.parametrize("part", KINDS)
def test_weights_that_are_missing_are_named(model: Path, part: str) -> None:
    next((model / part).glob("*.safetensors")).unlink()
    problem = problem_of(lambda: KontextPipeline.from_pretrained(model))
    assert f"{model / part}: expected one safetensors file or an index, found none" in problem


@pytest.mark.parametrize("part", PARTS)
def test_a_part_may_lie_elsewhere(model: Path, small_model: Path, part: str) -> None:
    shutil.rmtree(model / part)
    for source in (small_model, small_model / part):  # the model that has it, or its own folder
        if part != "transformer":
            KontextPipeline.from_pretrained(model, device="cpu", **{part: source}).close()


@pytest.mark.parametrize(
    ("part", "file", "own"),
    [
        ("vae", "diffusion_pytorch_model.safetensors", {"scaling_factor": 0.5}),
        ("text_encoder", "model.safetensors", {"eos_token_id": 99}),
        ("text_encoder_2", "model.safetensors", {"relative_attention_max_distance": 64}),
        ("tokenizer", "vocab.json", {}),
        ("tokenizer_2", "tokenizer.json", {}),
    ],
)
def test_a_file_may_stand_for_its_folder(
    model: Path, part: str, file: str, own: dict[str, object]
) -> None:
    """A network's weights have their configuration beside them, a tokenizer its other files."""
    if own:
        change(model / part / "config.json", **own)
    found, wanted = (find(model, parts) for parts in ({part: model / part / file}, {}))
    assert (found.tokenizer, found.tokenizer_2) == (wanted.tokenizer, wanted.tokenizer_2)
    for network in KINDS:
        assert getattr(found, network).config == getattr(wanted, network).config


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"architectures": 3}', None])
def test_what_lies_beside_a_file_may_be_of_something_else(model: Path, content: str | None) -> None:
    """Its settings are then those of FLUX, which inspect does not tell as the file's."""
    other = (model / "text_encoder_2" / "config.json").read_text()
    files = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    parts = {part: model / part / file for part, file in files.items()}
    for file in parts.values():
        file.with_name("config.json").write_text(content or other)
    vae, clip = (open_component(part, file).config for part, file in parts.items())
    assert vae == VaeConfig()
    assert clip.eos_token_id == ClipConfig().eos_token_id
    told = {part: inspect(file)["networks"][part] for part, file in parts.items()}
    assert "config" not in told["vae"]
    assert told["text_encoder"]["config"]["hidden_size"] == clip.hidden_size
    assert "num_attention_heads" not in told["text_encoder"]["config"]


def test_a_configuration_is_named_where_it_lies(model: Path) -> None:
    file = model / "text_encoder" / "config.json"
    change(file, hidden_size=0)
    for part in (file.parent, file.with_name("model.safetensors")):
        problem = problem_of(lambda: open_component("text_encoder", part))  # noqa: B023
        assert problem.startswith(f"{file}: expected hidden_size")


def test_a_single_file_lists_exactly_what_it_lacks(single_file: Path, small_model: Path) -> None:
    problem = problem_of(lambda: KontextPipeline.from_pretrained(single_file))
    assert problem == (
        f"{single_file}: expected a whole model, found a single file without vae, text_encoder, "
        "text_encoder_2, tokenizer, tokenizer_2; name a folder or file for each with --vae, "
        "--text-encoder, --text-encoder-2, --tokenizer, --tokenizer-2"
    )
    parts: dict[str, Any] = {part: small_model for part in PARTS[1:] if part != "tokenizer_2"}
    problem = problem_of(lambda: KontextPipeline.from_pretrained(single_file, **parts))
    assert problem == (
        f"{single_file}: expected a whole model, found a single file without tokenizer_2; "
        "name a folder or file for each with --tokenizer-2"
    )
    KontextPipeline.from_pretrained(
        single_file, **parts, tokenizer_2=small_model, device="cpu"
    ).close()


def test_a_single_file_of_something_else(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({"lora.up": torch.ones(2), "lora.down": torch.ones(2)}, file)
    assert "found tensors lora." in problem_of(lambda: KontextPipeline.from_pretrained(file))
    vae = next((small_model / "vae").glob("*.safetensors"))
    assert "expected a FLUX transformer" in problem_of(lambda: find(vae, {}))
    assert "expected a vae" in problem_of(lambda: find(small_model, {"vae": file}))


def test_a_single_file_with_tensors_missing(
    single_file: Path, small_model: Path, tmp_path: Path
) -> None:
    state = load_file(single_file)
    for gone in [
        [name for name in state if name.startswith("double_blocks")],
        ["txt_in.weight"],
        ["single_blocks.0.linear1.weight", "double_blocks.0.img_attn.qkv.bias"],
    ]:
        file = tmp_path / "part.safetensors"
        save_file({name: t for name, t in state.items() if name not in gone}, file)
        parts: dict[str, Any] = dict.fromkeys(PARTS[1:], small_model)
        problem = problem_of(lambda: KontextPipeline.from_pretrained(file, **parts))  # noqa: B023
        assert "transformer: expected" in problem


# what is damaged


def test_a_damaged_shard_is_found_behind_an_index(model: Path) -> None:
    folder = model / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    names = sorted(state)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    KontextPipeline.from_pretrained(model, device="cpu").close()

    data = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(data[:-1])
    problem = problem_of(lambda: KontextPipeline.from_pretrained(model))
    assert f"{folder / 'two.safetensors'}: expected a whole safetensors file" in problem
    (folder / "two.safetensors").unlink()
    problem = problem_of(lambda: KontextPipeline.from_pretrained(model))
    assert "expected 2 shards, found no two.safetensors" in problem


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("transformer", "num_layers", 2),
        ("transformer", "num_single_layers", 0),
        ("transformer", "joint_attention_dim", 65),
        ("vae", "block_out_channels", [8, 8, 16, 32]),
        ("vae", "latent_channels", 8),
        ("text_encoder", "num_hidden_layers", 3),
        ("text_encoder", "vocab_size", 600),
        ("text_encoder_2", "d_ff", 64),
        ("text_encoder_2", "num_layers", 1),
    ],
)
def test_a_config_that_is_not_of_its_weights(
    model: Path, part: str, field: str, value: object
) -> None:
    change(model / part / "config.json", **{field: value})
    problem_of(lambda: KontextPipeline.from_pretrained(model))


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in KINDS),
        "tokenizer/vocab.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0", "[" * 100_000])
def test_damaged_json(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    folder = str((model / name).parent)
    assert folder in problem_of(lambda: KontextPipeline.from_pretrained(model))


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer/merges.txt"])
def test_a_tokenizer_with_half_its_files(model: Path, name: str) -> None:
    (model / name).unlink()
    problem = problem_of(lambda: KontextPipeline.from_pretrained(model))
    assert "expected vocab.json and merges.txt, or tokenizer.json, found neither" in problem


def test_a_tokenizer_of_another_encoder(small_model: Path) -> None:
    """Its ids would be out of the encoder's range in the middle of an edit."""
    problem = problem_of(
        lambda: KontextPipeline.from_pretrained(small_model, tokenizer_2=small_model / "tokenizer")
    )
    assert "expected at most the 128 tokens of its text encoder, found 514" in problem


def test_a_clip_tokenizer_longer_than_its_encoder(model: Path) -> None:
    change(model / "tokenizer" / "tokenizer_config.json", model_max_length=78)
    problem = problem_of(lambda: KontextPipeline.from_pretrained(model))
    assert "expected a model_max_length of at most 77" in problem


@pytest.mark.parametrize("length", [None, 1e30, True, "64", 1, 10**30])
def test_a_tokenizer_without_a_usable_length_has_the_usual_one(model: Path, length: object) -> None:
    change(model / "tokenizer_2" / "tokenizer_config.json", model_max_length=length)
    with KontextPipeline.from_pretrained(model, device="cpu") as pipe:
        assert pipe.tokenizer_2.model_max_length == 512


def test_networks_of_different_models(model: Path) -> None:
    """Each is whole; together they are no model."""
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    narrow = ClipText(ClipConfig.from_json(config | {"hidden_size": 32}))
    state = {f"text_model.{name}": tensor for name, tensor in narrow.state_dict().items()}
    save_file(state, model / "text_encoder" / "model.safetensors")
    change(model / "text_encoder" / "config.json", hidden_size=32)
    problem = problem_of(lambda: KontextPipeline.from_pretrained(model))
    assert "expected a text_encoder that gives the 64 features" in problem
    assert "found one that gives 32" in problem
