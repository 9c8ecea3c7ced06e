"""The noise attacks on training, against their formula, and the measure of batch noise."""

import copy

import pytest
import timm
import torch
from conftest import randomize
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from training import THIN

import timm_iebn
from timm_iebn.layers import SyncBatchNorm2d, SyncBatchNormAct2d
from timm_iebn.ops import backend
from timm_iebn.recipe import Recipe, RecipeError
from timm_iebn.run_log import columns_of
from timm_iebn.training import Trainer
from timm_iebn.training.attacks import Strangers, add_constant_noise, noise_in_eval
from timm_iebn.training.batch_noise import batch_noise
from timm_iebn.training.data import load_images
from timm_iebn.training.loaders import Share, choose_images

NORMS = [
    torch.nn.BatchNorm2d,
    BatchNormAct2d,
    SyncBatchNorm2d,
    SyncBatchNormAct2d,
    timm_iebn.IEBN2d,
    timm_iebn.IEBNAct2d,
]
SCALE, OFFSET = 0.6, -0.4


def formula(norm, x, training):
    """The norm with noise in float64, from the definition; its tensors are those of `norm`."""
    mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    if not training:
        mean, var = norm.running_mean.double(), norm.running_var.double()
    xhat = (x - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
    y = xhat * SCALE + OFFSET
    if isinstance(norm, timm_iebn.IEBN2d):
        y = y * torch.sigmoid(norm.gate_weight.double() * x.mean((2, 3)) + norm.gate_bias.double())[..., None, None]
    if norm.weight is not None:
        y = y * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    return torch.nn.functional.silu(y) if hasattr(norm, "act") else y


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_norm_gets_noise_in_training_alone(dtype, kind, affine):
    act = dict(act_layer=torch.nn.SiLU) if "Act" in kind.__name__ else {}  # smooth: no value within rounding of an edge
    norm = randomize(kind(6, affine=affine, **act)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    clean, x = copy.deepcopy(norm), torch.randn(4, 6, 5, 3, dtype=dtype)
    assert add_constant_noise(norm, SCALE, OFFSET) is norm and norm.state_dict().keys() == clean.state_dict().keys()
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]

    found = []
    for function in (lambda t: norm(t), lambda t: formula(norm, t.double(), True)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        found.append((y, *torch.autograd.grad((y.double() * weights).sum(), [leaf, *norm.parameters()])))
    assert found[0][0].dtype == dtype
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance * 10)

    clean(x)  # whose running statistics move alike
    norm.eval(), clean.eval()
    assert torch.equal(norm(x), clean(x))
    with noise_in_eval(norm):
        exact = formula(norm, x.double(), False)
        torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(norm(x), clean(x))


@pytest.mark.parametrize(
    "name", ["resnet20_cifar", "resnet20_cifar_iebn", "mobilenetv2_cifar_iebn", "resnet20_cifar_se"]
)
def test_no_noise_changes_nothing_and_noise_reaches_every_norm(name):
    net = randomize(timm.create_model(name, num_classes=5)).double()
    noisy, x = add_constant_noise(copy.deepcopy(net), 1.0, 0.0), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(noisy(x), net(x))
    norms = [m for m in noisy.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(type(m).__name__.startswith("Noisy") for m in norms)


def test_fused_blocks_have_the_noise_too():
    net = add_constant_noise(randomize(timm.create_model("resnet20_cifar_iebn", num_classes=5)), SCALE, OFFSET)
    x, found = torch.randn(2, 3, 32, 32), []
    for chosen in ("eager", "triton"):
        with backend(chosen):
            found.append(copy.deepcopy(net)(x))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_an_average_of_weights_is_evaluated_without_noise():
    net = add_constant_noise(timm.create_model("resnet20_cifar_iebn", num_classes=5), SCALE, OFFSET)
    ema = ModelEmaV3(net).module
    plain, x = timm.create_model("resnet20_cifar_iebn", num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    plain.load_state_dict(ema.state_dict())
    torch.testing.assert_close(ema(x), plain(x))


def test_what_cannot_be_attacked_is_named():
    with pytest.raises(ValueError, match="no batch norm or IEBN"):
        add_constant_noise(torch.nn.Conv2d(3, 3, 1), SCALE, OFFSET)
    with pytest.raises(ValueError, match=r"can't attack 0 \(BatchNorm1d\)"):
        add_constant_noise(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), SCALE, OFFSET)


# ---- strangers


def recipe(**changes):
    small = dict(model="resnet20_cifar_iebn", model_args=THIN)
    return Recipe(**small | dict(data="digits", batch_size=700, epochs=1, milestones=(), lr=0.01) | changes)


def test_strangers_are_other_images_normalised_alike_and_the_same_ones_again():
    share = Share(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    strangers = Strangers(recipe(mix_data="digits", mix_images=6), share, (3, 16, 16))
    own = torch.randn(2, 3, 16, 16)
    joined = strangers.join(own, 3, 5)
    assert joined.shape == (8, 3, 16, 16) and torch.equal(joined[:2], own)
    pixels = joined[2:] * torch.tensor(share.std).view(-1, 1, 1) + torch.tensor(share.mean).view(-1, 1, 1)
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2])  # grey
    assert -1e-6 < pixels.min() and pixels.max() < 1 + 1e-6
    assert torch.equal(strangers.join(own, 3, 5), joined)
    assert not torch.equal(strangers.join(own, 3, 6), joined) and not torch.equal(strangers.join(own, 4, 5), joined)


def test_strangers_enter_the_statistics_and_not_the_loss(tmp_path):
    found = {}
    for name, changes in dict(alone={}, joined=dict(mix_data="digits", mix_images=300)).items():
        trainer = Trainer(recipe(**changes), tmp_path / name)
        sizes = []
        trainer.workload.net.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        trainer.train_epoch()
        found[name] = sizes, trainer.sums[2].item(), trainer.workload.net.bn1.running_mean
        trainer.lock.release()
    assert found["alone"][0] == [700, 700] and found["joined"][0] == [1000, 1000]
    assert found["alone"][1] == found["joined"][1] == 1400
    assert not torch.allclose(found["alone"][2], found["joined"][2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mix_images=4), "mix_images: 4 images of mix_data '': set both or none"),
        (dict(mix_data="digits"), "mix_images: 0 images of mix_data 'digits': set both or none"),
        (dict(mix_data="digits", mix_images=-1), "mix_images: must not be negative, got -1"),
        (dict(noise_scale=float("inf")), "noise_scale: must be finite, got inf"),
        (dict(noise_offset=float("nan")), "noise_offset: must be finite, got nan"),
        (dict(batch_noise_images=700), "batch_noise_images: .*700"),
        (dict(mix_data="digits", mix_images=3, grad_accumulation=2), "mix_images: 3 can't be shared by 2"),
        (dict(mix_data="nowhere", mix_images=2), "data: expected 'digits'.*got 'nowhere'"),
    ],
    ids=lambda v: "" if isinstance(v, str) else str(v),
)
def test_an_impossible_attack_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        Trainer(recipe(**changes), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_noise_is_evaluated_too(tmp_path):
    noise = dict(noise_scale=0.5, noise_offset=0.5, batch_size=48, batch_noise_images=80)
    trainer = Trainer(recipe(**noise), tmp_path / "out")
    row = trainer.fit()
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert [*row] == columns_of(trainer.recipe)
    assert 0 <= row["test_top1_with_noise"] <= 100 and row["feature_noise"] > 0 and row["gradient_noise"] > 0
    images, labels = choose_images(load_images(trainer.recipe, "test"), 359, trainer.workload.test_loader.share, {})
    add_constant_noise(net.eval(), 0.5, 0.5)
    with torch.no_grad(), noise_in_eval(net):
        right = (net(images).argmax(1) == labels).double().mean().item()
    assert 100 * right == pytest.approx(row["test_top1_with_noise"], abs=0.3)


# ---- batch noise


def feature_and_gradient(net, batch, label):
    """Of the first image of `batch`."""
    loss = torch.nn.functional.cross_entropy(net(batch)[:1], label)
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    return net.global_pool(net.forward_features(batch))[0].detach(), torch.cat([g.flatten() for g in gradient])


def test_batch_noise_is_that_of_the_definition_and_leaves_the_network_alone():
    net = randomize(timm.create_model("resnet20_cifar_iebn", num_classes=5)).double()
    images, labels = torch.randn(12, 3, 32, 32, dtype=torch.float64), torch.randint(5, (12,))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = batch_noise(net, images, labels, anchors=3, batch_size=4, seed=7)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    generator, sums = torch.Generator().manual_seed(7), torch.zeros(2, 2, dtype=torch.float64)
    for anchor in range(3):
        draws = []
        for _ in range(2):
            company = torch.randint(3, 12, (3,), generator=generator)
            batch = torch.cat([images[anchor, None], images[company]])
            draws.append(feature_and_gradient(net, batch, labels[anchor, None]))
        for i, (first, second) in enumerate(zip(*draws, strict=True)):
            sums[i] += torch.stack([(first - second).square().sum() / 2, first @ second])
    assert list(found.values()) == pytest.approx((sums[:, 0] / sums[:, 1]).tolist(), rel=1e-6)


class OneNorm(torch.nn.Module):
    """The least network of timm's kind."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = torch.nn.BatchNorm2d(3, dtype=torch.float64), torch.nn.Linear(3, 5, dtype=torch.float64)

    def forward_features(self, x):
        return self.norm(x)

    def forward_head(self, x, pre_logits=False):
        # softplus is never 0, as ReLU is for all of an image of outliers
        return F.softplus(x).mean((2, 3)) if pre_logits else self.fc(self.forward_head(x, pre_logits=True))

    def global_pool(self, x):
        return self.forward_head(x, pre_logits=True)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_batch_noise_is_the_variance_over_all_company_by_the_squared_mean_whatever_its_size(spread):
    net, label = OneNorm(), torch.tensor([2])
    anchor, company = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    company = anchor + spread * (company + 1)
    images = torch.cat([anchor.expand(3000, -1, -1, -1), company])
    found = batch_noise(net, images, label.expand(3002), anchors=3000, batch_size=2)
    each = [feature_and_gradient(net, torch.cat([anchor, other[None]]), label) for other in company]
    for noise, draws in zip(found.values(), zip(*each, strict=True), strict=True):
        mean = torch.stack(draws).mean(0)
        exact = ((draws[0] - mean).square().sum() / mean.square().sum()).item()
        assert noise == pytest.approx(exact, rel=0.1)


def test_a_network_that_sees_no_batch_has_no_batch_noise():
    net = timm_iebn.freeze_batch_norm_2d(randomize(timm.create_model("resnet20_cifar", num_classes=5)))
    found = batch_noise(net, torch.randn(20, 3, 32, 32), torch.randint(5, (20,)), anchors=2, batch_size=8)
    assert found["feature_noise"] < 1e-9 and found["gradient_noise"] < 1e-9
