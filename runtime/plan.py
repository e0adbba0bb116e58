"""What lies where, so that an edit fits into a memory budget; no torch, no GPU, no weights read.

Placements are tried in order of what they cost, and the first that fits is the plan: so more memory
never gives a worse one. What a placement needs is :mod:`.memory_model`'s; :mod:`.placement` carries
a plan out.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from .errors import InvalidInputError, OutOfMemoryError
from .memory_model import CUDA, Activations, Overhead, Workload, activations
from .tensor_shapes import ModelShapes
from .weight_model import PRECISIONS, Weights, weigh

STAGES = ("text", "image", "begin", "denoise", "decode")
_SLOTS = 2
"""Staging buffers of a stream: one in use, one being filled."""


def gib(size: float) -> str:
    """``size`` bytes for a reader."""
    if not size:
        return "0"
    return f"{size / 2**30:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.2f} MiB"


@dataclass(frozen=True)
class Placement:
    """Where weights lie, and how an edit saves memory; the default is everything on the device.

    streamed_blocks: so many DiT blocks, spread evenly, pass through staging buffers at every step.
    tile: side in pixels of the VAE's tiles, 0 for its own rule. text_streamed: text encoders layer
    by layer. modulation_streamed: its weights pass by once an edit, before the steps. vae_on_host:
    a half of the VAE comes when it is used. graphs: CUDA graphs, which keep the memory of a step.
    """

    streamed_blocks: int = 0
    tile: int = 0
    text_streamed: bool = False
    modulation_streamed: bool = False
    vae_on_host: bool = False
    graphs: bool = False

    def on_host(self, blocks: Sequence[str]) -> dict[str, frozenset[str] | None]:
        """Groups of :data:`.weight_model.GROUPS` that live on the host -> which of ``blocks`` (in
        the order in which they run), or None for the whole group."""
        groups: dict[str, frozenset[str] | None] = {}
        if self.streamed_blocks:
            n, m = len(blocks), self.streamed_blocks
            chosen = (name for i, name in enumerate(blocks) if (i + 1) * m // n > i * m // n)
            groups["blocks"] = frozenset(chosen)
        if self.text_streamed:
            groups |= {"text": None, "lookup": None}
        if self.modulation_streamed:
            groups["modulation"] = None
        if self.vae_on_host:
            groups["vae"] = None
        return groups


@dataclass(frozen=True)
class Stage:
    """Bytes on the device at a stage's fullest moment. other: activations, what an edit keeps, the
    memory of captured graphs, and what the allocator wastes. fixed: of the device's libraries."""

    name: str
    weights: int
    staging: int
    other: int
    fixed: int

    @property
    def total(self) -> int:
        return self.weights + self.staging + self.other + self.fixed


@dataclass(frozen=True)
class Plan:
    """A placement and what it needs.

    host: bytes of weights that stay on the host, by group of :data:`.weight_model.GROUPS`; only
    groups that do. transfer: bytes that come from there for an edit whose prompts and pictures are
    new.
    """

    precision: str
    workload: Workload
    budget: int | None
    placement: Placement
    stages: tuple[Stage, ...]
    host: Mapping[str, int]
    transfer: int

    @property
    def peak(self) -> int:
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.budget is None or self.peak <= self.budget

    @property
    def reasons(self) -> list[str]:
        """What is not as it would be with memory enough, and what that saves and costs."""
        here = self.placement
        text = self.host.get("text", 0) + self.host.get("lookup", 0)
        size = {group: gib(held) for group, held in self.host.items()}
        told = (
            (
                here.streamed_blocks,
                f"{here.streamed_blocks} DiT blocks ({size.get('blocks')}) pass by at every step, "
                "and CUDA graphs cannot be",
            ),
            (here.tile, f"the VAE works in blended tiles of {here.tile} pixels"),
            (here.text_streamed, f"text encoders ({gib(text)}) pass by for every new prompt"),
            (
                here.modulation_streamed,
                f"modulation weights ({size.get('modulation')}) pass by before the steps",
            ),
            (here.vae_on_host, f"the VAE ({size.get('vae')}) comes by halves as it is used"),
        )
        return [text for holds, text in told if holds]


