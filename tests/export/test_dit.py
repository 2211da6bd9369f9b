"""DiT: a class for every picture, one size, and half of the output left out."""

from __future__ import annotations

from transformers_checks import Conformance

from edgediffusion.bundle import Bundle


class TestDiT(Conformance):
    NAME = "dit"

    def test_facts(self, bundle: Bundle) -> None:
        facts = bundle.sampling
        assert facts is not None
        assert (facts.classes, facts.fixed_size, facts.height, facts.guidance) == (1000, True, 16, "classifier-free")
        denoise = bundle.component("transformer")
        assert denoise.outputs[0].shape == ("batch", 4, 8, 8)
        assert denoise.inputs[2].dtype == "int64"
