"""``python -m mllm_crossget``: the same as the command ``mllm-crossget``."""

import sys

from mllm_crossget.cli import main

sys.exit(main())
