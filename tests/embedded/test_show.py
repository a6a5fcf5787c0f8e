"""``mllm-crossget show``, and the embedded model with a number of tokens per image."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mllm_crossget import CrossGetConfig, MadtpConfig, accelerate_mllm, calibrate, cli
from mllm_crossget.embedded import load_embedded
from mllm_crossget.embedded.scenes import render, sample_layouts, to_image
from mllm_crossget.hooks.ground.state import handle_of
from mllm_crossget.look.visualize import draw_counts, tokens_per_layer
from tests.helpers.tiny import pixels, tiny_tower


def test_tokens_per_layer_and_their_bars() -> None:
    model = accelerate_mllm(tiny_tower(), CrossGetConfig(dynamic=True))
    calibrate(model, pixels(model, 8))
    counts = tokens_per_layer(model, pixels(model, 3, seed=1))
    assert counts.shape == (3, 5)
    assert counts[:, 0].tolist() == [18, 18, 18]
    assert torch.equal(counts[:, -1], model(pixels(model, 3, seed=1)).token_counts)
    bars = draw_counts(counts[0], (120, 60))
    assert bars.size == (120, 60)
    blue = [sum(bars.getpixel((x, y)) == (70, 110, 180) for x in range(120)) for y in (6, 54)]
    assert blue[0] > blue[1] > 0


def test_show_writes_a_row_per_image(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for index, picture in enumerate(scenes(3, seed=3)[0]):
        files.append(str(tmp_path / f"{index}.png"))
        picture.save(files[-1])
    output = tmp_path / "new" / "kept.png"
    words = ["show", "--images", *files, "--dynamic", "true", "--keep_ratio", "0.25", "--output", str(output)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("image ") == 3
    with Image.open(output) as sheet:
        assert sheet.width > sheet.height / 2 > 3 * 96
    assert cli.main(["show", "--model", "somewhere", "--output", str(output)]) == 2
    assert "pictures of your own" in capsys.readouterr().err
    assert cli.main(["show", "--scenes", "0"]) == 2


def scenes(count: int, seed: int) -> tuple[list[Image.Image], torch.Tensor]:
    """Scenes like the test set's, and how many digits each shows."""
    layouts = sample_layouts(count, "test", torch.Generator().manual_seed(seed))
    digits = torch.tensor([len(scene.items) for scene in layouts.scenes()])
    return [to_image(image) for image in render(layouts)[0]], digits


@pytest.mark.slow
@pytest.mark.parametrize("method", [CrossGetConfig(dynamic=True, keep_ratio=0.25), MadtpConfig(keep_ratio=0.25)])
def test_the_embedded_models_average_on_scenes_not_seen(method) -> None:
    """Within 2 %, or within two standard errors of the difference of two samples where scenes differ a lot."""
    model, processor = load_embedded()
    accelerate_mllm(model, method)
    calibrate(model, scenes(800, seed=2)[0], processor)
    pictures, digits = scenes(1000, seed=1)
    values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        batches = [model.model.get_image_features(part, return_dict=True).pooler_output for part in values.split(250)]
    kept = torch.tensor([float(len(image)) for batch in batches for image in batch])
    asked, error = handle_of(model).schedule.features, kept.std().item() * (1 / 800 + 1 / 1000) ** 0.5
    assert abs(kept.mean().item() - asked) <= max(0.02 * asked, 2 * error)
    if method.method == "crossget":
        assert kept[digits <= 2].mean() < kept[digits >= 6].mean()
