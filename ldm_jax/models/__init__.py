"""Networks, one a file, and their weights in the layouts of diffusers and transformers."""

from ldm_jax.models.unet_config import UNetConfig

# The backbones that can be trained: name -> config class.
BACKBONES = {"unet": UNetConfig}
