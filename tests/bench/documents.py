"""Documents of invented measurements, made by the functions that benchmarks make theirs with."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fluxkontext.bench import document as doc

Json = dict[str, Any]

ENVIRONMENT: Json = {
    "machine": "x86_64",
    "os": "Linux",
    "cpu": "Example CPU @ 2.00GHz",
    "cores": 2,
    "threads": 2,
    "ram": 8 << 30,
    "python": "3.11.2",
    "torch": "2.13.0",
    "triton": None,
    "onnxruntime": None,
    "numpy": "2.4.0",
    "diffusers": None,
    "tensorrt": None,
    "cuda": None,
    "cudnn": None,
    "driver": None,
    "gpu": None,
}
MODEL: Json = {"name": "mini", "digest": "synthetic", "synthetic": True, "parameters": 9_700_000}
STAGE_SHARES = {"image_in": 0.02, "text": 0.05, "vae_encode": 0.13, "denoise": 0.6}


def state(clock: int = 1980, reasons: Iterable[str] = ()) -> Json:
    """Of a GPU."""
    return {
        "sm_clock_mhz": clock,
        "memory_clock_mhz": 3201,
        "temperature_c": 60,
        "power_w": 650.0,
        "throttle_reasons": list(reasons),
    }


def gpu(name: str = "Example GPU") -> Json:
    return {
        "name": name,
        "uuid_hash": "0123456789abcdef",
        "sm": "9.0",
        "multiprocessors": 132,
        "memory": 140 << 30,
        "power_limit_w": 700.0,
        "before": state(),
        "after": state(1400, ["sw_power_cap"]),
    }


def parameters(**changed: Any) -> Json:
    return {
        "width": 64,
        "height": 64,
        "steps": 4,
        "batch": 1,
        "contexts": [{"width": 64, "height": 64}],
        "precision": "fp32",
        "backend": "native",
        "device": "cpu",
        "implementation": "fluxkontext",
        "guidance": 2.5,
        "seeds": [0],
        "tokens": {"target": 64, "context": 64, "text": 32},
        **changed,
    }


def noisy(median: float, count: int, seed: int) -> list[float]:
    """Latencies: a long tail above the median, none far below."""
    rng = np.random.default_rng(seed)
    return [float(v) for v in median * np.exp(0.02 * rng.standard_exponential(count) - 0.0139)]


def measured(name: str, median: float = 0.2, count: int = 20, seed: int = 0, **also: Any) -> Json:
    """A result with all that an edit on a CPU has."""
    changed = also.pop("parameters", {})
    settings = parameters(**changed)
    values = noisy(median, count, seed)
    fields: Json = {
        "warmup": 2,
        "latency": doc.distribution(values),
        "stages": {
            stage: doc.distribution([share * v for v in values])
            for stage, share in STAGE_SHARES.items()
        },
        "step": doc.distribution(noisy(0.15 * median, count * settings["steps"], seed + 1)),
        "step_clock": "perf_counter",
        "throughput": {"unit": "images/s", "value": 1 / median},
        "memory": {
            "denoise": doc.memory(max_ram=700 << 20, predicted=650 << 20),
            "vae_decode": doc.memory(max_ram=720 << 20),
            "total": doc.memory(max_ram=720 << 20, predicted=700 << 20),
        },
    }
    return doc.result(name, "edit", settings, **{**fields, **also})


def run(*results: Json, **changed: Any) -> Json:
    """A document of these results."""
    fields: Json = {
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "command": ["fluxkontext", "bench", "edit", "--rounds", "20"],
        "model": MODEL,
        "environment": ENVIRONMENT,
        "warnings": [],
        "results": results,
    }
    suite = changed.pop("suite", ("edit", 1))
    benchmark = changed.pop("benchmark", "edit")
    found = doc.document(benchmark, suite, **{**fields, **changed})
    found["created"] = "2026-01-02T03:04:05+00:00"
    assert doc.fault(found) is None
    return found


def full() -> Json:
    """Every part that a document may have."""
    roofline = {"flop": 165e12, "bytes": 24e9, "floor": 0.21, "share": 0.88, "bound": "flop"}
    start = doc.distribution([2.1, 2.2, 2.0])
    waits = doc.distribution(noisy(0.05, 30, 9))
    slow = noisy(0.4, 60, 4)
    found = run(
        measured("text to image, 4 steps", 0.11, seed=1),
        measured(
            "edit, 4 steps",
            0.21,
            seed=2,
            roofline=roofline,
            cold={"process_start_to_picture": start, "load": start, "first_edit": None},
            energy={"unit": "J", "gpu": 1400.0, "total": 1400.0},
            work={"forwards": 4, "tokens": 640, "flop": 4.63e15},
            memory={
                stage: doc.memory(max_allocated=20 << 30, max_process_vram=21 << 30, predicted=p)
                for stage, p in (("text", 19 << 30), ("denoise", 20 << 30), ("total", None))
            },
        ),
        measured("edit, 28 steps", 1.2, count=110, seed=3, parameters={"steps": 28}),
        measured(
            "load",
            0.25,
            stages={"queue": waits},
            load={
                "rate": 3.0,
                "concurrency": None,
                "duration": 10.0,
                "arrivals": 30,
                "completed": 29,
                "rejected": 1,
                "slo": 0.5,
                "quantile": 0.95,
                "slo_met": True,
            },
        ),
        measured(
            "sustained",
            0.4,
            series=[
                {"t": 0.4 * i, "latency": v * (1 + i / 300), "state": state(1980 - i)}
                for i, v in enumerate(slow)
            ],
        ),
        measured("diffusers eager", 0.36, parameters={"implementation": "diffusers"}),
        doc.result("nvfp4", "edit", parameters(precision="nvfp4"), reason="needs sm_100 or newer"),
        environment={**ENVIRONMENT, "gpu": gpu()},
        warnings=[
            doc.warning("few_samples", "20 samples say little about p95", "edit, 4 steps"),
            doc.warning("throttled", "sw_power_cap: clocks fell from 1980 to 1400 MHz"),
        ],
        comparisons=[
            {
                "scenario": "edit",
                "base": "edit, 4 steps",
                "other": "diffusers eager",
                "what": "warm",
                "ratio": 1.71,
                "interval": [1.66, 1.78],
                "confidence": 0.95,
                "agreement": {"max_levels": 1, "psnr_db": 58.2},
            }
        ],
        ceilings={
            "flops": {
                "bf16": doc.distribution([788e12, 790e12], "FLOP/s"),
                "fp8": doc.distribution([1340e12, 1350e12], "FLOP/s"),
            },
            "copy": doc.distribution([4.3e12, 4.31e12], "B/s"),
        },
        headline={
            "result": "edit, 4 steps",
            "s_per_edit": 0.21,
            "edits_per_min": 285.7,
            "j_per_edit": 1400.0,
            "peak_vram": 21 << 30,
        },
    )
    for row in found["results"]:
        row["parameters"]["device"] = "cuda:0"
    return found
