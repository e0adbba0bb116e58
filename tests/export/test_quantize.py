"""Quantised checkpoints: what is in them, that they are whole or not there, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fluxkontext.bench.synthetic import TINY, write_checkpoint
from fluxkontext.export import quantize
from fluxkontext.export.calibration import Calibration
from fluxkontext.export.quantize import write_quantised
from fluxkontext.kernels import reference
from fluxkontext.runtime import CheckpointError, InvalidInputError, KontextPipeline
from fluxkontext.runtime.checkpoint import find, open_component
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.config import TransformerConfig
from fluxkontext.runtime.loading import load
from fluxkontext.runtime.models.quantised import quantise
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.recipes import RECIPES

CPU = torch.device("cpu")
BLOCKS = [
    *(f"double_blocks.0.{s}_{x}" for s in ("img", "txt") for x in ("attn.qkv", "attn.proj")),
    *(f"double_blocks.0.{s}_mlp.{i}" for s in ("img", "txt") for i in (0, 2)),
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
]
T5 = [
    f"encoder.block.{i}.layer.{layer}"
    for i in range(2)
    for layer in (
        *(f"0.SelfAttention.{x}" for x in "qkvo"),
        *(f"1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")),
    )
]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers that differ, for every layer of the smallest model."""
    file = tmp_path_factory.mktemp("calibration") / "amax.json"
    amax = {name: 1.5 + i for i, name in enumerate(BLOCKS)}
    Calibration("small", 100.0, amax, {}).write(file)
    return file


def quantised(model: Path, out: Path, recipe: str, calibration: Path) -> dict[str, Any]:
    file = calibration if RECIPES[recipe].static else None
    return write_quantised(find(model, {}), out, RECIPES[recipe].precision, recipe, file)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_format(recipe: str, small_model: Path, calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    facts = quantised(small_model, out, recipe, calibration)
    assert (facts["recipe"], facts["precision"]) == (recipe, RECIPES[recipe].precision)
    for part, make, layers in (
        ("transformer", lambda c: Flux(c, reference()), BLOCKS),
        ("text_encoder_2", T5Encoder, T5),
    ):
        plain = load(open_component(part, small_model / part), make, CPU, torch.float32)
        wanted = {name: t.bfloat16() for name, t in plain.state_dict().items()}
        form = "fp8" if part == "text_encoder_2" else RECIPES[recipe].precision
        for i, layer in enumerate(layers):
            matrix = plain.state_dict()[f"{layer}.weight"]
            wanted |= {f"{layer}.{kind}": t for kind, t in quantise(matrix, form).items()}
            if RECIPES[recipe].static and part == "transformer":
                scale = (1.5 + i) / (448 if form == "fp8" else 6 * 448)
                wanted[f"{layer}.input_scale"] = torch.tensor(scale)
        (file,) = (out / part).glob("*.safetensors")
        found = load_file(file)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name].float(), tensor.float()), name
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {
                "format": "pt",
                "fluxkontext.format": "1",
                "fluxkontext.recipe": recipe,
            }
        assert facts[part]["quantised"] == len(layers)
        assert facts[part]["bytes"] == file.stat().st_size
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = Path(part) / f"{name}.safetensors"
        assert (out / file).samefile(small_model / file)  # a hard link
    assert files_of(small_model).keys() <= files_of(out).keys()
    assert (out / "calibration.json").exists() == RECIPES[recipe].static


