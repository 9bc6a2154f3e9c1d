"""The networks of judges: small classifiers of small images, each rebuilt from the five numbers and the `type` in its config."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pecker_fast.errors import ModelError

SIZES = ("in_channels", "sample_size", "num_classes", "width", "features")


class Classifier(nn.Module):
    """Base: a trunk, a linear layer with ReLU that gives the features, another that gives the logits.

    Args:
        in_channels: image channels.
        sample_size: side of the square image in pixels, at least 4.
        num_classes: number of logits K.
        width: channels of the trunk's first layer.
        features: length F of the penultimate layer.
    """

    def __init__(
        self, in_channels: int, sample_size: int, num_classes: int, width: int = 16, features: int = 32
    ) -> None:
        super().__init__()
        if sample_size < 4:
            raise ModelError(f"the classifier needs images of at least 4 pixels a side, got {sample_size}")
        self.config = dict(zip(SIZES, (in_channels, sample_size, num_classes, width, features)))
        self.trunk, found = self._trunk(in_channels, sample_size, width)
        self.penultimate = nn.Linear(found, features)
        self.head = nn.Linear(features, num_classes)

    def _trunk(self, in_channels: int, sample_size: int, width: int) -> tuple[nn.Module, int]:
        """Images to features of features, and how many numbers an image has of them."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Penultimate ReLU features [N, F] of images `x` [N, C, H, W] in [-1, 1]."""
        return self.penultimate(self.trunk(x).flatten(1)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images `x` [N, C, H, W] in [-1, 1]."""
        return self.head(self.features(x))

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one pass: [N, F] and [N, K]."""
        features = self.features(x)
        return features, self.head(features)


class SmallClassifier(Classifier):
    """Convolutional: one 3×3 convolution at full size; then, until the map is 4×4, a convolution that doubles the channels (at
    most 8 × `width`) and a 2×2 max pooling. `width` 16 and `features` 64 at 1×8×8 have 38 k weights."""

    def _trunk(self, in_channels: int, sample_size: int, width: int) -> tuple[nn.Module, int]:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
        channels, size = width, sample_size
        while size // 2 >= 4:
            wider = min(2 * channels, 8 * width)
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = wider, size // 2
        return nn.Sequential(*layers), channels * size * size


class PatchMixer(Classifier):
    """Without a convolution: the image is cut into 4×4 patches, 8×8 from 16 pixels a side on; three times what stands at each place
    is mixed, then the numbers of each patch (MLP-Mixer, arXiv 2105.01601), and all patches are averaged. `width` 32 and
    `features` 32 at 1×8×8 have 17 k weights."""

    def _trunk(self, in_channels: int, sample_size: int, width: int) -> tuple[nn.Module, int]:
        side = 4 if sample_size < 16 else 8
        patch = -(-sample_size // side)
        mixers = [_Mixer(side * side, width) for _ in range(3)]
        embedding = nn.Linear(in_channels * patch * patch, width)
        return nn.Sequential(_Patches(side, patch), embedding, *mixers, nn.LayerNorm(width), _Mean()), width


class _Patches(nn.Module):
    """Images [N, C, H, W] to patches [N, side², C·patch²]; what is missing at the right and the bottom is 0."""

    def __init__(self, side: int, patch: int) -> None:
        super().__init__()
        self.side, self.patch = side, patch

    def forward(self, x: Tensor) -> Tensor:
        whole = self.side * self.patch
        x = F.pad(x, (0, whole - x.shape[3], 0, whole - x.shape[2]))
        x = x.reshape(len(x), -1, self.side, self.patch, self.side, self.patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), self.side**2, -1)


class _Mixer(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.places_norm, self.places = nn.LayerNorm(width), _mlp(tokens, tokens)
        self.numbers_norm, self.numbers = nn.LayerNorm(width), _mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.places_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.numbers(self.numbers_norm(x))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


TYPES: dict[str, type[Classifier]] = {kind.__name__: kind for kind in (SmallClassifier, PatchMixer)}
