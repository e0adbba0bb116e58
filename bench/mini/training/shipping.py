"""Trained weights as a diffusers folder, and the sheet that tells where they come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint_writer import Spec, write_model
from .tokenizer_files import TOKENIZER_2_CLASS, write_tokenizers

MAX_BYTES = 20_000_000

_README = """---
license: apache-2.0
---

# A miniature Kontext

{parameters:.1f} million parameters, {megabytes:.1f} MB, in the layout of FLUX.1 Kontext [dev].
It edits the 128 x 128 scenes of `bench/mini` and knows their {words} words; of photographs it knows
nothing. It was trained from scratch, on pictures that `bench/mini` draws, by the recipe in
`bench/mini/README.md` (of several devices, with `torchrun --nproc-per-node` for `python`):

```
{commands}
python -m fluxkontext.bench.mini.train export --out RUN --to MODEL
fluxkontext export MODEL --weights copy --golden -o mini
```

## Stages

{stages}

## Scores

{scores}

## Licence

Apache License 2.0, as the rest of this project. No weights of FLUX.1 were used.
"""


def write_folder(folder: Path, spec: Spec, weights: Mapping[str, Tensor]) -> None:
    """Write weights, named ``<component>.<canonical name>``, as a diffusers folder in bf16.

    The folder must not exist. The reader, which only serves training, stays behind.
    """
    folder.mkdir(parents=True)
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        component, _, rest = name.partition(".")
        if component != "reader":
            networks.setdefault(component, {})[rest] = value
    write_model(folder, spec, networks, torch.bfloat16, TOKENIZER_2_CLASS)
    write_tokenizers(folder)


def write_readme(
    folder: Path,
    results: Mapping[str, Mapping[str, Any]],
    commands: list[str],
    scores: Mapping[str, Any] | None,
    words: int,
) -> None:
    """Write ``README.md`` beside the weights.

    results: of each stage. scores: the document of ``fluxkontext bench quality``, if there is one.
    """
    size = total_bytes(folder)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    text = _README.format(
        parameters=weights / 2e6,
        megabytes=size / 1e6,
        words=words,
        commands="\n".join(commands),
        stages=_table(results),
        scores=_scores(scores),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    if (size := total_bytes(folder)) > MAX_BYTES:
        raise ValueError(f"{folder}: expected at most {MAX_BYTES} bytes, found {size}")


def total_bytes(folder: Path) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| stage | steps | batch | minutes | device | seed | at its end |", "|" + "---|" * 7]
    for name, result in results.items():
        end = result.get("probe") or {k: result[k] for k in ("exact", "psnr") if k in result}
        figures = ", ".join(f"{k} {v}" for k, v in end.items())
        lines.append(
            f"| {name} | {result['steps']} | {result['batch']} | {result['seconds'] / 60:.1f} | "
            f"{result['processes']} x {result['device']} | {result['seed']} | {figures} |"
        )
    return "\n".join(lines)


def _scores(document: Mapping[str, Any] | None) -> str:
    if document is None:
        return "Not measured yet: `fluxkontext bench quality --model <this folder>`."
    runs = document["runs"]
    head = [f"{run['steps']} steps" for run in runs]
    lines = [
        f"Held-out requests, percent exact, by `fluxkontext bench quality` on the "
        f"{runs[0]['backend']} backend in {runs[0]['precision']}; PSNR of what an edit leaves "
        f"alone, at {head[0]}. Kinds and the score are those of `bench/mini`.",
        "",
        f"| | n | {' | '.join(head)} | PSNR, dB |",
        "|---|" + "--:|" * (len(runs) + 2),
    ]
    for name, row in runs[0]["summary"].items():
        exact = " | ".join(f"{run['summary'][name]['exact']:.1f}" for run in runs)
        ratio = "" if row["psnr_untouched"] is None else f"{row['psnr_untouched']:.1f}"
        lines.append(f"| {name} | {row['n']} | {exact} | {ratio} |")
    for run in runs:
        if run["chains"]["n"]:
            turns = ", ".join(f"{share:.0f}" for share in run["chains"]["exact"])
            lines += [
                "",
                f"Edits in a row, {run['steps']} steps: of {run['chains']['n']} chains, percent "
                f"all right after each turn: {turns}.",
            ]
    return "\n".join(lines)
