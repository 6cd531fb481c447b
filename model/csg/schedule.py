"""Flow matching with few Euler steps, and noise that belongs to its block (``swifti2v_kernels.block_noise``).

    x_sigma = (1 - sigma) * x_0 + sigma * noise,   v = noise - x_0,   timestep = 1000 * sigma
    shift:  sigma' = s * sigma / (1 + (s - 1) * sigma)

With 4 steps and shift 5 the noise levels are 1, 0.9375, 0.8333, 0.625, 0: the schedule that step-distilled Wan
checkpoints are trained for (lightx2v). The 1000 is Wan's number of training timesteps.
"""

from __future__ import annotations

from model.errors import InputError

NUM_TRAIN_TIMESTEPS = 1000
#: Most steps, and least and most shift. Within them noise levels, as float32, fall from each step to the next.
MOST_STEPS, SHIFTS = NUM_TRAIN_TIMESTEPS, (0.001, 1000.0)


def flow_sigmas(num_steps: int, shift: float) -> list[float]:
    """Returns ``num_steps + 1`` noise levels from 1 to 0, evenly spaced and then shifted.

    Args:
        num_steps: Euler steps.
        shift: more than 1 moves the steps towards the noise, 1 leaves them evenly spaced.

    Raises:
        InputError: ``num_steps`` is not in 1..1000 or ``shift`` not in 0.001..1000.
    """
    if not 1 <= num_steps <= MOST_STEPS:
        raise InputError(f"steps: expected 1 to {MOST_STEPS}, got {num_steps}")
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise InputError(f"shift: expected {SHIFTS[0]:g} to {SHIFTS[1]:g}, got {shift}")
    levels = [1 - i / num_steps for i in range(num_steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in levels] + [0.0]
