"""Spacings: one file each, which says where in the training range the steps of a sampler lie. A module has one of

    timesteps(schedule, steps, *, with_end) -> float64 [steps]      training timesteps, descending, fractional if need be
    ramp(largest, smallest, steps) -> float64 [steps]               noise levels from the largest down to the smallest

``with_end``: multistep solvers of diffusers count the end of their last step as one more point of the range, which is then
divided by ``steps + 1``; a spacing whose steps have no common distance has no use for it. A noise level is sigma / alpha, or
sigma for a flow. A module with options (see options.py) takes them as its last argument; a ramp's have ``ends``, the spacing
of timesteps whose first and last give the levels that it runs between.

``NoiseSchedule.spacing`` is such a text, as ``--spacing`` is; ``schedules.levels`` turns it into noise levels.
"""

EVEN = ("leading", "trailing", "linspace")  # those that diffusers calls timestep_spacing; the bundle states one
