"""The recipe in miniature: every stage, its gate, resuming, several processes, and what ships."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fluxkontext.bench.checkpoint_writer import meta_networks
from fluxkontext.bench.mini.instructions import draw_sample
from fluxkontext.bench.mini.scenes import render
from fluxkontext.bench.mini.train import main
from fluxkontext.bench.mini.training.batches import Batch
from fluxkontext.bench.mini.training.flow_stage import FlowStage
from fluxkontext.bench.mini.training.schedule import Budget, rate
from fluxkontext.bench.mini.training.shipping import total_bytes, write_readme
from fluxkontext.bench.mini.training.spec import MAX_MODEL_BYTES, MINI
from fluxkontext.runtime import KontextPipeline

from .conftest import QUICK, SPEC, Random, run_stage

STAGES = ("vae", "t2i", "edit", "distill")


def test_every_stage_leaves_its_records(trained: Path) -> None:
    for stage in STAGES:
        result = json.loads((trained / stage / "result.json").read_text())
        assert result["done"]
        lines = (trained / stage / "log.jsonl").read_text().splitlines()
        assert [json.loads(line).get("event") for line in lines] == ["start", "spent"]
        weights = load_file(trained / stage / "weights.safetensors")
        assert all(value.isfinite().all() for value in weights.values())
    vae = json.loads((trained / "vae" / "result.json").read_text())
    assert vae["scaling_factor"] > 0
    assert not vae["passed"]


def test_the_latents_are_normalised(trained: Path, shipped: Path) -> None:
    with KontextPipeline.from_pretrained(shipped, precision="fp32", device="cpu") as pipe:
        config = json.loads((shipped / "vae" / "config.json").read_text())
        vae = json.loads((trained / "vae" / "result.json").read_text())
        assert config["scaling_factor"] == vae["scaling_factor"]
        assert config["shift_factor"] == vae["shift_factor"]
        rng = np.random.default_rng(0)
        scenes = [draw_sample(rng, "add").target for _ in range(16)]
        tokens = torch.cat([pipe.backend.encode_image(render(scene)) for scene in scenes])
    assert abs(float(tokens.mean())) < 0.2
    assert 0.8 < float(tokens.std()) < 1.25


def test_no_transformer_before_the_vae_is_good(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["t2i", "--out", str(tmp_path), "--steps", "1", "--device", "cpu"], SPEC) == 1
    assert "found none" in capsys.readouterr().err
    assert main(["t2i", "--out", str(trained), "--steps", "1", "--device", "cpu"], SPEC) == 1
    assert "expected 99.0% of scenes exact" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a signal that nothing catches."""


