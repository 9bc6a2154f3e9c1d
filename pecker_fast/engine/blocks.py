"""Regional torch.compile (`engine.compile: blocks`): the repeated blocks of a network, each compiled as a piece of its own."""

from torch import nn

from pecker_fast.errors import RecipeError

# One piece of code serves all blocks of a shape; θ, ψ and φ run it with and without gradients, on one branch and on both. Where
# weight gradients are skipped the live rows are part of it: a piece for each block of θ, and for each mask.
VARIANTS = 512


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost blocks that diffusers' networks repeat: residual blocks, and transformer blocks or bare attention."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, ResnetBlock2D | BasicTransformerBlock | Attention):
                found.append(child)
            else:
                walk(child)

    walk(network)
    return found


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks in place; parameters, their names and copies of the network are as before (a copy is not compiled).

    Raises RecipeError for a network that has none.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        raise RecipeError(f"engine.compile: {type(network).__name__} has no repeated blocks; use engine.compile=none")
    import torch._dynamo

    # past its limit dynamo would go on without compiling, and say nothing
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(dynamic=False)
