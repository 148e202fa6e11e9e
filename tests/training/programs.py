"""Models, data and runs that the tests of training share."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

import gristmill as gm

PACKAGE = Path(gm.__file__).parents[1]


def blobs(examples=100, features=6, classes=3, seed=0):
    """Labelled points around one centre for each class."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, features)) * 2
    y = rng.integers(0, classes, examples)
    return (centres[y] + rng.standard_normal((examples, features))).astype(np.float32), y


def small_model(seed=0):
    return gm.zoo.mlp([6, 16, 3], seed=seed)


def bits(result):
    """The trained parameters, to the last bit."""
    params = result.params if isinstance(result.params, dict) else {"": result.params}
    return b"".join(array.tobytes() for array in params.values())


def linear_gradient(params, batch):
    """Least squares: the mean of (x @ weight + bias - y)^2 / 2."""
    error = batch["x"] @ params["weight"] + params["bias"] - batch["y"]
    gradients = {"weight": batch["x"].T @ error / len(error), "bias": error.mean(keepdims=True)}
    return 0.5 * np.mean(error**2), gradients


def linear_problem(examples=60, features=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((examples, features)).astype(np.float32)
    y = x @ np.arange(1, features + 1, dtype=np.float32) + np.float32(0.5)
    params = {"weight": np.zeros(features, np.float32), "bias": np.zeros(1, np.float32)}
    return params, {"x": x, "y": y}


def write_script(folder, source):
    """Write a program as a user would: no guard, no package."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(source))
    return path


def start_script(path, **options):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )
