"""The tokens of a prompt beside those of the same prompt with another word."""

from torch import Tensor

from pecker_fast.errors import ModelError
from pecker_fast.networks.free import named_span
from pecker_fast.networks.text_denoiser import TextTable


def aligned_tokens(table: TextTable, row: int, other: int) -> tuple[Tensor, Tensor]:
    """(embeddings of all tokens of prompt `row`, the other prompt's at the same places), [M, D] each.

    Tokens of the word stand beside those of the other word, in order, its last one serving all further ones; what follows
    stands beside what follows. Raises ModelError where the prompts' tokens are not known.
    """
    if table.ids is None:
        raise ModelError("the tokens of the prompts are not known, so they cannot be set beside others")
    ours, theirs = table.ids[row], table.ids[other]
    length = table.embeds.shape[1]
    span, other_span = named_span(ours, theirs), named_span(theirs, ours)
    places = list(range(length))
    if span is not None and other_span is not None:
        (start, end), other_end = span, other_span[1]
        within = [min(i, other_end - 1) for i in range(start, end)]
        after = [min(i - end + other_end, length - 1) for i in range(end, length)]
        places = [*range(start), *within, *after]
    return table.embeds[row], table.embeds[other][places]
