"""Where calibration items come from: one file per strategy, each with a frozen dataclass ``Strategy``.

    Strategy.allocate(steps, samples, *, seed) -> counts

``counts`` is an int array [steps] that sums to ``samples``: how many items to keep at each sampling step, step 0 being
the noisiest. The fields of the dataclass are the strategy's options; they are recorded in the quantization state.
"""
