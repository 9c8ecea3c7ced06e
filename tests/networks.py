"""Layers and a network with random tensors, their inputs, and the norms of a network; tests share it."""

import torch
from conftest import randomize
from torch import nn

from timm_iebn import IEBN2d, IEBNAct2d


def layer(c=6, kind=IEBN2d, **kwargs):
    return randomize(kind(c, **kwargs))


def images(n=4, c=6, h=7, w=5):
    return torch.randn(n, c, h, w) + torch.randn(n, c, 1, 1)


def network():
    return randomize(nn.Sequential(nn.Conv2d(3, 6, 3), IEBN2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), IEBNAct2d(4)))


def norms(net, kind=IEBN2d):
    return {n: m for n, m in net.named_modules() if isinstance(m, kind)}
