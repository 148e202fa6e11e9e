"""Make a trained model smaller and faster: clip, prune, distil, quantise. Each pass is a config that maps a Model to a Model."""

from gristmill.compression.clip import Clip
from gristmill.compression.distill import Distill
from gristmill.compression.layerwise import compress_file
from gristmill.compression.pipeline import compress
from gristmill.compression.prune import Prune
from gristmill.compression.quantize import Quantize
from gristmill.compression.recipe_file import read_recipe, write_recipe
from gristmill.compression.report import Report
from gristmill.compression.structure import RemoveHeads, RemoveLayers
from gristmill.compression.sweep import Sensitivity, sensitivity

__all__ = [
    "Clip", "Distill", "Prune", "Quantize", "RemoveHeads", "RemoveLayers", "Report", "Sensitivity", "compress", "compress_file",
    "read_recipe", "sensitivity", "write_recipe",
]  # fmt: skip
