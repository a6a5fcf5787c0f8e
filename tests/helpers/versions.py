"""What the installed transformers can do: one place for every test that depends on it."""

from __future__ import annotations

import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)
TRAINS = Version("5.23") <= INSTALLED
"""Whether ``mllm_crossget.training`` can be imported; older transformers are refused there."""

OLD_BEAMS = not TRAINS
"""Whether the untouched models of the installed transformers mix images up where beams, several samples or chunks of a
prompt meet rows with different numbers of images (docs/usage.md)."""
