"""What the memory plan says of a work, to put beside what is measured."""

from collections.abc import Mapping

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
    plan = _planner(shapes, pipe.about).evaluate(placement, load)
    stages = {_STAGES.get(stage.name, stage.name): stage.total for stage in plan.stages}
    if not work.contexts:
        del stages["vae_encode"]
    return {**stages, "total": plan.peak}


def _planner(shapes: ModelShapes, about: Mapping[str, str]) -> Planner:
    """As the backend of this GPU has it; of any other pipeline, for a GPU that multiplies its
    precision's numbers."""
    if about["backend"] != "native" or not about["device"].startswith("cuda"):
        return Planner(shapes, about["precision"])
    import torch

    from ..runtime.backends.precision import plain, upcast

    at = torch.device(about["device"])
    return Planner(shapes, about["precision"], plain=plain(at), upcast=upcast(at))
