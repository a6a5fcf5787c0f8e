"""Keeps what other packages say off the screen of a command: progress bars of loading, notes about their own future.

What tells of a mistake stays: errors, weights that a checkpoint lacks, a driver that is too old, and all that this
package says.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Loggers whose warnings are about defaults and configurations that a user of a command did not choose. The loading of
# weights is another one (transformers.modeling_utils).
_LOGGERS = (
    "bitsandbytes",
    "transformers.configuration_utils",
    "transformers.generation",
    "transformers.modeling_rope_utils",
)
_MODULES = r"(accelerate|bitsandbytes|gradio|huggingface_hub|peft|starlette|torch|transformers)(\.|$)"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: no bars of transformers, no deprecations of other packages, no warnings of ``_LOGGERS``."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), no_bars():
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=_MODULES)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside the block transformers shows no progress bars. Those of downloads stay: a user waits for these."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as theirs

    shown, downloads = theirs.is_progress_bar_enabled(), not are_progress_bars_disabled()
    theirs.disable_progress_bar()
    if downloads:  # they went with the others
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()
            if not downloads:  # they came back with the others
                disable_progress_bars()
