"""What the user's object does: ``forward``, ``generate``, losses in training, files.

Read ``placeholder_model`` (models with image placeholders in the prompt), ``dual_encoder``, ``bare_tower``; then
``cross_loss`` and ``madtp_loss`` (training), ``thresholds`` (``calibrate``), ``saved_model`` and ``cross_files``.
"""

from mllm_crossget.moved import moved_names

__getattr__ = moved_names(__name__, "hooks.model.placeholder_model")
