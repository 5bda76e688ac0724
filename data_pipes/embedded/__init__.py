"""The embedded default: a simulated world, its H.264 videos, and its captions and questions."""
