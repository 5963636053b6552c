"""What a U-Net may predict. Apart from what computes, so that settings are checked without torch."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""The noise, the velocity, the clean latents; as diffusers calls them. Training and all samplers know all."""
