"""Provide whole models for dense prediction on any backbone, and their inference."""

from __future__ import annotations

from widefield.dense.inference import check_views, segment

__all__ = ["check_views", "segment"]
