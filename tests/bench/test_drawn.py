"""Models of random weights: as large as what they stand for, and the same every time."""

from pathlib import Path

import numpy as np
import pytest

from fluxkontext.bench.drawn import FULL, MODELS, Drawn
from fluxkontext.bench.models import opened
from fluxkontext.bench.scenarios import works
from fluxkontext.bench.synthetic import write_tokenizers
from fluxkontext.runtime import KontextPipeline

from ..conftest import small_spec


def test_the_full_model_has_the_published_size() -> None:
    """Parameters of FLUX.1 [dev]: 11.90 billion in the denoiser, 4.76 in T5, 0.12 in CLIP, 0.08 in
    the VAE."""
    assert MODELS["full"].spec is FULL
    assert MODELS["full"].facts()["parameters"] == pytest.approx(16.87e9, rel=0.002)


def test_drawn_weights_in_files_are_those_that_are_drawn_at_load(tmp_path: Path) -> None:
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    with opened(None, small) as model:
        assert model.facts["synthetic"]
        with (
            KontextPipeline.from_pretrained(model.path, backend="native", device="cpu") as read_in,
            small.pipeline(read_in.about["precision"], "cpu") as at_load,
        ):
            work = works(["edit"], at_load.grid, [2], [1])[0]
            pictures = [pipe(**work.arguments()).images[0] for pipe in (read_in, at_load)]
    np.testing.assert_array_equal(*map(np.asarray, pictures))


def test_drawn_weights_depend_on_nothing_but_their_names() -> None:
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    pictures = []
    for _ in range(2):
        with small.pipeline("fp32", "cpu") as pipe:
            (work,) = works(["edit"], pipe.grid, [2], [1])
            pictures.append(pipe(**work.arguments()).images[0].tobytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) > 50  # noise, and not one grey
