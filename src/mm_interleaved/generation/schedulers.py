"""Samplers of images: schedulers of diffusers by name, and time steps that begin in noise.

To add one: its class in `SCHEDULERS`, its name in `settings.SCHEDULERS`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from mm_interleaved.generation.default_dtype import single_precision
from mm_interleaved.models.prediction_types import PREDICTION_TYPES

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    # Come to nearly the same image in fewer steps.
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    # For weights that were distilled to a few steps, see `acceleration.load_adapter`.
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""Classes of diffusers, each loaded when it is wanted: some load scipy, which costs half a second."""
SPACINGS = ("trailing", "linspace")
"""How time steps are laid out where the model's own way does not work for their number."""
UNUSED_SHARE = 0.05
"""Of the time steps, how many may lie unused before the first one, beside one interval between two."""


def build_scheduler(name: str, scheduler_config: Mapping[str, Any]) -> SchedulerMixin:
    """A sampler by name, for the noise schedule that the model was trained with.

    Raises:
        ValueError: the U-Net predicts what samplers do not know.
    """
    predicted = scheduler_config.get("prediction_type", PREDICTION_TYPES[0])
    if predicted not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type: found {predicted!r}, expected one of {', '.join(PREDICTION_TYPES)}"
        )
    kind = getattr(diffusers, SCHEDULERS[name])
    known = inspect.signature(kind.__init__).parameters
    with single_precision():
        return kind(**{key: value for key, value in scheduler_config.items() if key in known})


def scheduler_for(
    name: str, scheduler_config: Mapping[str, Any], num_inference_steps: int, *, is_published: bool = False
) -> SchedulerMixin:
    """A sampler that can do so many steps, from noise to the image.

    Its time steps are laid out as the model's configuration says (`timestep_spacing`), unless they come out
    wrong for this number: diffusers' "leading" leaves out the noisiest half of 1,000 for 501 steps and begins
    behind the last for 1,000, its "trailing" makes 62 steps of 61. Then another spacing is taken.

    Args:
        is_published: keep the configured spacing, wherever it begins, as the released code does.

    Raises:
        ValueError: no spacing gives so many steps.
    """
    spacings = [scheduler_config.get("timestep_spacing")]
    spacings += [] if is_published else [spacing for spacing in SPACINGS if spacing not in spacings]
    reason: ValueError | None = None
    for spacing in spacings:
        chosen = {} if spacing is None else {"timestep_spacing": spacing}
        scheduler = build_scheduler(name, {**scheduler_config, **chosen})
        try:
            set_time_steps(scheduler, num_inference_steps)
        except ValueError as error:
            reason = reason or error
            continue
        if is_published or _begins_in_noise(scheduler):
            return scheduler
    raise reason or ValueError(f"scheduler {name}: {num_inference_steps} steps do not begin where noise does")


def set_time_steps(scheduler: Any, count: int, device: torch.device | None = None) -> None:
    """`set_timesteps`, and a check of what it has set. Raises ValueError in one sentence."""
    kind, trained = type(scheduler).__name__, scheduler.config.num_train_timesteps
    if count > trained:
        raise ValueError(f"{kind} cannot do {count} of {trained} steps")
    try:
        with single_precision():
            scheduler.set_timesteps(count, device=device)
    except (ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{kind} cannot do {count} of {trained} steps ({reason})") from error
    steps = scheduler.timesteps.double().cpu()
    first, last = steps[0].item(), steps[-1].item()
    is_falling = bool((steps.diff() < 0).all())
    if len(steps) != count or not is_falling or first > trained - 1 or last < 0:
        raise ValueError(
            f"{kind} cannot do {count} of {trained} steps (found {len(steps)} time steps from {first:g} to "
            f"{last:g}, expected {count} that fall within {trained - 1} to 0)"
        )


def _begins_in_noise(scheduler: Any) -> bool:
    """Whether the first time step is about as noisy as noise, which is what it is given."""
    trained, steps = scheduler.config.num_train_timesteps, scheduler.timesteps
    unused = trained - 1 - steps[0].item()
    return unused <= trained / len(steps) + UNUSED_SHARE * trained
