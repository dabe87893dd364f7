"""Training: the step, its optimizer, checkpoints, and the run around them."""

from lorajax.training.fit import Result, Sample, fit

__all__ = ["Result", "Sample", "fit"]
