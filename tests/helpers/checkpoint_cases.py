"""A small network's checkpoint, and how to look at one and damage it."""

import json

import torch

OPTIONS = {
    "sample_size": (4, 8),
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
INDEX, CONFIG, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"


def contents(root):
    """Bytes of each file below a folder; None for a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_output(ours, theirs):
    """Equal outputs of a network and of a UNet2DModel, up to rounding."""
    x = torch.randn(2, *ours.config.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 800])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, rtol=1e-5, atol=1e-5)


def edit(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_json(name, **change):
    return lambda folder: edit(folder / name, change)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])
