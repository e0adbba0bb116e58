"""What the memory plan says of a work, to put beside what is measured."""

from ..runtime import KontextPipeline
from ..runtime.memory_model import Workload
from ..runtime.plan import Placement, Planner
from ..runtime.tensor_shapes import ModelShapes
from .scenarios import Work

_STAGES = {"image": "vae_encode", "decode": "vae_decode"}
"""What a plan calls a stage, where that differs."""


def predicted(shapes: ModelShapes, pipe: KontextPipeline, work: Work) -> dict[str, int]:
    """Peak bytes by stage, and ``total``, on a GPU that holds everything or, within a budget, what
    the edit's plan wants there; nothing is remembered."""
    load = Workload(
        work.target,
        work.contexts,
        work.batch,
        work.steps,
        pipe.tokenizer_2.model_max_length,
        remembered=0,
    )
    placement = pipe.budget.plan.placement if pipe.budget else Placement(graphs=True)
    plan = Planner(shapes, pipe.about["precision"]).evaluate(placement, load)
    stages = {_STAGES.get(stage.name, stage.name): stage.total for stage in plan.stages}
    if not work.contexts:
        del stages["vae_encode"]
    return {**stages, "total": plan.peak}
