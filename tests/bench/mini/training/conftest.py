"""A much smaller miniature, and a run of the whole recipe on it."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fluxkontext.bench.checkpoint_writer import Spec
from fluxkontext.bench.mini.train import main
from fluxkontext.bench.mini.training.editor import Editor
from fluxkontext.bench.mini.training.latents import Autoencoder
from fluxkontext.bench.mini.training.shipping import write_folder
from fluxkontext.bench.mini.training.spec import MINI
from fluxkontext.runtime.config import TransformerConfig, VaeConfig
from fluxkontext.runtime.models.vae import Vae

SPEC = Spec(
    transformer=TransformerConfig(
        hidden_size=64,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        context_in_dim=32,
        vec_in_dim=32,
        mlp_hidden=256,
        axes_dim=MINI.transformer.axes_dim,
    ),
    vae=VaeConfig(
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=MINI.vae.sample_size,
        force_upcast=False,
    ),
    text_encoder=replace(
        MINI.text_encoder,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
    ),
    text_encoder_2=replace(
        MINI.text_encoder_2, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2
    ),
    text_length=MINI.text_length,
)
QUICK = ["--device", "cpu", "--probe-samples", "4", "--ignore-gate"]


def run_stage(stage: str, folder: Path, *options: str) -> None:
    """Run a stage of the recipe in this process."""
    assert main([stage, "--out", str(folder), *QUICK, *options], SPEC) == 0


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all four stages, a few steps each; do not change it."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    run_stage("vae", folder, "--steps", "3", "--batch", "2")
    run_stage("t2i", folder, "--steps", "2", "--batch", "4")
    run_stage("edit", folder, "--steps", "2", "--batch", "8")
    run_stage("distill", folder, "--steps", "2", "--batch", "8")
    return folder


@pytest.fixture(scope="session")
def shipped(trained: Path) -> Path:
    """The same as a diffusers folder; do not change it."""
    folder = trained.parent / "model"
    run = ["export", "--out", str(trained), "--to", str(folder), "--ignore-gate"]
    assert main(run, SPEC) == 0
    return folder


@dataclass(frozen=True)
class Random:
    """Weights that all matter, as after training, and a diffusers folder of them.

    Those of a fresh model leave every block out; those after a few steps nearly so.
    """

    spec: Spec
    editor: Editor
    vae: Vae
    folder: Path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Random:
    torch.manual_seed(0)
    editor, vae = Editor(SPEC), Vae(SPEC.vae)
    for module in (editor, vae):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16().float()  # what the folder holds
    folder = tmp_path_factory.mktemp("models") / "random"
    weights = {**Autoencoder(vae).state_dict(), **editor.state_dict()}
    write_folder(folder, SPEC, weights)
    return Random(SPEC, editor.eval(), vae.eval(), folder)


if __name__ == "__main__":  # as a script, for torchrun
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main(sys.argv[1:], SPEC))
