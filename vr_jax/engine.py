"""The name under which configs of the data engine know our model as an agent."""

from vr_jax.agent import VideoReferAgent

__all__ = ["VideoReferAgent"]
