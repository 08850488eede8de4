"""Networks that turn inputs into features [N, F]."""

from vicreg_mm.encoders.vision import VisionEncoder, build_vision

__all__ = ["VisionEncoder", "build_vision"]
