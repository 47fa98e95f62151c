"""Export of a student so that it runs without lrc."""

from lrc.exporting.plain import export_student

__all__ = ["export_student"]
