"""Text to token windows, and the loop that carries them through a model block by block."""
