"""A program that ends while gloo's thread still frees a tensor, started by test_processes.py."""

import time
import weakref

import torch

from hub_mpq.train.processes import make_accelerator


class Slow:
    """Keeps the interpreter from being finalized at once."""

    def __del__(self, sleep=time.sleep):
        sleep(0.5)


make_accelerator(cpu=True)
slow, begun = Slow(), []


def freed(sleep=time.sleep):
    begun.append(True)
    sleep(0.05)


x = torch.ones(4)
weakref.finalize(x, freed).atexit = False
if torch.distributed.get_rank() == 1:
    time.sleep(0.2)  # the operation lasts until then, so that its thread holds the tensor last
torch.distributed.all_reduce(x, async_op=True)
del x
while not begun:
    time.sleep(0.001)
