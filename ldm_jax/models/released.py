"""The frozen networks of released pipelines, by their configs alone: what a plan takes where no directory is given."""

from ldm_jax.models.clip import CLIPTextConfig
from ldm_jax.models.kl import KLConfig
from ldm_jax.models.t5 import T5Config

AUTOENCODER = KLConfig()  # Stable Diffusion's, of all versions before 3

_CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)
_CLIP_H = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
_CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
_T5_XXL = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

# By name: the text encoders.
TEXT = {
    "Stable Diffusion 1.5": (_CLIP_L,),
    "Stable Diffusion 2.1": (_CLIP_H,),
    "SDXL": (_CLIP_L, _CLIP_G),
    "PixArt": (_T5_XXL,),
}