class Planner:
    """Plans for one model, precision and device."""

    def __init__(
        self,
        shapes: ModelShapes,
        precision: str,
        overhead: Overhead = CUDA,
        graphs: bool = True,
        plain: str = "bf16",
        upcast: Collection[str] = (),
    ) -> None:
        """graphs: whether steps run as CUDA graphs where there is room. plain: what the device
        computes in where ``precision`` quantises: ``fp32`` on a CPU, ``fp16`` before Ampere.
        upcast: precisions whose products are of copies in 16 bits there."""
        if precision not in PRECISIONS:
            raise InvalidInputError(
                f"precision: expected one of {', '.join(PRECISIONS)}, found {precision}"
            )
        self.shapes = shapes
        self.precision = precision
        self.overhead = overhead
        self.graphs = graphs
        self.plain = plain
        self.upcast = upcast

    @cached_property
    def weights(self) -> Weights:
        return weigh(self.shapes, self.precision, self.plain)

    @property
    def blocks(self) -> list[str]:
        """Names of the DiT's blocks in the order in which they run."""
        return list(self.weights.groups["blocks"])

    @property
    def tile(self) -> int:
        """Side in pixels of the VAE's tiles where they are small: half the native size, in steps
        whose overlap of a quarter is whole latents."""
        step = 4 * self.shapes.vae.downscale
        return max(self.shapes.vae.sample_size // 2 // step, 1) * step

    def plan(self, work: Workload, budget: int | None = None) -> Plan:
        """The cheapest placement that fits. Raises OutOfMemoryError, which says what would fit."""
        for plan in self.plans(work, budget):
            if plan.fits:
                return plan
        raise self.refusal(work, budget or 0)

    def plans(self, work: Workload, budget: int | None = None) -> Iterator[Plan]:
        """Every placement, in order of what it costs: first what costs an edit least.

        Going without graphs costs little (published for an L20, 28 steps: 0.1% in bf16, 0.7% in
        FP8; cache-dit, docs/user_guide/CUDA_GRAPH.md); the VAE's weights are small; modulation
        comes once an edit, text encoders once a prompt; tiles change pixels slightly; streamed
        blocks come at every step.
        """
        off_on = (False, True)
        tile = self.tile
        acts = {t: self._activations(work, t) for t in (0, tile)}
        for count, t, text, modulation, vae in product(
            range(len(self.blocks) + 1), (0, tile), off_on, off_on, off_on
        ):
            # a captured step cannot wait for copies
            for graphs in (True, False) if self.graphs and not count else (False,):
                placement = Placement(count, t, text, modulation, vae, graphs)
                yield self._evaluated(placement, acts[t], work, budget)

    def evaluate(self, placement: Placement, work: Workload, budget: int | None = None) -> Plan:
        """What ``placement`` needs for ``work``."""
        acts = self._activations(work, placement.tile)
        return self._evaluated(placement, acts, work, budget)

    def least(self, work: Workload) -> Plan:
        """The placement that needs the least memory."""
        return min(self.plans(work), key=lambda plan: plan.peak)

    def refusal(self, work: Workload, budget: int) -> OutOfMemoryError:
        """Why ``work`` does not fit into ``budget``, and what would."""
        least = self.least(work)
        (width, height), count = work.target, len(work.contexts)
        images = f"{count} context picture{'' if count == 1 else 's'}"
        batch = f", {work.batch} at once" if work.batch > 1 else ""
        return OutOfMemoryError(
            f"vram_budget: expected an edit of {width}x{height} with {images}{batch} to fit into "
            f"{gib(budget)}, found that it needs {gib(least.peak)} at {self.precision} with "
            f"everything streamed; use {self._what_fits(work, budget)}"
        )

    def _what_fits(self, work: Workload, budget: int) -> str:
        ways = []
        for precision in PRECISIONS[PRECISIONS.index(self.precision) + 1 :]:
            other = Planner(
                self.shapes, precision, self.overhead, self.graphs, self.plain, self.upcast
            )
            if other.weights.total < self.weights.total and other.least(work).peak <= budget:
                ways.append(precision)
                break
        if work.batch > 1 and self.least(replace(work, batch=1)).peak <= budget:
            ways.append("one image at once")
        if size := self._size_that_fits(work, budget):
            ways.append(f"{size[0]}x{size[1]}")
        return " or ".join(ways) or f"a budget of {gib(self.least(work).peak)}"

    def _size_that_fits(self, work: Workload, budget: int) -> tuple[int, int] | None:
        """The largest result of the same aspect, in sixteenths of the sides."""
        multiple = 2 * self.shapes.vae.downscale
        for sixteenths in range(15, 0, -1):
            width, height = (s * sixteenths // 16 // multiple * multiple for s in work.target)
            if not (width and height):
                return None
            if self.least(replace(work, target=(width, height))).peak <= budget:
                return width, height
        return None

    def _activations(self, work: Workload, tile: int) -> Activations:
        upcast = self.precision in self.upcast
        return activations(self.shapes, work, self.precision, tile, self.plain, upcast)

    def _evaluated(
        self, placement: Placement, acts: Activations, work: Workload, budget: int | None
    ) -> Plan:
        moved = self._moved(placement)
        sizes = {group: sum(units.values()) for group, units in moved.items()}
        vae = moved["vae"]
        staging = {
            "text": _SLOTS * max(moved["text"].values(), default=0),
            "image": vae.get("vae.encoder", 0),
            "begin": _SLOTS * max(moved["modulation"].values(), default=0),
            "denoise": _SLOTS * max(moved["blocks"].values(), default=0),
            "decode": vae.get("vae.decoder", 0),
        }
        resident = self.weights.total - sum(sizes.values())
        waste = 1 + self.overhead.fragmentation
        stages = []
        for name in STAGES:
            live = acts.kept + getattr(acts, name)
            if placement.graphs and name != "denoise":
                live += acts.denoise  # captured memory is lent to nobody
            stages.append(
                Stage(
                    name,
                    resident,
                    staging[name],
                    int(waste * (live + staging[name])) - staging[name],
                    self.overhead.fixed + self.overhead.workspace,
                )
            )
        prompts = work.batch * work.branches
        uses_of_vae = len(work.contexts) * work.batch * vae.get("vae.encoder", 0)
        transfer = (
            sizes["blocks"] * work.steps * work.branches
            + sizes["modulation"] * work.branches
            + sizes["text"] * prompts
            + uses_of_vae
            + vae.get("vae.decoder", 0)
        )
        return Plan(
            self.precision,
            work,
            budget,
            placement,
            tuple(stages),
            {group: size for group, size in sizes.items() if size},
            transfer,
        )

    def _moved(self, placement: Placement) -> dict[str, Mapping[str, int]]:
        """The units of every group that live on the host."""
        chosen = placement.on_host(self.blocks)
        moved: dict[str, Mapping[str, int]] = {}
        for group, units in self.weights.groups.items():
            names = chosen.get(group, frozenset())
            moved[group] = {k: v for k, v in units.items() if names is None or k in names}
        return moved
