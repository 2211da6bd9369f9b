"""edgediffusion: trained diffusion pipelines as engines for a named device, and a runtime for them without torch."""

__version__ = "0.1.0"
