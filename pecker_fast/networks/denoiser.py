"""One interface over the denoising networks: noise and x_0 predictions at (x_t, t, condition)."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pecker_fast import files
from pecker_fast.errors import ModelError, RecipeError
from pecker_fast.networks.free import free_rows
from pecker_fast.networks.kinds import check_class_unet
from pecker_fast.networks.marks import check_said, refuse_one_step
from pecker_fast.networks.numbers import check_numbers
from pecker_fast.networks.quiet import quiet_diffusers
from pecker_fast.networks.schedule import Schedule, load_schedule
from pecker_fast.networks.trial import trial_pass


class Denoiser:
    """A class-conditional UNet2DModel with its schedule. Conditions are class labels, int64 [N].

    guidance w ≠ 1 gives ε_∅ + w (ε_c − ε_∅) in one batched pass and needs a null class (label dropout).
    """

    def __init__(
        self, unet: nn.Module, schedule: Schedule, null_class: int | None = None, channels_last: bool = True
    ) -> None:
        self.unet = unet.eval()  # dropout stays off in all three networks: the teacher's score is what is matched
        self.schedule = schedule
        self.null_class = null_class
        self.channels_last = channels_last  # memory order of the images the network is fed
        self.free: Tensor | None = None  # [K, …], vectors that stand in the place of conditions, see `with_free`

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def num_class_embeds(self) -> int:
        return int(self.config.num_class_embeds)

    @property
    def classes(self) -> list[int]:
        """Classes a sample can be asked of: all embeddings but the null class."""
        return [c for c in range(self.num_class_embeds) if c != self.null_class]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.config.in_channels), int(height), int(width)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def base(self) -> Any:
        """The network itself: of adapters what they stand on."""
        return getattr(self.unet, "base", self.unet)

    @property
    def dtype(self) -> torch.dtype:
        """What the network's weights are kept in; images go in and out as float32."""
        network = self.base  # adapters are float32 beside whatever they adapt
        weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        return torch.float32 if weight is None else weight.dtype

    def in_weights_dtype(self, x: Tensor) -> Tensor:
        """What the network is fed: bfloat16 weights take no float32."""
        return x if self.dtype == torch.float32 else x.to(self.dtype)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.unet.named_parameters())

    def whole_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """As `named_parameters`; of adapters on a network those of the network."""
        return list(self.base.named_parameters())

    def without_adapters(self) -> Self:
        """The same function as one plain frozen network: a new one where there are adapters, else itself."""
        merged: Any = getattr(self.unet, "merged", None)
        return self if merged is None else self.with_network(merged())

    def freeze(self) -> Self:
        self.unet.requires_grad_(False)
        return self

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, gradients flow through the network and not to its weights; afterwards it is trainable again."""
        self.unet.requires_grad_(False)
        try:
            yield
        finally:
            self.unet.requires_grad_(True)

    def with_network(self, unet: nn.Module) -> Self:
        """The same interface over another network of this architecture; all but the network is shared."""
        other = copy.copy(self)
        other.unet = unet.eval()
        return other

    def with_free(self, vectors: Tensor | None) -> Self:
        """The same network, which also takes the codes of `free_codes`: vectors [K, D] in the place of class embeddings. They
        are read where the network is called, so whoever holds them may move them."""
        other = copy.copy(self)
        other.free = vectors
        return other

    def free_codes(self, which: Tensor, c: Tensor) -> Tensor:
        """Conditions [N] that mean "vector which [N] in the place of condition c [N]"."""
        return which + self.num_class_embeds

    @torch.no_grad()
    def own_vectors(self, c: Tensor) -> Tensor:
        """What stands at the place of free vectors in the network's own conditions c [N]: [N, D], float32, where a fit starts."""
        weight: Tensor = self.base.class_embedding.weight
        return weight[c].float().clone()

    def clone(self) -> Self:
        """An independent trainable copy of the network; the schedule is shared."""
        return self.with_network(copy.deepcopy(self.unet).requires_grad_(True))

    def to(self, device: torch.device | str) -> Self:
        other = self.with_network(self.unet.to(device))
        other.schedule = self.schedule.to(device)
        return other

    def to_images(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1], float32, of samples of this network."""
        return x.float().clamp(-1, 1)

    def beside(self) -> list[Tensor]:
        """What lies in memory for this network beside its weights; copies share it."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this network."""
        return self.unet.state_dict()

    def load_state(self, tensors: dict[str, Tensor], where: Path) -> None:
        """Inverse of `state_dict`. Raises ModelError naming the first tensor that does not fit."""
        load_weights(self.unet, tensors, where)

    def _forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        # The convolutions go on in the order they are fed. For C = 1 both orders are the same bytes and the strides stay as
        # they are: such a network runs in the plain order (on the CPU that is the faster one, see docs/performance.md).
        if self.channels_last:
            x_t = x_t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        with free_rows(self.unet, self.free):
            return self.unet(self.in_weights_dtype(x_t), t, class_labels=c, return_dict=False)[0]

    def output(self, x_t: Tensor, t: Tensor, c: Tensor, guidance: float = 1.0) -> Tensor:
        """The network's own output (noise, velocity or sample), [N, C, H, W], for x_t [N, C, H, W], t [N], c [N]."""
        if guidance == 1.0:
            return self._forward(x_t, t, c)
        if self.null_class is None:
            raise ModelError(
                f"guidance {guidance:g} needs a model with a null class (trained with label dropout); use guidance 1"
            )
        null = torch.full_like(c, self.null_class)
        both = self._forward(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([c, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def eps(self, x_t: Tensor, t: Tensor, c: Tensor, guidance: float = 1.0) -> Tensor:
        """Predicted noise ε(x_t, t, c), [N, C, H, W]."""
        return self.schedule.to_eps(self.output(x_t, t, c, guidance), x_t, t)

    def x0(self, x_t: Tensor, t: Tensor, c: Tensor, guidance: float = 1.0) -> Tensor:
        """f(x_t, c): conditional mean of x_0, [N, C, H, W]."""
        return self.schedule.to_x0(self.output(x_t, t, c, guidance), x_t, t)


def load_unet(folder: Path) -> nn.Module:
    """The UNet of a folder in float32: a UNet2DModel, or another of `UNETS` if its config says so. Raises ModelError."""
    path = folder / files.CONFIG_NAME
    name = files.read_object(path).get("_class_name", files.UNETS[0])
    if name not in files.UNETS:
        raise ModelError(f"{path}: {files.shown(name)} is not supported yet (only {', '.join(files.UNETS)})")
    return load_module(folder, name)


def load_module(folder: Path, class_name: str) -> nn.Module:
    """A diffusers network in float32 from its folder (config.json and safetensors weights). Raises ModelError naming it.

    The config is first built without memory and compared with the headers of the weights, so that one that lies about sizes
    costs nothing, nor do weights that belong to another.
    """
    import diffusers

    kind = getattr(diffusers, class_name)
    path = folder / files.CONFIG_NAME
    config = files.read_config(path, class_name)
    held = files.empty_weights(folder)
    files.check_size(path, config, class_name, files.size_of_shapes(tensor.shape for tensor in held.values()))
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with files.guarded(path, f"not a {class_name} diffusers can build"), quiet_diffusers(), torch.device("meta"):
        planned = kind.from_config(config)
    check_weights(planned, held, folder)
    trial_pass(planned, path)
    tensors = files.read_weights(folder)
    check_weights(planned, tensors, folder)
    with files.guarded(folder, f"not the weights of a {class_name}"), quiet_diffusers():
        module: nn.Module = kind.from_config(config)
        module.load_state_dict({name: files.widened(tensor) for name, tensor in tensors.items()})
    return module


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a module, every name and shape accounted for. Raises ModelError naming the first that does not fit."""
    check_weights(module, tensors, where)
    module.load_state_dict(tensors)


def check_weights(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Raises ModelError unless the tensors are exactly the module's, by name and shape, and finite numbers (of tensors on
    the meta device: of a kind that weights can be of)."""
    own = module.state_dict()
    for name, value in own.items():
        if name not in tensors:
            raise ModelError(f"{where}: tensor {name} is missing; the weights do not belong to this config")
        if value.shape != tensors[name].shape:
            raise ModelError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, the config wants {tuple(value.shape)}"
            )
        check_numbers(where, {name: tensors[name]} if value.is_floating_point() else {})
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise ModelError(f"{where}: tensor {extra[0]} is unknown to the config; the weights do not belong to it")


def check_class_folder(folder: Path, result: bool = False) -> tuple[Path, Schedule]:
    """(folder of the UNet, schedule) of a class-conditional model's folder. No weights are read.

    result: a one-step generator is wanted, to be drawn from.

    Raises ModelError for unconditional models, one-step generators, kinds that are not followed, anything damaged or missing.
    """
    unet_folder = files.check_model_folder(folder)
    if not result:
        refuse_one_step(folder)
    name = files.read_object(unet_folder / files.CONFIG_NAME).get("_class_name")
    if name != files.UNETS[0]:
        raise ModelError(f"{folder}: a {name} without a text-to-image model_index.json; fetch the whole model")
    config = files.read_config(unet_folder / files.CONFIG_NAME, files.UNETS[0])
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    schedule = load_schedule(scheduler_folder)
    check_said(folder, schedule, scheduler_folder)
    check_class_unet(config, schedule.num_timesteps, unet_folder / files.CONFIG_NAME)
    return unet_folder, schedule


def load_denoiser(folder: Path, null_class: int | None = None, result: bool = False) -> Denoiser:
    """A model folder (see docs/design/0001-architecture.md) as a Denoiser on the CPU in float32.

    null_class: index of the label-dropout embedding; None = what the folder's model.json says, if it has one.
    result: a one-step generator is wanted, to be drawn from.
    Raises ModelError as `check_class_folder`, and for weights that do not fit; RecipeError for a null_class out of range.
    """
    unet_folder, schedule = check_class_folder(folder, result)
    unet: Any = load_unet(unet_folder)
    count = int(unet.config.num_class_embeds)
    if null_class is not None and null_class >= count:
        raise RecipeError(f"null_class: {null_class} is out of range, the model has class embeddings 0 to {count - 1}")
    if null_class is None:
        null_class = _null_class(folder / "model.json", count)
    return Denoiser(unet, schedule, null_class)


def _null_class(card: Path, count: int) -> int | None:
    """What a model.json says of the label-dropout embedding; raises ModelError where that is none of the embeddings."""
    null_class: int | None = (files.read_config(card, "model.json") if card.exists() else {}).get("null_class")
    if null_class is not None and null_class >= count:
        raise ModelError(
            f"{card}: null_class {null_class} is out of range, the model has class embeddings 0 to {count - 1}"
        )
    return null_class
