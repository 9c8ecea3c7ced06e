import json
import os
import random
import re

import numpy as np
import pytest
import torch
from training import RICH, USERS_OWN, run

os.environ["ACCELERATE_USE_CPU"] = "true"  # equal bits are promised on one CPU
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels, which run interpreted on the latter
PATHS = ["torch operations", "C++", "C++ for AVX2"]  # of IEBN on CPU
if DEVICE == "cpu":  # before the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # two workers share two cores
pytest.register_assert_rewrite("numerics")  # whose asserts say as much as those of a test
pytest_plugins = ["pretrained", "publishing"]  # for their fixtures


def pytest_configure():
    for name in USERS_OWN:  # here, and not in the processes of clients, which set them
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items):
    if DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """Every run draws new inputs; a failed test's report has the seed, with TIMM_IEBN_SEED=... they are the same."""
    seed = int(os.environ.get("TIMM_IEBN_SEED", torch.seed() % 2**32))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The model folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = run("--output", folder, *RICH, cwd=folder.parent, fork=False)  # or order in sets would be that of others
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(params=PATHS)
def backend(request, monkeypatch):
    """Runs a test on every implementation of the passes on CPU."""
    from timm_iebn.ops import cpu

    if request.param == "torch operations":
        monkeypatch.setattr(cpu, "library", None)
    elif cpu.library is None:
        pytest.skip("the CPU library was not built: pip install -e . with a C++ compiler with OpenMP builds it")
    elif request.param == "C++ for AVX2":
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            pytest.skip("'C++' is that already: the processor has no AVX-512")
        monkeypatch.setattr(cpu, "library", cpu.load("AVX2"))


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


def write_config(folder, architecture, **training):
    """The config.json that a trainer would leave in `folder`, with these things about its training."""
    about = dict(data="digits", epochs=1, seed=0, pretrained=False, date="2026-01-31")
    about |= dict(test_loss=1.0, test_top1=50.0, test_top5=90.0)
    config = dict(architecture=architecture, label_names=["a", "b"], parameters=1_727_284, macs=247_000_000)
    config |= dict(weights_sha256="0" * 64, training=about | training, pretrained_cfg=dict(input_size=[3, 32, 32]))
    (folder / "config.json").write_text(json.dumps(config))


def blocks(text, language):
    """The code of a Markdown text in that language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
