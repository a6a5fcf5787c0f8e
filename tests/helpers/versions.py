"""What the installed transformers can do: one place for every test that depends on it."""

from __future__ import annotations

import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)
TRAINS = Version("5.23") <= INSTALLED
"""Whether ``mllm_crossget.training`` can be imported; older transformers are refused there."""
