"""What the memory plan says of a work, to put beside what is measured."""

from ..runtime import KontextPipeline
from ..runtime.memory_model import Workload
from ..runtime.plan import Placement, Planner
from ..runtime.tensor_shapes import ModelShapes
from .scenarios import Work

_STAGES = {"image": "vae_encode", "decode": "vae_decode"}
"""What a plan calls a stage, where that differs."""


def predicted(shapes: ModelShapes, pipe: KontextPipeline, work: Work) -> dict[str, int]:
    """Peak bytes on a GPU that holds everything, by stage, and ``total``; nothing is remembered."""
    load = Workload(
        work.target,
        work.contexts,
        work.batch,
        work.steps,
        pipe.tokenizer_2.model_max_length,
        remembered=0,
    )
    plan = Planner(shapes, pipe.about["precision"]).evaluate(Placement(graphs=True), load)
    stages = {_STAGES.get(stage.name, stage.name): stage.total for stage in plan.stages}
    if not work.contexts:
        del stages["vae_encode"]
    return {**stages, "total": plan.peak}
