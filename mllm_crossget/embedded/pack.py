"""Write the digits and photographs of `data/` from scikit-learn: `python -m mllm_crossget.embedded.pack`.

It is needed once, by the package's authors. Users read the packed files, so scikit-learn is not a run-time dependency.
Nothing else in the package imports this module.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import DATA_FOLDER

PHOTO_SIZE = (320, 213)  # half of the original 640 x 427 pixels, because crops are blurred to a low contrast


def pack(folder: Path = DATA_FOLDER) -> None:
    """Write `digits.npz`, `china.jpg` and `flower.jpg` into `folder`."""
    from sklearn.datasets import load_digits, load_sample_images

    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    np.savez_compressed(
        folder / "digits.npz", images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8)
    )
    photographs = load_sample_images()
    for name, pixels in zip(photographs.filenames, photographs.images, strict=True):
        photo = Image.fromarray(pixels).resize(PHOTO_SIZE, Image.Resampling.LANCZOS)
        photo.save(folder / Path(name).name, quality=85)


if __name__ == "__main__":
    pack()
