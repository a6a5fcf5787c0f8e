import pytest

from mllm_crossget.ops.guidance import attention_maps


@pytest.fixture(autouse=True)
def maps_as_they_are_counted(monkeypatch):
    """Formulas leave out the columns that fill a map up to whole registers; of tiny images' maps they are the most."""
    monkeypatch.setattr(attention_maps, "_REGISTER", 1)
