"""What a run trains, made of its recipe: data, network and optimizer, and the state of these that checkpoints hold."""

import gc
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..convert import convert_sync_batchnorm
from ..recipe import Recipe, RecipeError
from .attacks import Strangers, add_constant_noise
from .batch_noise import ANCHORS, check_size
from .build import check_model, create_mixup, create_model, create_optimizer, create_scheduler, try_model
from .data import Images, fingerprint, open_data
from .loaders import choose_images, make_loader, make_share
from .processes import on_main


class Workload:
    """Everything that a recipe asks for, on the devices of `accelerator`; all of it is tried, nothing is written.

    Args:
        recipe: what to make.
        accelerator: what it runs on.
        data_dir: where the data is on this machine; see `data.open_split`.
        mix_data_dir: the same for the recipe's `mix_data`.
        workers: processes that load images, where the recipe's loader is timm's.

    Raises:
        RecipeError: something of it is impossible.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, data_dir: str = "", mix_data_dir: str = "", workers: int = 0
    ) -> None:
        self.accelerator = accelerator
        check_model(recipe)
        train_split, test_split, self.classes = open_data(recipe, data_dir)
        self.data = {"--data-dir": fingerprint(train_split, self.classes)}  # by the option that says where it is
        in_chans = train_split.images.shape[1] if isinstance(train_split, Images) else 3
        net = create_model(recipe, len(self.classes), in_chans)
        if recipe.batch_noise_images and accelerator.num_processes > 1:
            raise RecipeError(f"batch_noise_images: {recipe.batch_noise_images} are measured in one process only")
        share, self.data_config = make_share(net, train_split, accelerator, recipe.channels_last, recipe.data_config)
        self.train_loader = make_loader(train_split, share, self.data_config, recipe, workers)
        self.test_loader = make_loader(test_split, share, self.data_config, None, workers)
        if accelerator.num_processes > 1 and recipe.sync_norms:
            convert_sync_batchnorm(net)
        if recipe.has_noise:
            try:
                add_constant_noise(net, recipe.noise_scale, recipe.noise_offset)
            except ValueError as e:
                raise RecipeError(f"noise_scale, noise_offset: {recipe.model!r}: {e}") from e
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.net = net.to(accelerator.device, memory_format=layout)
        try_model(recipe, net, self.data_config["input_size"], len(self.classes))
        size = self.data_config["input_size"]
        self.strangers = None
        if recipe.mix_data:
            self.strangers = Strangers(recipe, share, size, mix_data_dir)
            self.data["--mix-data-dir"] = self.strangers.data
        if self.data != on_main(lambda: self.data):
            raise RecipeError(f"data: this process sees other images than the main one, see {' and '.join(self.data)}")
        self.noise_images = None
        if count := recipe.batch_noise_images:
            try:
                check_size(count, ANCHORS, self.train_loader.batch_size)
                self.noise_images = choose_images(train_split, count, share, self.data_config)
            except ValueError as e:
                raise RecipeError(f"batch_noise_images: {e}") from e
        self.ema = ModelEmaV3(net, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.mixup = create_mixup(recipe, len(self.classes))
        optimizer = create_optimizer(recipe, self.net)
        self.updates_per_epoch = len(self.train_loader) // recipe.grad_accumulation
        self.scheduler = create_scheduler(recipe, optimizer, self.updates_per_epoch)
        # accelerate puts autocast into the forward of what it prepares: that of a wrapper, evaluation is in float32
        self.model, self.optimizer = accelerator.prepare(nn.Sequential(net), optimizer)

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and saved."""
        return self.ema.module if self.ema else self.net

    def release(self) -> None:
        """Lets go of the network as accelerate wraps it, before the process group ends.

        As the last to hold the group, DistributedDataParallel would keep the GIL while it waits for the group's
        threads, one of which may need it: the process would hang.
        """
        self.model = None
        self.accelerator.free_memory()
        gc.collect()  # a compiled network refers to itself

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of network, optimizer, loss scaler and averaged weights."""
        scaler = self.accelerator.scaler
        return dict(
            model=self.net.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler else None,
            ema=self.ema.module.state_dict() if self.ema else None,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, values in self.optimizer.optimizer.state.items():
            for key, value in values.items():  # in the parameter's layout, or sums would go in another order
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