def test_tensors_are_aligned_and_the_file_has_no_gaps(small_model: Path, tmp_path: Path) -> None:
    write_quantised(find(small_model, {}), tmp_path / "out", "fp8")
    file = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    ends = sorted(entry["data_offsets"] for entry in entries)
    assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]
    assert start % 8 == 0
    assert ends[-1][1] == len(data) - start
    for entry in entries:
        assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_bytes_twice(
    recipe: str, small_model: Path, calibration: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        quantised(small_model, tmp_path / name, recipe, calibration)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_layers_of_odd_widths_stay(tmp_path: Path) -> None:
    """T5's widths here are no multiples of 16 in part."""
    spec = replace(TINY, text_encoder_2=replace(TINY.text_encoder_2, d_ff=120))
    write_checkpoint(tmp_path / "model", spec)
    write_quantised(find(tmp_path / "model", {}), tmp_path / "out", "fp8")
    state = load_file(tmp_path / "out" / "text_encoder_2" / "model.safetensors")
    layer = "encoder.block.0.layer.1.DenseReluDense"
    assert state[f"{layer}.wi_0.weight"].dtype == torch.float8_e4m3fn
    assert state[f"{layer}.wo.weight"].dtype == torch.bfloat16  # takes 120 columns
    assert f"{layer}.wo.weight_scale" not in state
    with KontextPipeline.from_pretrained(tmp_path / "out", device="cpu") as pipe:
        assert pipe.about["recipe"] == "fp8-dynamic"


def test_single_files_become_a_folder(
    hub_like_single: dict[str, Path], small_model: Path, tmp_path: Path
) -> None:
    """Configs are written from the shapes; the pictures are those of the folder."""
    parts = {k: v for k, v in hub_like_single.items() if k != "model"}
    write_quantised(find(hub_like_single["model"], parts), tmp_path / "single", "nvfp4")
    write_quantised(find(small_model, {}), tmp_path / "folder", "nvfp4")
    call: dict[str, Any] = {"prompt": "a", "seed": 0, "num_inference_steps": 1}
    call |= {"output_type": "latent", "height": 64, "width": 64, "max_area": 64 * 64}
    results = []
    for name in ("single", "folder"):
        with KontextPipeline.from_pretrained(tmp_path / name, device="cpu") as pipe:
            results.append(pipe(**call).images[0])
    assert (results[0] == results[1]).all()


@pytest.fixture
def hub_like_single(small_model: Path, tmp_path: Path) -> dict[str, Path]:
    """The smallest model in single files, beside a config that is another's."""
    from safetensors.torch import save_file

    folder = tmp_path / "files"
    folder.mkdir()
    component = open_component("transformer", small_model / "transformer")
    flux = load(component, lambda c: Flux(c, reference()), CPU, torch.float32)
    save_file(dict(flux.state_dict()), folder / "flux.safetensors")
    shutil.copy(small_model / "vae" / "config.json", folder)
    folders = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return {"model": folder / "flux.safetensors"} | {part: small_model / part for part in folders}


# refusals


def test_a_quantised_input_is_refused(small_model: Path, tmp_path: Path) -> None:
    write_quantised(find(small_model, {}), tmp_path / "once", "fp8")
    with pytest.raises(CheckpointError, match=r"expected plain weights .* found fp8-dynamic"):
        write_quantised(find(tmp_path / "once", {}), tmp_path / "twice", "nvfp4")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("precision", "recipe", "with_file", "message"),
    [
        ("fp4", None, False, "precision: expected one of fp8, nvfp4, found 'fp4'"),
        ("fp8", "nvfp4-w4a16", False, "recipe: expected one of fp8-dynamic, fp8-static for fp8"),
        ("fp8", "fp8-static", False, "fluxkontext calibrate MODEL -o FILE"),
        ("nvfp4", "nvfp4-w4a4", False, "fluxkontext calibrate MODEL -o FILE"),
        ("fp8", None, True, "calibration: expected none for fp8-dynamic"),
    ],
)
def test_what_does_not_go_together(
    precision: str,
    recipe: str | None,
    with_file: bool,
    message: str,
    small_model: Path,
    calibration: Path,
    tmp_path: Path,
) -> None:
    file = calibration if with_file else None
    with pytest.raises(InvalidInputError) as caught:
        write_quantised(find(small_model, {}), tmp_path / "out", precision, recipe, file)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "expected a calibration of schema_version 1, found 2"),
        ({"amax": None}, "expected positive numbers in amax, found NoneType"),
        ({"amax": {"a": 0}}, "found a: 0"),
        ({"amax": {"a": "1"}}, "found a: '1'"),
        ({"amax": {"a": True}}, "found a: True"),
        ({"amax": {"single_blocks.0.linear1": 1.0}}, "found none for double_blocks.0"),
        ({"percentile": []}, "expected percentile to be a number"),
    ],
)
def test_calibrations_that_cannot_be_used(
    change: dict[str, Any], message: str, small_model: Path, calibration: Path, tmp_path: Path
) -> None:
    file = tmp_path / "amax.json"
    file.write_text(json.dumps(json.loads(calibration.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        quantised(small_model, tmp_path / "out", "fp8-static", file)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_calibration_that_is_not_there(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a JSON file, found none"):
        quantised(small_model, tmp_path / "out", "fp8-static", tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidInputError, match="does not exist"):
        write_quantised(find(small_model, {}), tmp_path / "out", "fp8")
    assert list((tmp_path / "out").iterdir()) == []


# interruption


def test_an_interrupted_run_leaves_nothing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "link_network", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_quantised(find(small_model, {}), tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


_SLOW = """
import sys, time
from pathlib import Path
from fluxkontext.export import quantize
from fluxkontext.runtime.checkpoint import find
write = quantize.SafetensorsFile.write
def slow(self, name, tensor):
    write(self, name, tensor)
    print(name, flush=True)
    time.sleep(0.2)
quantize.SafetensorsFile.write = slow
quantize.write_quantised(find(sys.argv[1], {}), Path("out"), "fp8")
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_that_could_be_taken_for_whole(
    how: int, small_model: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """SIGKILL leaves a hidden folder, which the next run removes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(small_model)],
        env=namespace_env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(how)
    process.wait(timeout=60)
    process.stdout.close()
    left = list(tmp_path.iterdir())
    assert all(path.name.startswith(".out.") for path in left)
    assert how == signal.SIGKILL or not left
    write_quantised(find(small_model, {}), tmp_path / "out", "fp8")
    assert (tmp_path / "out" / "model_index.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# memory

_PEAK = """
import sys
from pathlib import Path
from fluxkontext.export.quantize import write_quantised
from fluxkontext.runtime.checkpoint import find
def private():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) * 1024
import threading, time
write_quantised(find(sys.argv[1], {}), Path("warm"), sys.argv[3])
before, peak, done = private(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
write_quantised(find(sys.argv[2], {}), Path("out"), sys.argv[3])
done.set(); thread.join()
print(peak[0] - before)
"""


def test_memory_is_that_of_a_layer(
    small_model: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """Of a model with 24 single blocks of 10 MB each, mapped files not counted."""
    transformer = TransformerConfig(
        hidden_size=384, num_heads=3, depth=1, depth_single_blocks=24, mlp_hidden=1536,
        context_in_dim=64, vec_in_dim=64,
    )  # fmt: skip
    write_checkpoint(tmp_path / "model", replace(TINY, transformer=transformer))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(small_model), str(tmp_path / "model"), "nvfp4"],
        env={**namespace_env, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    whole = (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").stat()
    largest = 7 * 384 * 384 * 4  # linear1 in float32
    peak = int(done.stdout)
    assert peak < 16 * largest
    assert peak < whole.st_size / 2


# command line


def test_command_line(
    small_model: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["quantize", str(small_model), "--precision", "fp8", "--json", "-o", out]
    static = [*command, "--recipe", "fp8-static"]
    assert main(static) == 2
    assert "fluxkontext calibrate MODEL -o FILE" in capsys.readouterr().err
    assert main([*static, "--calibration", str(calibration)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["checkpoint"], facts["recipe"]) == (out, "fp8-static")
    assert main(command) == 2
    assert main(["quantize", out, "--precision", "fp8", "-o", f"{out}2"]) == 3
    assert os.listdir(tmp_path) == ["out"]
