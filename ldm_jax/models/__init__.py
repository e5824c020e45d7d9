"""Networks, one a file, and their weights in the layouts of diffusers and transformers."""

from ldm_jax.models.pixart_config import PixArtConfig
from ldm_jax.models.unet_config import UNetConfig
from ldm_jax.models.uvit_config import UViTConfig

# The backbones that can be trained: name -> config class.
BACKBONES = {"unet": UNetConfig, "pixart": PixArtConfig, "uvit": UViTConfig}
Backbone = UNetConfig | PixArtConfig | UViTConfig
