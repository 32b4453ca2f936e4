"""The training of DiT4SR (paper Section 5.1), or of a baseline over the same backbone, as a LightningModule."""

import copy
from collections.abc import Callable
from typing import Any

from diffusers import SD3Transformer2DModel
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from dit4sr_pl.backbone.fingerprints import check_parts
from dit4sr_pl.backbone.flow import LOGIT_NORMAL, RectifiedFlow, TimestepDensity, interpolate
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.common.hashing import weights_hash
from dit4sr_pl.data.module import SuperResolutionData
from dit4sr_pl.images.resize import enlarge
from dit4sr_pl.model import TrainedPart, load_part
from dit4sr_pl.model.checkpoint_files import checkpoint_file
from dit4sr_pl.model.compilation import compile_blocks
from dit4sr_pl.model.lr_stream import ConvInjection
from dit4sr_pl.model.trained_part import base_of, check_base, check_network_config, fit_part, fit_state
from dit4sr_pl.restoration.restorer import Restorer
from dit4sr_pl.restoration.sampler import Sampler
from dit4sr_pl.training.finite_loss import FiniteLoss, StepLoss
from dit4sr_pl.training.learning_rate import CONSTANT, LearningRateSchedule, share_done
from dit4sr_pl.training.lightning_state import (
    averages_weights,
    count_batches_anew,
    drop_unread_states,
    keep_options,
    let_trainer_unscale,
    weights_before_averaging,
)
from dit4sr_pl.training.step_inputs import StepInputs


