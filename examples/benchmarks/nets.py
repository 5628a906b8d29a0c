"""Networks of the benchmarks that no library builds, with weights from the data folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def data_root() -> Path:
    """Return the folder with weights and data: $HUB_MPQ_DATA/data, or ../shared/data beside the repository."""
    root = Path(os.environ.get("HUB_MPQ_DATA", Path(__file__).parents[2].parent / "shared")) / "data"
    if not root.is_dir():
        raise SystemExit(f"data not found at {root}: set HUB_MPQ_DATA to the folder that contains data/")
    return root


class _Block(nn.Module):
    """Two 3×3 convolutions; where the shape changes, the shortcut subsamples and pads with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016): 6n+2 layers, x [N, 3, 32, 32] to 10 logits."""

    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[_Block(16, 16, 1) for _ in range(n)])
        self.layer2 = nn.Sequential(*[_Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(n)])
        self.layer3 = nn.Sequential(*[_Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(n)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _weights(name: str) -> tuple[dict[str, Tensor], dict]:
    folder = data_root() / "weights" / name
    return load_file(folder / "model.safetensors"), json.loads((folder / "source.json").read_text())


def resnet20() -> nn.Module:
    """Return the CIFAR ResNet-20 with its published weights."""
    net = CifarResNet(3)
    net.load_state_dict(_weights("resnet20.akamaster_cifar10")[0])
    return net.eval()


def mobilenet_v1(pretrained: bool = True) -> nn.Module:
    """Return MobileNetV1-0.75 with its ImageNet weights."""
    from timm.models.efficientnet import _gen_mobilenet_v1

    net = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.75, pad_type="same", bn_eps=1e-3)
    if pretrained:
        net.load_state_dict(_weights("mobilenetv1_075.keras_in1k")[0])
    return net.eval()


def mobilenet_v2(pretrained: bool = True) -> nn.Module:
    """Return MobileNetV2-1.0 with folded BatchNorms: each becomes a bias of its convolution."""
    import timm

    net = timm.create_model("mobilenetv2_100", pad_type="same", bn_eps=1e-3)
    if pretrained:
        net.load_state_dict(_weights("mobilenetv2_100.keras_in1k_int8dq")[0])
    fold_batch_norm(net.eval())
    return net


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> None:
    """Fold every BatchNorm after a convolution into its weight and bias; activations stay."""
    previous: tuple[nn.Module, str] | None = None
    for parent in list(net.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d):
                previous = (parent, name)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and previous is not None:
                conv = getattr(*previous)
                factor = module.weight / (module.running_var + module.eps).sqrt()
                shift = module.bias - module.running_mean * factor
                conv.weight.mul_(factor[:, None, None, None])
                conv.bias = nn.Parameter(shift + (conv.bias * factor if conv.bias is not None else 0))
                setattr(parent, name, getattr(module, "act", nn.Identity()))
                previous = None
