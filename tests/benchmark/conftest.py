import pytest

from mllm_crossget.ops import attention_maps


@pytest.fixture(autouse=True)
def maps_as_they_are_counted(monkeypatch):
    """Formulas know nothing of the columns that fill a map up to whole registers; on tiny images these are most of it."""
    monkeypatch.setattr(attention_maps, "_REGISTER", 1)
