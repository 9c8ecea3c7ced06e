"""Checkpoints of the authors' code, in which networks are as here but parameters have other names and shapes."""

import copy
import pickle

import pytest
import timm
import torch
from conftest import randomize
from torch import nn
from torch.nn import functional as F

from timm_iebn import load_authors_checkpoint


class AuthorsNorm(nn.Module):
    """As in the authors' code: four parameters of shape (1, C, 1, 1)."""

    def __init__(self, c):
        super().__init__()
        for name in ("weight", "bias", "weight_readjust", "bias_readjust"):
            self.register_parameter(name, nn.Parameter(torch.randn(1, c, 1, 1)))
        self.register_buffer("running_mean", torch.randn(c))
        self.register_buffer("running_var", torch.rand(c) + 0.5)
        self.register_buffer("num_batches_tracked", torch.tensor(7))

    def forward(self, x):
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True) * self.weight_readjust + self.bias_readjust)
        return F.batch_norm(x, self.running_mean, self.running_var) * self.weight * gate + self.bias


class AuthorsBlock(nn.Module):
    def __init__(self, c_in, planes, stride, expansion):
        super().__init__()
        out = planes * expansion
        kernels = [(c_in, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)]
        kernels = kernels if expansion == 4 else [(c_in, planes, 3, stride), (planes, out, 3, 1)]
        for i, (a, b, k, s) in enumerate(kernels, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            self.add_module(f"bn{i}", AuthorsNorm(b))
        self.depth, self.downsample = len(kernels), None
        if stride != 1 or c_in != out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, out, 1, stride, bias=False), randomize(nn.BatchNorm2d(out)))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AuthorsResNet(nn.Module):
    def __init__(self, depth, expansion, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), AuthorsNorm(16)
        c = 16
        for i, planes in enumerate((16, 32, 64), 1):
            blocks = []
            for j in range(depth):
                blocks.append(AuthorsBlock(c, planes, 2 if i > 1 and j == 0 else 1, expansion))
                c = planes * expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.avg_pool2d(self.layer3(self.layer2(self.layer1(x))), 8).flatten(1))


@pytest.fixture
def authors_file(tmp_path):
    def write(depth, expansion, prefix="module."):
        theirs = AuthorsResNet(depth, expansion, 10).double().eval()
        with torch.no_grad():  # keeps 164 layers of random norms within range
            for name, parameter in theirs.named_parameters():
                if name.endswith(("bn2.weight", "bn3.weight")):
                    parameter.mul_(0.2)
        path = tmp_path / "model_best.pth.tar"
        state = {prefix + k: v for k, v in theirs.state_dict().items()}
        torch.save(dict(epoch=164, state_dict=state, best_acc=77.09), path)
        return theirs, path

    return write


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize(
    ("name", "depth", "expansion"), [("resnet164_cifar_iebn", 18, 4), ("resnet20_cifar_iebn", 3, 1)]
)
def test_the_authors_checkpoints_load(name, depth, expansion, prefix, authors_file):
    theirs, path = authors_file(depth, expansion, prefix)
    ours = load_authors_checkpoint(timm.create_model(name, num_classes=10).double(), path).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = theirs(x)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "num_classes", "why"),
    [
        ("resnet32_cifar_iebn", 10, r"Missing key.*layer1\.3"),
        ("resnet20_cifar_iebn", 100, r"size mismatch for fc\.weight"),
        ("resnet20_cifar", 10, r"Unexpected key.*bn1\.gate_weight"),
        ("resnet164_cifar_iebn", 10, r"Missing key.*layer1\.0\.conv3"),
    ],
)
def test_an_authors_checkpoint_of_another_network_is_named(name, num_classes, why, authors_file):
    _, path = authors_file(3, 1)
    with pytest.raises(RuntimeError, match=rf"(?s)model_best\.pth\.tar does not fit CifarResNet.*{why}"):
        load_authors_checkpoint(timm.create_model(name, num_classes=num_classes), path)


def test_an_authors_checkpoint_of_a_deeper_network_is_named(authors_file):
    _, path = authors_file(5, 1)
    with pytest.raises(RuntimeError, match=r"(?s)does not fit CifarResNet.*Unexpected key.*layer1\.3"):
        load_authors_checkpoint(timm.create_model("resnet20_cifar_iebn", num_classes=10), path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def corrupt(path, content):
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    if content == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif content == "text":
        path.write_text("hello")
    elif content == "half a file":
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "batch norm":
        torch.save(dict(state_dict=nn.BatchNorm2d(3).state_dict()), path)
    elif content == "bare state dict":
        torch.save(state, path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "number":
        torch.save(dict(state_dict=state | {"module.bn1.weight_readjust": 3}), path)
    elif content == "odd key":
        torch.save(dict(state_dict={0: torch.ones(1)} | state), path)
    else:  # complete, and more than that
        torch.save(checkpoint | dict(extra=Bomb()), path, _use_new_zipfile_serialization="legacy" not in content)


@pytest.mark.parametrize(
    "content",
    [
        *["pickle", "code", "code, legacy", "text", "half a file"],
        *["batch norm", "bare state dict", "list", "number", "odd key"],
    ],
)
def test_no_other_file_is_taken_for_an_authors_checkpoint(content, authors_file):
    _, path = authors_file(3, 1)
    model = timm.create_model("resnet20_cifar_iebn", num_classes=10)
    state = copy.deepcopy(model.state_dict())
    corrupt(path, content)
    with pytest.raises(RuntimeError, match=r"model_best\.pth\.tar is not a checkpoint"):
        load_authors_checkpoint(model, path)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_missing_authors_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth\.tar"):
        load_authors_checkpoint(timm.create_model("resnet20_cifar_iebn"), tmp_path / "gone.pth.tar")
