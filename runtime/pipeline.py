"""The editing pipeline: from a picture and a prompt to the edited picture, on any backend."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

import numpy as np
from tqdm import tqdm

from .about import VERSION
from .arguments import choice, number, shown, whole
from .backend import Backend, Floats, State
from .budget import Budget, workload
from .checkpoint import MINI, PARTS
from .config import VaeConfig
from .encoding import Encoder
from .engines import check_shapes
from .errors import InvalidInputError, KontextError
from .geometry import LAYOUTS, MAX_SIDE, Grid, Size
from .jobs import Job, check_seeds, draw_noise, graph_inputs, groups, place
from .loader import load
from .request import Text, packed_latents, pair, texts_of
from .result import OUTPUT_TYPES, EditResult, Sampling, assemble
from .schedule import MAX_STEPS, SchedulerConfig, sigmas_for, unshifted
from .tokenizer import PromptTokenizer
from .turnstile import Turnstile
from .watch import Watch

StepCallback = Callable[["KontextPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
_CALLBACK_INPUTS = ("latents",)
MAX_EDITS = 1024
"""Pictures of one prompt in a call; more is a mistake."""


class KontextPipeline:
    """Edits pictures by instruction.

    One pipeline runs one call at a time; calls from other threads wait in order, up to
    ``max_queue`` of them. It survives an exception, a cancellation and exhausted memory.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PromptTokenizer,
        tokenizer_2: PromptTokenizer,
        vae: VaeConfig,
        scheduler: SchedulerConfig,
        *,
        name: str = "",
        max_queue: int = 64,
        memo_entries: int = 16,
        budget: Budget | None = None,
    ) -> None:
        """Assemble a pipeline; :meth:`from_pretrained` does this for a checkpoint.

        memo_entries: how many prompts and how many context pictures are remembered; 0 for none.
        budget: the limit within which ``backend`` was loaded; requests beyond it are refused.
        """
        max_queue, memo_entries = _counts(max_queue, memo_entries)
        self.name = name
        self.backend = backend
        self.tokenizer_2 = tokenizer_2
        self.vae = vae
        self.scheduler = scheduler
        self.grid = Grid(2 * vae.downscale, vae.sample_size)
        self.encoder = Encoder(backend, tokenizer, tokenizer_2, self.grid, memo_entries)
        self.budget = budget
        self._remembered = memo_entries
        self._turnstile = Turnstile(max_queue)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = MINI,
        *,
        backend: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        vram_budget: str | int | None = None,
        kernels: Mapping[str, str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        text_encoder_2: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        tokenizer_2: str | os.PathLike[str] | None = None,
        verify: str = "once",
        max_queue: int = 64,
        memo_entries: int = 16,
    ) -> "KontextPipeline":
        """Load a model.

        model: ``mini``, the miniature that comes with the package; a bundle, a diffusers folder, a
        BFL or ComfyUI single file, or a hub id in the local cache. A single file lacks some parts;
        ``vae`` ... ``tokenizer_2`` name a folder or file for each. backend: ``auto``, ``onnx``
        (bundles), ``native`` (torch) or ``tensorrt`` (bundles with engines). precision: ``auto``,
        ``fp32``, ``bf16``, ``fp16``, ``fp8`` or ``nvfp4``; auto runs what is stored. vram_budget:
        what the device may spend in all, in bytes or such as ``12GiB`` (native only): weights that
        do not fit are streamed from the host, and an edit that cannot fit is refused before it
        starts; it is the whole process's, so that one pipeline at a time can have one. kernels: an
        op and the implementation to run it with, such as ``{"attend": "fp8"}``, for FP8 attention
        beside FP8 layers (native only); where nothing is named, the best that passes a trial on
        the device runs. verify: large files of a bundle ``once`` per change, ``always`` or
        ``never``.

        Raises CheckpointError for weights that are missing or malformed, CorruptedError for a
        bundle that is not what its manifest says, EngineMismatchError for engines of another GPU or
        version, OutOfMemoryError for a model that no budget so small can run,
        BackendUnavailableError for what this machine cannot run.
        """
        _counts(max_queue, memo_entries)  # before the minutes that a large model takes
        given = (vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2)
        parts = {k: v for k, v in zip(PARTS[1:], given, strict=True) if v is not None}
        loaded = load(model, parts, backend, precision, device, verify, vram_budget, kernels)
        return cls(
            loaded.backend,
            loaded.tokenizer,
            loaded.tokenizer_2,
            loaded.vae,
            loaded.scheduler,
            name=loaded.name,
            max_queue=max_queue,
            memo_entries=memo_entries,
            budget=loaded.budget,
        )

    def __call__(
        self,
        image: Any = None,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 2.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = _CALLBACK_INPUTS,
        max_sequence_length: int | None = None,
        max_area: int | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        auto_resize: bool = True,
        context_layout: str = "index",
        cancel: Event | None = None,
        deadline: float | None = None,
        progress: bool = False,
    ) -> EditResult:
        """Edit pictures, or make them from text alone when ``image`` is None.

        Names and meanings are those of diffusers' ``FluxKontextPipeline``, with these differences:
        without height and width the result has the first context's own size; every context keeps
        its own size, also in a batch; ``guidance_scale`` is 2.5 as on the model's card;
        ``max_sequence_length`` None is the tokenizer's own limit. New are:

        image: a list with one prompt is several contexts of one edit, a list of lists the contexts
        of each edit; arrays may lie on a GPU (``__cuda_array_interface__``), as may latents and
        embeddings. output_type: ``cuda`` leaves pictures there. context_layout: ``index`` (frames
        1, 2, 3 ...) or ``offset`` (all at frame 1, side by side). auto_resize: contexts go to the
        nearest preferred size; False only cuts them to whole tokens. seed: one for all pictures
        (drawn from one stream, as diffusers does with one CPU generator) or one a picture; None
        draws one and reports it. cancel: looked at before every step. deadline: seconds from now,
        waiting included. progress: a bar on stderr.

        A callback gets ``latents`` as numpy and may return others; ask for none with an empty
        ``callback_on_step_end_tensor_inputs`` and nothing is copied.

        Raises InvalidInputError, CancelledError, DeadlineError, QueueFullError, OutOfMemoryError,
        EngineMismatchError for what no engine was built for, and ClosedError after :meth:`close`.
        """
        watch = Watch(cancel, deadline)
        choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "cuda" and not self.backend.leaves:
            raise InvalidInputError(
                f"output_type: expected pil, np or latent, as the {self.backend.name} backend on "
                f"{self.backend.device} has its pictures on the host, found cuda; use engines, or "
                "the native backend on a GPU"
            )
        choice("context_layout", context_layout, LAYOUTS)
        for wanted in callback_on_step_end_tensor_inputs or ():
            choice("callback_on_step_end_tensor_inputs", wanted, _CALLBACK_INPUTS)
        guidance_scale = number("guidance_scale", guidance_scale)
        true_cfg_scale = number("true_cfg_scale", true_cfg_scale)
        num_images_per_prompt = whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_EDITS)
        steps = whole("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        base_sigmas = None if sigmas is None else unshifted(sigmas)
        check_seeds(seed)
        features = self.backend.text_features
        texts = texts_of(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, features)
        negatives: list[Text] = []
        if true_cfg_scale > 1 and not (negative_prompt is None and negative_prompt_embeds is None):
            negatives = texts_of(
                negative_prompt,
                negative_prompt_2,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
                features,
                "negative_prompt",
            )
        jobs = [
            place(edit, self.grid, height, width, max_area, auto_resize)
            for edit in pair(image, texts, negatives, self.vae.latent_channels)
            for _ in range(num_images_per_prompt)
        ]
        sampling = Sampling(
            num_inference_steps=steps if base_sigmas is None else len(base_sigmas),
            sigmas=base_sigmas,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            context_layout=context_layout,
            auto_resize=auto_resize,
            max_sequence_length=self._text_length(max_sequence_length),
        )
        schedules = {job.target: self._sigmas(job.target, sampling) for job in jobs}
        batches = list(groups(jobs, self.backend.max_batch))
        for batch in batches:
            self._check(batch, sampling, decode=output_type != "latent")

        def after_step(state: State, i: int, sigma: float) -> None:
            if callback_on_step_end is not None:
                wanted = callback_on_step_end_tensor_inputs or ()
                tensors = {name: self.backend.read(state) for name in wanted}
                changes = callback_on_step_end(self, i, 1000 * sigma, tensors)
                if not isinstance(changes, Mapping | None):
                    raise InvalidInputError(
                        "callback_on_step_end: expected it to return a dictionary or None, "
                        f"found {shown(changes)}"
                    )
                if changes and "latents" in changes:
                    self.backend.write(state, checked_latents(changes["latents"], state))

        def checked_latents(latents: Any, state: State) -> Floats:
            like = self.backend.read(state).shape
            return np.stack(packed_latents(latents, *like))

        watch.timings["prepare"] = watch.elapsed
        with self._turnstile.enter(watch.check):
            watch.timings["queue"] = watch.elapsed - watch.timings["prepare"]
            with watch.stage("noise"):
                draw_noise(jobs, self.grid, self.vae.latent_channels, seed, generator, latents)
            for batch in batches:
                self._admit(batch, sampling)
            total = sampling.num_inference_steps * len(batches)
            with tqdm(total=total, disable=not progress, unit="step") as bar:
                for batch in batches:
                    self._admit(batch, sampling)
                    sigmas_of = schedules[batch[0].target]
                    encoded = self.encoder.batch(batch, sigmas_of, sampling, watch)
                    with watch.stage("begin"):
                        state = self.backend.begin(encoded)
                    with watch.stage("denoise"):
                        for i in range(sampling.num_inference_steps):
                            watch.check()
                            self.backend.step(state, i)
                            after_step(state, i, float(sigmas_of[i]))
                            bar.update()
                    with watch.stage("decode"):
                        self._finish(batch, state, output_type)
        watch.timings["total"] = watch.elapsed
        return assemble(jobs, sampling, self.about, output_type, watch.timings)

    def warmup(
        self,
        sizes: Sequence[Size] = (),
        contexts: int = 1,
        batch: int = 1,
    ) -> None:
        """Run a short edit of each (width, height), so that the first user does not wait: what is
        compiled, captured or allocated once for a size then is.

        sizes: of result and contexts alike; the model's native square when empty.
        """
        contexts = whole("contexts", contexts, 0, MAX_EDITS)
        for width, height in sizes or [(self.grid.native, self.grid.native)]:
            whole("width", width, 1, MAX_SIDE)
            whole("height", height, 1, MAX_SIDE)
            blank = np.zeros((height, width, 3), np.uint8)
            self(
                [[blank] * contexts] if contexts else None,
                "",
                num_inference_steps=2,  # one to warm up, one to capture
                num_images_per_prompt=batch,
                auto_resize=False,
                height=height,
                width=width,
                max_area=width * height,
                seed=0,
            )

    def clear_memos(self) -> None:
        """Forget remembered prompts and pictures."""
        with self._turnstile.enter(lambda: None):
            self.encoder.forget()

    def close(self) -> None:
        """Let the running call end, refuse those that wait, and release the model's memory."""
        if self._turnstile.close():
            self.encoder.forget()
            self.backend.close()

    def __enter__(self) -> "KontextPipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def about(self) -> dict[str, str]:
        """What runs: for settings, logs and reports."""
        return {
            "software": f"fluxkontext {VERSION}",
            "model": self.name,
            "backend": self.backend.name,
            "device": self.backend.device,
            "precision": self.backend.precision,
            **self.backend.details,
        }

    def _admit(self, batch: Sequence[Job], sampling: Sampling) -> None:
        """Refuse what the budget has no room for, and settle how the rest saves memory."""
        if self.budget is not None:
            self.budget.admit(workload(batch, sampling, self._remembered))

    def _check(self, batch: Sequence[Job], sampling: Sampling, decode: bool) -> None:
        """Refuse what no engine was built for."""
        features = 4 * self.vae.latent_channels, self.backend.text_features[1]
        length = sampling.max_sequence_length
        for name, shapes in graph_inputs(batch, self.grid, features, length, decode):
            if name in self.backend.profiles:
                check_shapes(name, self.backend.profiles[name], shapes)

    def _finish(self, jobs: Sequence[Job], state: State, output_type: str) -> None:
        outputs: Sequence[Any]
        if output_type == "latent":
            outputs = list(self.backend.read(state))
            if not np.isfinite(outputs).all():
                raise KontextError(
                    "expected finite latents, found NaN or infinity after the last step; use "
                    "precision bf16 or fp32"
                )
        else:
            outputs = self.backend.decode(state, stay=output_type == "cuda")
        for job, output in zip(jobs, outputs, strict=True):
            job.output = output

    def _sigmas(self, target: Size, sampling: Sampling) -> Floats:
        width, height = self.grid.tokens(target)
        return sigmas_for(
            self.scheduler, width * height, sampling.num_inference_steps, sampling.sigmas
        )

    def _text_length(self, asked: int | None) -> int:
        limit = self.tokenizer_2.model_max_length
        return limit if asked is None else whole("max_sequence_length", asked, 2, limit)


def _counts(max_queue: int, memo_entries: int) -> tuple[int, int]:
    """Both as whole numbers."""
    return (
        whole("max_queue", max_queue, 0, sys.maxsize),
        whole("memo_entries", memo_entries, 0, sys.maxsize),
    )