class SuperResolutionModule(LightningModule):
    """The module that trains the trained part of a network over a frozen SD3 pipeline.

    Only the trained part (`lr_stream` or `controlnet`) is a submodule, so Lightning counts, averages, optimizes, saves
    and sends between devices nothing else. The frozen parts are plain attributes, `net` and `backbone`.

    Args:
        backbone: the frozen pipeline.
        network: makes the network over the backbone's transformer.
        checkpoint: file of a trained part to start from (fine-tuning), or the name of one in this package. Its
            switches must be this network's; its factor of LR Injection may be another. None: the network's own
            initial weights.
        weighting: the loss weighting, see `RectifiedFlow`.
        optimizer: makes the optimizer from the parameters.
        sampler: the sampler that validation restores with.
        compile: whether the network's blocks are compiled.
        seed: seed of the run. Timestep and noise are functions of it and of a sample's position in the run.
        timesteps: density of the timesteps.
        schedule: factor of the optimizer's learning rate over the run.
        conv_learning_rate: learning rate of LR Injection's convolutions, as a factor of the optimizer's.

    Attributes:
        taught_by: hash of the weights of the teacher; None: there is none.
    """

    taught_by: str | None = None

    def __init__(
        self,
        backbone: Backbone,
        network: Callable[[SD3Transformer2DModel], nn.Module],
        checkpoint: str | None,
        weighting: str,
        optimizer: Callable[[Any], Optimizer],
        sampler: Sampler,
        compile: bool,
        seed: int,
        timesteps: TimestepDensity = LOGIT_NORMAL,
        schedule: LearningRateSchedule = CONSTANT,
        conv_learning_rate: float = 1.0,
    ):
        super().__init__()
        self.backbone = backbone
        self.flow = RectifiedFlow(backbone.scheduler, weighting, timesteps)
        self.optimizer, self.schedule = optimizer, schedule
        self.conv_learning_rate = conv_learning_rate
        self.seed = seed
        net = network(backbone.transformer)
        self.began_with = None  # hash of the weights of `checkpoint`
        if checkpoint is not None:
            part = self.start_from(net, checkpoint)
            check_parts(backbone.name, backbone.parts, part.base.get("parts", {}), checkpoint)
            self.began_with = weights_hash(part.state)
        self.base = base_of(net, backbone.name)  # read before weights are sharded
        self.add_module(net.trained_name, net.trained.float())  # float32 also under autocast
        object.__setattr__(self, "net", net)  # a plain attribute, not a submodule
        if compile:
            compile_blocks(net)
        self.velocity = net.__call__  # `forward` would skip FSDP's hooks
        self.restorer = Restorer(net, backbone, sampler.for_student(getattr(net, "student", None)))
        self.step_inputs = StepInputs.of(backbone, self.flow, seed)
        self.finite_loss, self.mean_loss = FiniteLoss(), StepLoss()

    def __deepcopy__(self, memo: dict) -> "SuperResolutionModule":
        """Returns a copy without the trainer that shares the frozen weights; Lightning's averaging makes one."""
        # A base with LoRA has weights that are trained, in modules that are copied.
        frozen = (module for module in self.net.base.modules() if not has_trained(module))
        memo |= {id(module): module for module in frozen}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def start_from(self, net: nn.Module, checkpoint: str) -> TrainedPart:
        """Loads the weights that the training starts from; errors are those of `start_from_checkpoint`."""
        return start_from_checkpoint(net, checkpoint, may_differ=("injection_scale",))

    @property
    def bases(self) -> list[SD3Transformer2DModel]:
        """The bases of all networks that run over the backbone's; with LoRA they are others."""
        return [self.net.base]

    def setup(self, stage: str) -> None:
        """Moves the backbone, which Lightning does not know, to the device; workers make what steps need."""
        self.backbone.to(self.device)
        self.backbone.quantize(*self.bases)
        if isinstance(self.trainer.datamodule, SuperResolutionData):
            self.trainer.datamodule.step_inputs = self.step_inputs

    def on_train_start(self) -> None:
        """Gives the optimizer the options of this run: with a checkpoint's state come those that it was saved with."""
        (optimizer,) = self.trainer.optimizers
        for group in optimizer.param_groups:
            group.update(optimizer.defaults)
        learning_rate = optimizer.defaults["lr"]
        self.set_learning_rates(learning_rate)
        self.factor = self.schedule.over(self.trainer.max_steps, learning_rate)

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        """Sets the learning rates of the step."""
        if not self.schedule.varies:
            return
        factor = self.factor(self.global_step) * self.schedule.decayed(share_done(self.trainer))
        learning_rate = self.trainer.optimizers[0].defaults["lr"] * factor
        self.set_learning_rates(learning_rate)
        self.log("train/learning_rate", learning_rate)

    def set_learning_rates(self, learning_rate: float) -> None:
        """Gives every group of the optimizer this learning rate times its factor."""
        groups = self.trainer.optimizers[0].param_groups
        for factor, group in zip(self.group_factors, groups, strict=True):
            group["lr"] = learning_rate * factor

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Returns the loss of a batch from `SuperResolutionData`, and logs it."""
        if "noise" not in batch:  # it comes from another loader than `SuperResolutionData`'s
            inputs = self.step_inputs(batch)
            batch = batch | {name: values.to(self.device, non_blocking=True) for name, values in inputs.items()}
        loss = self.loss(batch)
        # The mean over all devices: they stop together, and logs do not depend on their number.
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.finite_loss.add(mean, self.global_step)
        self.batch_loss, self.step_loss = mean, self.mean_loss.add(mean, self.global_step)
        self.log("train/loss", self.step_loss, prog_bar=True)
        return loss

    def loss(self, batch: dict) -> Tensor:
        """Returns the rectified-flow loss of a batch that has all inputs of a step."""
        noise, sigma = batch["noise"], batch["sigma"]
        clean, lr_latent = self.latents(batch)
        prompts = self.embeddings(batch)
        velocity = self.velocity(interpolate(clean, noise, sigma), lr_latent, batch["timestep"], *prompts)
        return self.flow.loss(velocity, clean, noise, sigma).mean()

    def latents(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Returns the latents of the HR images and of the enlarged LR images, encoded now or before the run."""
        if "clean" in batch:
            return batch["clean"], batch["lr_latent"]
        return self.backbone.coder.encode(batch["hr"], batch.get("posterior_noise")), self.lr_latent(batch)

    def lr_latent(self, batch: dict) -> Tensor:
        """Returns the latents of the enlarged LR images."""
        if "lr_latent" in batch:
            return batch["lr_latent"]
        return self.backbone.coder.encode(enlarge(batch["lr"], batch["hr"].shape[-2:]))

    def embeddings(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Returns prompt embeddings and pooled ones, of the batch's prompts or as they came with the batch."""
        if "embeds" in batch:
            return batch["embeds"].to(self.backbone.dtype), batch["pooled"].to(self.backbone.dtype)
        prompts = [self.step_inputs.prompt(caption) for caption in batch["prompt"]]
        return self.backbone.prompts.of_step(prompts, self.device)

    def prompts(self, captions: set[str]) -> set[str]:
        """Returns all prompts whose embeddings steps over these captions need."""
        return captions

    def on_validation_start(self) -> None:
        """Checks the last loss, so that no weights are scored after an infinite one."""
        self.finite_loss.check()

    def on_train_end(self) -> None:
        """Checks the last loss."""
        self.finite_loss.check()

    def validation_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Returns the restored images `(B, 3, H, W)`, which `ValidationScores` measures."""
        return self.restorer(batch["lr"], batch["hr"].shape[-2:], batch["prompt"], batch["name"], self.seed)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Adds the network config and the base's name and fingerprint to a checkpoint, after a check of the last
        loss."""
        self.finite_loss.check()
        checkpoint["settings"] = self.net.network_config()
        checkpoint["base"] = self.trained_over
        checkpoint["optimizer"] = self.optimizer_name

    @property
    def trained_over(self) -> dict:
        """Name and fingerprint of the base, and fingerprints of the backbone's other parts, as files record them."""
        return self.base | {"parts": self.backbone.parts}

    @property
    def optimizer_name(self) -> str:
        """Name of the optimizer's class."""
        return getattr(self.optimizer, "func", self.optimizer).__name__

    def adapt(self, checkpoint: dict) -> None:
        """Makes a checkpoint that is about to be loaded one of this run: what the config says holds, whatever was then.

        Raises:
            ValueError: it has the state of another optimizer, or of one with other groups of weights.
        """
        if (theirs := checkpoint.get("optimizer", self.optimizer_name)) != self.optimizer_name:
            raise ValueError(
                f"{self.trainer.ckpt_path}: has the state of {theirs}, and this run has the optimizer "
                f"{self.optimizer_name}; take the same, or begin with the weights alone (model.checkpoint=FILE)"
            )
        (state,) = checkpoint["optimizer_states"]
        theirs = [len(group["params"]) for group in state["param_groups"]]
        ours = [len(weights) for _, weights in self.parameter_groups()]
        if theirs != ours:
            raise ValueError(
                f"{self.trainer.ckpt_path}: its optimizer has groups of {theirs} weights, and this run's of {ours}; "
                "set model.conv_learning_rate (1.0: no group of its own) and the losses as then, or begin with the "
                "weights alone (model.checkpoint=FILE)"
            )
        count_batches_anew(self.trainer, checkpoint)
        drop_unread_states(self.trainer, checkpoint)
        keep_options(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Prepares a checkpoint for loading: checks that it fits, drops the states of callbacks that this run does not
        have, and takes averaged weights only if this run averages, too.

        Raises:
            ValueError: the checkpoint does not fit the network or its base; the message names the file.
        """
        self.adapt(checkpoint)
        trained = weights_before_averaging(checkpoint)
        if trained is not None and not averages_weights(self.trainer):
            checkpoint["state_dict"] = trained
        check_network_config(self.net, checkpoint["settings"], self.trainer.ckpt_path)
        prefix = f"{self.net.trained_name}."
        weights = checkpoint["state_dict"].items()
        state = {name.removeprefix(prefix): weight for name, weight in weights if name.startswith(prefix)}
        fit_part(self.net, TrainedPart(checkpoint["settings"], checkpoint["base"], state), self.trainer.ckpt_path)

    def parameter_groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Returns the trained weights in groups, each with its learning rate as a factor of the optimizer's."""
        weights = list(self.net.trained.parameters())
        modules = [] if self.conv_learning_rate == 1 else self.net.trained.modules()
        convs = [weight for module in modules if isinstance(module, ConvInjection) for weight in module.parameters()]
        ids = {id(weight) for weight in convs}
        others = [weight for weight in weights if id(weight) not in ids]
        return [(1.0, others), *([(self.conv_learning_rate, convs)] if convs else [])]

    def configure_optimizers(self) -> Optimizer:
        """Returns the optimizer over all groups; gradients can be clipped also where it is fused."""
        self.group_factors, groups = zip(*self.parameter_groups(), strict=True)
        optimizer = self.optimizer([{"params": weights} for weights in groups])
        let_trainer_unscale(optimizer)
        return optimizer


def has_trained(module: nn.Module) -> bool:
    """Returns whether a parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def start_from_checkpoint(
    net: nn.Module, checkpoint: str, may_differ: tuple[str, ...] = (), new: tuple[str, ...] = ()
) -> TrainedPart:
    """Loads the weights of a trained part into a network, which keeps its own config, and returns the part.

    Args:
        net: the network.
        checkpoint: file of the trained part, or the name of one in this package.
        may_differ: keys of the network's config in which the trained part's may be another.
        new: beginnings of the names of weights that the trained part may lack; they stay as they are.

    Raises:
        ValueError: the trained part has another network config or base; the message names the file.
    """
    part = load_part(checkpoint_file(checkpoint))
    check_base(net.base, part.base, checkpoint)
    check_network_config(net, part.network_config, checkpoint, may_differ)
    ours = {name: weight for name, weight in net.trained.state_dict().items() if name.startswith(new)} if new else {}
    fit_state(net.trained, ours | part.state, checkpoint)
    return part
