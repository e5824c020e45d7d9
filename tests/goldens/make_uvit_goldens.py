"""Writes the uvit directory beside this file: a small U-ViT in torch, and what it answers.

The network is written from the paper (Bao et al. 2022, arXiv:2209.12152), in float64 and without rearranging,
concatenating or scanning as the library does. The directory holds its weights in half precision, its `config.json`, and
an `outputs.npz` with inputs and outputs in float32. Needs torch:

    python tests/goldens/make_uvit_goldens.py
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG = {
    "_class_name": "UViT",
    "in_channels": 4,
    "out_channels": 4,
    "width": 8,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 2,
    "text_width": 6,
    "text_length": 7,
    "sample_size": 8,
}
WIDTH, HEADS, PATCH, CHANNELS = (
    CONFIG[name] for name in ("width", "num_heads", "patch_size", "in_channels")
)


class Attention(nn.Module):
    """Each head by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        split = (project(x).chunk(HEADS, -1) for project in (self.to_q, self.to_k, self.to_v))
        heads = []
        for q, k, v in zip(*split, strict=True):
            scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
            heads.append(scores.masked_fill(hidden[:, None], -math.inf).softmax(-1) @ v)
        return self.to_out(torch.cat(heads, -1))


class Block(nn.Module):
    """A transformer block; one of the second half takes what the first half kept."""

    def __init__(self, takes: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.expand = nn.Linear(WIDTH, CONFIG["mlp_ratio"] * WIDTH)
        self.contract = nn.Linear(CONFIG["mlp_ratio"] * WIDTH, WIDTH)
        if takes:
            self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, hidden: Tensor, kept: Tensor | None = None) -> Tensor:
        if kept is not None:
            of_x, of_kept = self.join.weight.chunk(2, 1)
            x = x @ of_x.T + kept @ of_kept.T + self.join.bias
        x = x + self.attn(self.norm1(x), hidden)
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class UViT(nn.Module):
    """Figure 1 of the paper, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        side, half = CONFIG["sample_size"] // PATCH, CONFIG["depth"] // 2
        self.patch_embed = nn.Linear(PATCH**2 * CHANNELS, WIDTH)
        self.text_embed = nn.Linear(CONFIG["text_width"], WIDTH)
        self.time_position = nn.Parameter(torch.empty(WIDTH))
        self.text_position = nn.Parameter(torch.empty(CONFIG["text_length"], WIDTH))
        self.image_position = nn.Parameter(torch.empty(side, side, WIDTH))
        self.in_blocks = nn.ModuleList(Block(takes=False) for _ in range(half))
        self.mid_block = Block(takes=False)
        self.out_blocks = nn.ModuleList(Block(takes=True) for _ in range(half))
        self.norm = nn.LayerNorm(WIDTH)
        self.to_patches = nn.Linear(WIDTH, PATCH**2 * CHANNELS)
        self.conv_out = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, told: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """`x` is [B, C, H, W], `mask` true where a token of the text is seen."""
        image = self.tokens(x)
        sequence = [self.time(told)[:, None], self.text(text), image.flatten(2).transpose(1, 2)]
        h = torch.cat(sequence, 1)
        hidden = torch.zeros(h.shape[:2], dtype=torch.bool)
        hidden[:, 1 : 1 + text.shape[1]] = ~mask
        kept = []
        for block in self.in_blocks:
            kept.append(h := block(h, hidden))
        h = self.mid_block(h, hidden)
        for block in self.out_blocks:
            h = block(h, hidden, kept.pop())
        patches = self.to_patches(self.norm(h[:, 1 + text.shape[1] :]))
        return self.conv_out(self.image(patches, x.shape))

    def time(self, told: Tensor) -> Tensor:
        """sin and cos of Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, the cosines first."""
        half = WIDTH // 2
        angles = told[:, None] / 10_000 ** (torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angles.cos(), angles.sin()], 1) + self.time_position

    def text(self, text: Tensor) -> Tensor:
        return self.text_embed(text) + self.text_position[: text.shape[1]]

    def tokens(self, x: Tensor) -> Tensor:
        """The patches' tokens as a map: a convolution whose stride is its size, and the positions of that map."""
        kernel = self.patch_embed.weight.view(WIDTH, PATCH, PATCH, CHANNELS).permute(0, 3, 1, 2)
        image = F.conv2d(x, kernel, self.patch_embed.bias, stride=PATCH)
        position = self.image_position.permute(2, 0, 1)[None]
        return image + F.interpolate(position, image.shape[2:], mode="bilinear", antialias=True)

    def image(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """Every place of a patch fills a grid of its own."""
        image = torch.empty(shape, dtype=torch.float64)
        grid = (shape[0], shape[2] // PATCH, shape[3] // PATCH, CHANNELS)
        for place, part in enumerate(patches.split(CHANNELS, -1)):
            row, column = divmod(place, PATCH)
            image[:, :, row::PATCH, column::PATCH] = part.view(grid).permute(0, 3, 1, 2)
        return image


def draw_weights(model: nn.Module) -> None:
    """Weights that keep the variance, slopes near 1, biases that matter; all exact in half precision."""
    for name, parameter in model.named_parameters():
        slope = "norm" in name and name.endswith("weight")
        summed = name.endswith("weight") and not slope
        std = parameter[0].numel() ** -0.5 if summed else 0.3
        parameter.data.normal_(1.0 if slope else 0.0, std)
        parameter.data = parameter.data.half().double()


def draw_inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two examples, the second with less text; latents of the positions' size, and with fewer rows but more columns."""
    shapes = {"latents": (2, 8, 8, 4), "others": (2, 6, 12, 4), "tokens": (2, 7, 6)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    mask = np.arange(7)[None] < np.array([[7], [4]])
    return {**inputs, "told": np.array([3, 700], np.float32), "mask": mask}


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the network returns, with all of the text, with less of it, and for latents of another size."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    latents, others = (given[name].double().permute(0, 3, 1, 2) for name in ("latents", "others"))
    told, tokens, mask = given["told"].double(), given["tokens"].double(), given["mask"]
    answers = {
        "unmasked": model(latents, told, tokens, torch.ones_like(mask)),
        "masked": model(latents, told, tokens, mask),
        "resized": model(others, told, tokens, mask),
    }
    return {name: y.permute(0, 2, 3, 1).float().numpy() for name, y in answers.items()}


def write(directory: Path, seed: int) -> None:
    """The directory, in `directory`."""
    torch.manual_seed(seed)
    inputs = draw_inputs(np.random.default_rng(seed))
    model = UViT().double()
    draw_weights(model)
    answers = answer(model, inputs)
    directory = directory / "uvit"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "diffusion_pytorch_model.safetensors")
    np.savez(directory / "outputs.npz", **inputs, **answers)


if __name__ == "__main__":
    write(Path(__file__).parent, seed=0)
