"""A child made by os.fork while other threads of the parent sample."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, threading, time
import torch
from ddpm_fast import NoiseSchedule, Sampler, StepTable, UNet, accelerate, Tuner

torch.set_num_threads(2)
torch.manual_seed(0)
unet = UNet(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4, layers_per_block=1)
model = accelerate(unet, tuner=Tuner(torch.device("cpu"), mode="off"))
sampler = Sampler(model, StepTable.ddim(NoiseSchedule.linear(), 5), (1, 8, 8), 2)
expected = sampler.sample(2, progress=False)  # this thread has a pool too
inside, leave = threading.Barrier(3), threading.Event()

class Waits:
    def update(self, n):
        inside.wait()
        leave.wait(90)
        sys.exit()

def build():
    with model._lock:  # as while an engine is built
        inside.wait()
        leave.wait(90)

threads = [threading.Thread(target=target, daemon=True)
           for target in (lambda: sampler.sample(2, progress=Waits()), build)]
threads[0].start()
time.sleep(0.3)  # its first step is done
threads[1].start()
inside.wait()
child = os.fork()
if child == 0:
    samples = sampler.sample(2, progress=False)
    torch.testing.assert_close(samples, expected)
    os._exit(7)
deadline, done = time.time() + 60, 0
while not done and time.time() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    time.sleep(0.05)
if not done:
    os.kill(child, 9)
leave.set()
sys.exit("the child hangs" if not done else os.waitstatus_to_exitcode(status) - 7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_the_child_samples_while_the_parent_does() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
