"""`schedule.*` and `vae_decode.*`: the noise schedule, and the autoencoder alone."""

from golden import Golden
from torch import Tensor


def schedule(golden: Golden, name: str) -> Tensor:
    return getattr(golden.model.training_scheduler, name)


def decoded(golden: Golden) -> Tensor:
    return golden.model.image_decoder.vae.decode(golden.inputs["vae_decode.latents"]).sample


OUTPUTS = {
    r"schedule\.(betas|alphas_cumprod)": schedule,
    r"vae_decode\.image_raw": decoded,
}
