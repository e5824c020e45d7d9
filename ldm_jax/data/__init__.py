"""Captioned images from anywhere, made into shards of latents once, and loaded from them in a reproducible order."""

from ldm_jax.data.sources import SOURCES as SOURCES
from ldm_jax.data.sources import Item as Item
from ldm_jax.data.sources import Skip as Skip
from ldm_jax.data.sources import Source as Source
from ldm_jax.data.sources import open_source as open_source
