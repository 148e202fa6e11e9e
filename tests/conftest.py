"""Make the test folders importable by name."""

import os
import sys
from pathlib import Path

os.environ["GRISTMILL_COSTS"] = "off"  # plans choose by built-in prices: the same kernels at every run
sys.path.insert(0, str(Path(__file__).parent))
