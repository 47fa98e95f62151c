"""Writing a student so that it runs without us."""

from lrc.exporting.plain import export_student

__all__ = ["export_student"]
