"""Memory of a call of the engine and of diffusers' networks, on meta tensors."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ddpm_fast import UNet
from ddpm_fast.engine.plan.lowering import lower
from ddpm_fast.engine.plan.memory import plan_offsets
from engine_cases import busiest
from unet_cases import CIFAR, LARGE, SIX_LEVELS


class Peak(TorchDispatchMode):
    """Peak of the bytes of results that are alive; works on meta tensors too."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.users = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        external = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _is(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if _is(tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.users and key in external:
                    continue  # a view of what was there before
                users, nbytes = self.users.get(key, (0, storage.nbytes()))
                self.now += 0 if users else nbytes
                self.users[key] = users + 1, nbytes
                weakref.finalize(tensor, self._freed, key)
        self.most = max(self.most, self.now)
        return out

    def _freed(self, key):
        users, nbytes = self.users[key]
        self.users[key] = users - 1, nbytes
        if users == 1:
            del self.users[key]
            self.now -= nbytes


def _is(value):
    return isinstance(value, torch.Tensor)


def test_the_peak_is_counted():
    with Peak() as peak:
        x = torch.zeros(256)
        y = x * 2  # two alive
        view = y[:8]
        del x, y
        z = view + 1  # the view keeps all of y
        del view
        z.add_(1)
    assert (peak.most, peak.now) == (2 * 1024, 32)


@pytest.mark.parametrize(
    ("options", "size", "batch"),
    [
        pytest.param(CIFAR, 32, 1, id="cifar10-1"),
        pytest.param(CIFAR, 32, 8, id="cifar10-8", marks=pytest.mark.slow),
        pytest.param(CIFAR, 32, 64, id="cifar10-64", marks=pytest.mark.slow),
        pytest.param(LARGE, 256, 1, id="celebahq-1", marks=pytest.mark.slow),
        pytest.param(LARGE, 256, 8, id="celebahq-8", marks=pytest.mark.slow),
        pytest.param(LARGE, 256, 64, id="celebahq-64", marks=pytest.mark.slow),
        pytest.param(SIX_LEVELS, 64, 8, id="narrow-8"),
    ],
)
def test_a_call_takes_less_memory_than_diffusers(options, size, batch):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = UNet(**options)
        theirs = diffusers.UNet2DModel(**unet.config.to_dict()).half().eval()
        x = torch.empty(batch, 3, size, size, dtype=torch.float16)
        programs = [
            lower(unet, batch, size, size, torch.float16, norms_add=norms_add)[0]
            for norms_add in (False, True)
        ]
        with torch.no_grad(), Peak() as peak:
            theirs(x, torch.zeros(batch, dtype=torch.int64))
    for program in programs:
        lives = dict(enumerate(program.lifetimes().values()))
        arena = plan_offsets(lives)[1]
        assert arena + program.out.nbytes < peak.most
        assert arena < 1.1 * busiest(list(lives.values()))
