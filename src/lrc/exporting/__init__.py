"""Writing a student so that it runs without lrc."""