def test_a_killed_run_goes_on_bit_by_bit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--steps", "4", "--batch", "8", "--dtype", "fp32", "--save-every", "0"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for part in ("vae", "t2i"):
            (tmp_path / name / part).symlink_to(trained / part)
    run_stage("edit", tmp_path / "whole", *options)
    losses = FlowStage.losses

    def interrupted(self: FlowStage, item: list[Batch], step: int) -> Iterator[Any]:
        if step == 3:
            raise Killed
        return losses(self, item, step)

    with monkeypatch.context() as patch:
        patch.setattr(FlowStage, "losses", interrupted)
        with pytest.raises(Killed):
            run_stage("edit", tmp_path / "killed", *options)
    assert not (tmp_path / "killed" / "edit" / "weights.safetensors").exists()
    run_stage("edit", tmp_path / "killed", *options)
    whole, killed = (
        load_file(tmp_path / name / "edit" / "weights.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_a_paused_run_goes_on_without_its_state(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(trained / "vae")
    options = ("--steps", "3", "--batch", "4")
    run_stage("t2i", tmp_path, *options, "--pause-after", "0.0000001")
    records = tmp_path / "t2i"
    paused = json.loads((records / "result.json").read_text())
    assert (paused["done"], paused["steps"]) == (False, 0)
    (records / "state.pt").unlink()
    run_stage("t2i", tmp_path, *options)
    assert json.loads((records / "result.json").read_text())["steps"] == 3
    run_stage("t2i", tmp_path, *options)
    assert (
        json.loads((records / "log.jsonl").read_text().splitlines()[-1])["event"] == "done already"
    )


def test_a_stage_goes_on_from_another_runs_weights(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("vae", "t2i"):
        (tmp_path / part).symlink_to(trained / part)
    start = trained / "edit" / "weights.safetensors"
    run_stage("edit", tmp_path, "--steps", "1", "--rate", "1e-12", "--begin", str(start))
    found = load_file(tmp_path / "edit" / "weights.safetensors")
    wanted, before = load_file(start), load_file(trained / "t2i" / "weights.safetensors")
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-9) for key in wanted)
    assert not all(torch.allclose(found[key], before[key], rtol=0, atol=1e-9) for key in wanted)
    nowhere = ["--begin", str(tmp_path / "nowhere"), *QUICK, "--steps", "1"]
    assert main(["distill", "--out", str(tmp_path), *nowhere], SPEC) == 1
    assert "expected weights to start from, found no file" in capsys.readouterr().err


def test_two_processes_with_torchrun(tmp_path: Path, namespace_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("conftest.py"))
    options = ["vae", "--out", str(tmp_path), *QUICK, "--steps", "2", "--batch", "4"]
    env = {**namespace_env, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, *options, "--workers", "1", "--probe-every", "0"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "vae" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "probe", "probe", "spent"]
    assert lines[0]["processes"] == 2
    assert (tmp_path / "vae" / "weights.safetensors").exists()


def test_the_rate_reaches_zero_when_the_budget_is_spent() -> None:
    for budget, at_end in ((Budget(steps=200), (200, 7.0)), (Budget(minutes=2.0), (9, 120.0))):
        assert budget.share(*at_end) == 1
        assert rate(at_end[0], budget.share(*at_end)) == 0
    assert rate(0, 0.0) < 0.02
    assert rate(500, 0.3) == 1
    assert 0.4 < rate(500, 0.7) < 0.6
    with pytest.raises(ValueError, match="either"):
        Budget()


def test_the_miniature_fits_its_budget() -> None:
    networks = meta_networks(MINI)
    parameters = sum(p.numel() for network in networks.values() for p in network.parameters())
    assert 2 * parameters <= MAX_MODEL_BYTES
    assert MINI.text_encoder.hidden_size == MINI.transformer.vec_in_dim
    assert MINI.text_encoder_2.d_model == MINI.transformer.context_in_dim


def test_what_ships_edits(trained: Path, shipped: Path) -> None:
    assert total_bytes(shipped) < 20_000_000
    assert any(
        name.startswith("reader.") for name in load_file(trained / "edit/weights.safetensors")
    )
    assert not (shipped / "reader").exists()
    readme = (shipped / "README.md").read_text()
    for stage in STAGES:
        assert f"bench.mini.train {stage} --out RUN --device cpu" in readme
        assert f"| {stage} | " in readme
    sample = draw_sample(np.random.default_rng(0), "move")
    with KontextPipeline.from_pretrained(shipped, device="cpu") as pipe:
        picture = pipe(render(sample.contexts[0]), sample.text, num_inference_steps=2, seed=0)
        assert picture.images[0].size == (128, 128)
        assert pipe.tokenizer_2.model_max_length == MINI.text_length
    with pytest.raises(FileExistsError):
        main(["export", "--out", str(trained), "--to", str(shipped), "--ignore-gate"], SPEC)


def test_the_sheet_tells_the_scores(tmp_path: Path) -> None:
    def run(steps: int, exact: float) -> dict[str, Any]:
        row = {"n": 9, "exact": exact, "psnr_untouched": 33.25}
        summary = {"single": row, "caption": {**row, "psnr_untouched": None}}
        about = {"steps": steps, "backend": "onnx", "precision": "fp32"}
        return {**about, "summary": summary, "chains": {"n": 4, "exact": [75.0, 50.0]}}

    document = {"runs": [run(28, 55.56), run(8, 44.44)]}
    write_readme(tmp_path, {}, ["first", "second"], document, 252)
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert "| | n | 28 steps | 8 steps | PSNR, dB |" in lines
    assert "| single | 9 | 55.6 | 44.4 | 33.2 |" in lines
    assert "| caption | 9 | 55.6 | 44.4 |  |" in lines
    assert (
        "Edits in a row, 8 steps: of 4 chains, percent all right after each turn: 75, 50." in lines
    )
    assert {"first", "second"} <= set(lines)


def test_diffusers_reads_what_ships(random_model: Random) -> None:
    from diffusers import FluxKontextPipeline

    sample = draw_sample(np.random.default_rng(0), "move")
    picture = render(sample.contexts[0])
    peer = FluxKontextPipeline.from_pretrained(random_model.folder, dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    size = {"height": 128, "width": 128, "max_area": 128 * 128}
    theirs = peer(
        image=picture[None] / np.float32(255),
        prompt=sample.text,
        num_inference_steps=2,
        guidance_scale=2.5,
        max_sequence_length=MINI.text_length,
        generator=torch.Generator().manual_seed(0),
        _auto_resize=False,
        **size,
    ).images[0]
    with KontextPipeline.from_pretrained(
        random_model.folder, backend="native", precision="fp32", device="cpu"
    ) as pipe:
        ours = pipe(picture, sample.text, num_inference_steps=2, seed=0, auto_resize=False, **size)
    difference = np.abs(np.asarray(ours.images[0], np.int16) - np.asarray(theirs, np.int16))
    assert difference.max() <= 1
