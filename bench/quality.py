"""How often edits come out exactly right: ``fluxkontext bench quality --out FOLDER``.

Runs held-out requests of every kind through the pipeline, the same with the same seeds for every
setting, and scores the pictures exactly (`bench/mini/score.py`). Writes ``quality.json`` with
every single score, ``document.json`` for reports, and, for every kind, a sheet of pictures: before,
after, expected.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..runtime import KontextPipeline
from ..runtime.about import VERSION
from ..runtime.commands.parsing import Parser, count
from ..runtime.errors import InvalidInputError
from ..runtime.files import whole_file
from .document import Json, result, write
from .document import document as common_document
from .environment import environment, git_state, git_warnings
from .measure import OtherLoad, throughput
from .mini.backdrops import CANVAS
from .mini.gallery import Entry, sheet
from .mini.instructions import EDIT_KINDS, KINDS, PAIR_KINDS, Sample
from .mini.requests import Answer, Settings, answer, draw_chains, draw_requests, follow
from .mini.scenes import render
from .mini.score import EditScore, chain_summary, compare, summary
from .models import opened
from .options import counts, several, whole
from .scenarios import Work

SCHEMA = 1
SUITE = ("quality", 1)
"""Name and version of the requests and of their scores."""
_FIELDS = ("exact", "changed_ok", "untouched_ok", "garbled", "psnr_untouched")
_TOGETHER = {"single": EDIT_KINDS, "two_image": PAIR_KINDS}
"""Rows of a summary over several kinds; a kind of its own has a row of its own."""
_SHOWN = 24  # pictures on a sheet

Answers = Mapping[str, Sequence[Answer]]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    requests = draw_requests(args.samples, args.seed, args.split, args.kinds)
    asked = _asked(args.seed, args.split, requests)
    reference = _read(args.against, asked) if args.against else None
    chains = draw_chains(args.chains, args.turns, args.seed, args.split)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "model": args.model,
        "samples": args.samples,
        "seed": args.seed,
        "split": args.split,
        "fluxkontext": VERSION,
        "machine": platform.machine(),
        "runs": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    load, rows, device = OtherLoad(), [], args.device
    with opened(args.model) as model:
        facts = model.facts
    git = git_state()
    for precision, pipe in _pipelines(args):
        for steps in args.steps:
            settings = Settings(steps, args.guidance, args.batch)
            run, answers = measure(pipe, requests, chains, settings, args.seed)
            document["runs"].append(run)
            rows.append(_row_of(run, pipe, args.seed))
            device = run["device"]
            if len(document["runs"]) == 1:
                write_sheets(args.out, answers)
            _print(f"{precision}, {steps} steps", run)
            document["summary"] = document["runs"][0]["summary"]
            document["comparisons"] = comparisons(document["runs"], reference)
            found = common_document(
                "quality",
                SUITE,
                git=git,
                command=["fluxkontext", "bench", "quality", *(argv or sys.argv[1:])],
                model=facts,
                environment=environment(device, None, None),
                warnings=[*git_warnings(git), *load.warnings()],
                results=rows,
            )
            with whole_file(args.out / "quality.json") as out:  # after each: the next may fail
                out.write(json.dumps(document).encode() + b"\n")
            write(found, args.out / "document.json")
    for line in document["comparisons"]:
        print(json.dumps(line))
    print(args.out / "quality.json", args.out / "document.json", sep="\n")
    return 0


def measure(
    pipe: KontextPipeline,
    requests: Mapping[str, Sequence[Sample]],
    chains: Sequence[Sequence[Sample]],
    settings: Settings,
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[Answer]]]:
    """One run: its part of the document, and the answers by kind."""
    turns = sum(map(len, chains))
    started = time.perf_counter()
    with tqdm(
        total=sum(map(len, requests.values())) + turns, unit="picture", leave=False, disable=None
    ) as bar:
        answers = {
            kind: answer(pipe, samples, settings, seed, bar.update)
            for kind, samples in requests.items()
        }
        right = follow(pipe, chains, settings, seed, bar.update) if chains else []
    run = {
        **{name: pipe.about[name] for name in ("backend", "device", "precision")},
        "steps": settings.steps,
        "guidance": settings.guidance,
        "batch": settings.batch,
        "seconds": round(time.perf_counter() - started, 2),
        "summary": summarise(answers),
        "chains": {"n": len(chains), "exact": chain_summary(right)},
        "scores": {
            kind: [[getattr(a.score, field) for field in _FIELDS] for a in given]
            for kind, given in answers.items()
        },
    }
    return run, answers


def _row_of(run: Mapping[str, Any], pipe: KontextPipeline, seed: int) -> Json:
    """A run as a result of a document. Contexts differ from request to request, so none is said."""
    work = Work("quality", (CANVAS, CANVAS), (), run["steps"], run["batch"], seed)
    pictures = sum(map(len, run["scores"].values()))
    return result(
        f"{run['backend']} {run['precision']}, {run['steps']} steps",
        work.scenario,
        {**work.parameters(pipe), "guidance": run["guidance"]},
        throughput=throughput(pictures, run["seconds"]) if not run["chains"]["n"] else None,
        quality=run["summary"],
    )


def summarise(answers: Answers) -> dict[str, dict[str, float | None]]:
    """Rows of figures: every kind, kinds together, and every sort of novelty."""
    rows: dict[str, dict[str, float | None]] = {}
    for name, kinds in _TOGETHER.items():
        if together := [a for kind in kinds for a in answers.get(kind, ())]:
            rows[name] = _row(together)
    rows |= {kind: _row(given) for kind, given in answers.items()}
    single = [a for kind in EDIT_KINDS for a in answers.get(kind, ())]
    for novelty in sorted({a.sample.novelty for a in single} - {""}):
        rows[f"single, new {novelty}"] = _row([a for a in single if a.sample.novelty == novelty])
    return rows


def _row(answers: Sequence[Answer]) -> dict[str, float | None]:
    return summary([""] * len(answers), [a.score for a in answers])["all"]


def comparisons(
    runs: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """What each run lost and gained: against another document's first run, or else our own. All
    answered the same requests."""
    first = reference["runs"][0] if reference else runs[0]
    found = []
    for run in runs:
        if run is first:
            continue
        for name, kinds in {**_TOGETHER, "all": KINDS}.items():
            chosen = [kind for kind in kinds if kind in run["scores"]]
            ours, theirs = (
                [EditScore(*row) for kind in chosen for row in each["scores"][kind]]
                for each in (first, run)
            )
            if ours:
                label = {k: run[k] for k in ("backend", "precision", "steps")}
                found.append({**label, "rows": name, **compare(ours, theirs)})
    return found


def write_sheets(folder: Path, answers: Answers) -> None:
    """A picture file for every kind: before, after and expected of some requests."""
    for kind, given in answers.items():
        entries = [
            Entry(
                a.sample.text,
                [*map(render, a.sample.contexts), a.picture, render(a.sample.target)],
                a.score.exact,
            )
            for a in given[:_SHOWN]
        ]
        sheet(entries).save(folder / f"{kind}.png")


def _pipelines(args: argparse.Namespace) -> Iterator[tuple[str, KontextPipeline]]:
    """The model in every setting asked for, one after the other."""
    for backend, precision in product(args.backend, args.precision):
        with KontextPipeline.from_pretrained(
            args.model, backend=backend, precision=precision, device=args.device, memo_entries=0
        ) as pipe:
            yield f"{pipe.about['backend']} {pipe.about['precision']}", pipe


def _asked(seed: int, split: str, by_kind: Mapping[str, Sequence[object]]) -> dict[str, object]:
    """What makes requests those that they are, by its name in a message. by_kind: these, or their
    scores."""
    samples = {f"samples of {kind}": len(each) for kind, each in by_kind.items()}
    return {"seed": seed, "split": split, **samples}


def _read(file: Path, asked: Mapping[str, object]) -> dict[str, Any]:
    """A document to compare with. Raises InvalidInputError for what is none, or answers others than
    the requests ``asked``."""
    try:
        document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{file}: expected a quality.json, found {error}") from None
    if document.get("schema") != SCHEMA or not document.get("runs"):
        raise InvalidInputError(
            f"{file}: expected a quality.json of schema {SCHEMA}, found another"
        )
    theirs = _asked(document["seed"], document["split"], document["runs"][0]["scores"])
    differ = [
        f"{what} {theirs.get(what, 'none')} instead of {asked.get(what, 'none')}"
        for what in {**asked, **theirs}
        if asked.get(what) != theirs.get(what)
    ]
    if differ:
        raise InvalidInputError(
            f"{file}: expected answers to the same requests, found {', '.join(differ)}; "
            "--seed, --split, --samples and --kinds have to be the same"
        )
    return document


def _print(title: str, run: Mapping[str, Any]) -> None:
    print(f"{title}: {run['seconds']} s on {run['device']}")
    print(f"  {'':28}{'n':>6}{'exact %':>9}{'garbled %':>11}{'PSNR dB':>9}")
    for name, row in run["summary"].items():
        ratio = "" if row["psnr_untouched"] is None else f"{row['psnr_untouched']:.1f}"
        print(f"  {name:28}{row['n']:6}{row['exact']:9.1f}{row['garbled']:11.1f}{ratio:>9}")
    if run["chains"]["n"]:
        print(f"  all right after each turn: {run['chains']['exact']}")


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(KINDS)}, found {unknown[0]}")
    return kinds


def _parser() -> Parser:
    parser = Parser("fluxkontext bench quality", description=__doc__.split(":")[0])
    parser.add_argument("--model", default="mini", help="a miniature (default: the one that ships)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--samples", type=count, default=112, help="per kind (default: %(default)s)"
    )
    parser.add_argument("--kinds", type=_kinds, default=KINDS, help="some of: " + ",".join(KINDS))
    parser.add_argument("--chains", type=whole, default=48, help="of edits in a row")
    parser.add_argument("--turns", type=count, default=10, help="of a chain")
    parser.add_argument("--steps", type=counts, default=[28], help="one or more: 28,8,4")
    parser.add_argument("--backend", type=several, default=["auto"])
    parser.add_argument("--precision", type=several, default=["auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--batch", type=count, default=16, help="pictures at once")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out")
    parser.add_argument("--against", type=Path, help="another quality.json to compare with")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
