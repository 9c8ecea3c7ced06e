import os
import random
import re

import pytest
import torch
from training import RICH, run

os.environ["ACCELERATE_USE_CPU"] = "true"  # equal bits are promised on one CPU
if not torch.cuda.is_available():  # before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # two workers share two cores


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """Every run draws new inputs; the seed is in the test's report if it fails."""
    seed = torch.seed() % 2**32
    torch.manual_seed(seed)
    random.seed(seed)
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The model folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = run("--output", folder, *RICH, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    return folder


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with every norm's tensors random: at the start values half of a gradient is hidden."""
    for norm in module.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
                    if name == "running_var":
                        tensor.uniform_(0.5, 2)
                    elif name == "weight":
                        tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
                    elif tensor.is_floating_point():
                        tensor.normal_(std=0.5)
    return module


def blocks(text, language):
    """The code of a Markdown text in that language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
