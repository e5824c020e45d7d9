"""Writes torch_files/ beside this file: a dict of tensors as torch saves it now and as it did before 1.6, and in NumPy.

Needs torch:

    python tests/goldens/make_torch_file_goldens.py
"""

from pathlib import Path

import numpy as np
import torch

FORMS = {"archive.pth": True, "stream.pth": False}


def draw(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of all kinds that weights come in; some are parts of one storage, and not in its order."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(4, 3, 2, generator=generator)
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.normal_(layer.weight, generator=generator)
    torch.nn.init.normal_(layer.bias, generator=generator)
    tensors = layer.state_dict()  # which carries the versions of modules
    return tensors | {
        "parameter": torch.nn.Parameter(whole[0]),
        "part": whole[1:3, 1],
        "transposed": whole.permute(2, 0, 1),
        "expanded": whole[3, :, :1].expand(3, 5),
        "double": whole.double(),
        "half": whole.half(),
        "bfloat16": whole.bfloat16(),
        "count": torch.tensor(7),
        "small": torch.arange(-3, 3, dtype=torch.int8),
        "bytes": torch.arange(250, 256, dtype=torch.uint8),
        "flags": whole[0, 0] > 0,
        "empty": torch.zeros(0, 3),
    }


def write(directory: Path, seed: int) -> None:
    """Both files, and their content; bfloat16, which NumPy's files have not, as float32."""
    directory.mkdir(exist_ok=True)
    tensors = draw(seed)
    for name, is_archive in FORMS.items():
        torch.save(tensors, directory / name, _use_new_zipfile_serialization=is_archive)
    values = {
        key: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        for key, tensor in tensors.items()
    }
    np.savez_compressed(directory / "outputs.npz", **values)


if __name__ == "__main__":
    write(Path(__file__).parent / "torch_files", seed=0)
