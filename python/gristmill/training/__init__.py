"""Gradient descent over many workers with a central server."""

from gristmill.training.convergence import Until
from gristmill.training.fitting import FitResult, GradientResult, fit, fit_gradient

__all__ = ["FitResult", "GradientResult", "Until", "fit", "fit_gradient"]
