"""Trainers, their settings and callbacks. Imported lazily by `hf_distill`, since transformers and trl are heavy."""
