"""Networks as the released codes of the JEM family build and save them, written from descriptions of their layouts."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu


class Block(nn.Module):
    """JEM's: stride on the second convolution, shortcut of the raw input."""

    def __init__(self, inside: int, outside: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outside) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(outside, outside, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(leaky_relu(self.bn1(x), 0.2))
        return self.conv2(leaky_relu(self.bn2(out), 0.2)) + self.shortcut(x)


class Wide(nn.Module):
    """JEM's wide residual network, to features."""

    def __init__(self, depth: int, width: int, norm: bool) -> None:
        super().__init__()
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            blocks = [Block(channels[stage - 1], channels[stage], stride, norm)]
            blocks += [Block(channels[stage], channels[stage], 1, norm) for _ in range((depth - 4) // 6 - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(channels[3]) if norm else nn.Identity()
        self.features = channels[3]

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return leaky_relu(self.bn1(out), 0.2).mean((2, 3))


class JEM(nn.Module):
    """Two heads; with ``linear`` the network's own third one, with ``copies`` JEM++'s second way to its layers."""

    def __init__(self, depth: int, width: int, norm: bool = False, linear: bool = False, copies: bool = False) -> None:
        super().__init__()
        self.f = Wide(depth, width, norm)
        if linear:
            self.f.linear = nn.Linear(self.f.features, 10)
        if copies:
            self.f.layer_one = self.f.conv1
            self.f.other_layers = nn.ModuleList([self.f.layer1, self.f.layer2, self.f.layer3, self.f.bn1])
        self.class_output = nn.Linear(self.f.features, 10)
        self.energy_output = nn.Linear(self.f.features, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.class_output(self.f(x))


class VERA(nn.Module):
    """One head, in the network."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.logp_net = Wide(depth, width, norm=False)
        self.logp_net.linear = nn.Linear(self.logp_net.features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.logp_net.linear(self.logp_net(x))


class OriginalBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.convShortcut = None if inside == outside else nn.Conv2d(inside, outside, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.bn1(x))
        out = self.conv2(relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class DAT(nn.Module):
    """The original network, which normalises pixels in [0, 1] by plain tensors of its own."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            block = nn.Module()
            block.layer = nn.Sequential(
                OriginalBlock(channels[stage - 1], channels[stage], stride),
                *(OriginalBlock(channels[stage], channels[stage], 1) for _ in range((depth - 4) // 6 - 1)),
            )
            setattr(self, f"block{stage}", block)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], 10)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
        out = self.conv1((images - mean) / std)
        for block in (self.block1, self.block2, self.block3):
            out = block.layer(out)
        return self.fc(relu(self.bn1(out)).mean((2, 3)))


def trained(network: nn.Module, seed: int = 0, *, energy_head: bool = False) -> nn.Module:
    """In eval mode, with weights and statistics as training may leave them; of ``energy_output`` only where it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if "energy_output" in name and not energy_head:
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.normal_(0, 1.4 * tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.fill_(78_000)
    return network.eval()


def released(method: str, depth: int = 10, width: int = 1, *, energy_head: bool | None = None) -> tuple[nn.Module, dict]:
    """A network of a method and the checkpoint that its authors' code writes of it."""
    head = method == "mjem" if energy_head is None else energy_head
    torch.manual_seed(0)
    if method == "dat":
        network = trained(DAT(depth, width))
        return network, network.state_dict()
    if method == "vera":
        network = trained(VERA(depth, width))
        beside = {"generator": nn.Linear(2, 2).state_dict()}
        optimizer = torch.optim.Adam(network.parameters()).state_dict()
        return network, {"model": {"logp_net": network.state_dict(), **beside}, "optimizer": {"logp_net": optimizer}, "itr": 7}
    norm, copies = method != "jem", method == "jempp"
    network = trained(JEM(depth, width, norm=norm, linear=not norm, copies=copies), energy_head=head)
    buffer = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2.02 - 1.01
    return network, OrderedDict(model_state_dict=network.state_dict(), replay_buffer=buffer)
