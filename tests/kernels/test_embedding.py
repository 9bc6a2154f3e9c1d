"""docs/embedding.md does what it says: its code runs, and the example's two loops end with the same weights."""

import copy
import re
import sys
from pathlib import Path

import pecker_kernels as pk
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

DOCUMENT = (ROOT / "docs" / "embedding.md").read_text()
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
}


def test_the_three_doors_have_code():
    assert {title for title, blocks in SECTIONS.items() if blocks} == {
        "One line: adopt", "The optimizer class", "Weights spread over ranks", "Skipping the weight gradients of dead rows",
        "Norms that keep less", "The functions",
    }  # fmt: skip
    assert sum(len(blocks) for blocks in SECTIONS.values()) == DOCUMENT.count("```python") >= 9
    assert "docs/embedding.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("title", [title for title, blocks in SECTIONS.items() if blocks])
def test_code_of_the_document_runs(title):
    torch.manual_seed(0)
    namespace = {}
    for i, block in enumerate(SECTIONS[title]):
        exec(compile(block, f"docs/embedding.md: {title}, block {i + 1}", "exec"), namespace)


@pytest.fixture(scope="module")
def salun():
    pytest.importorskip("sklearn")
    import salun_style

    images, labels = salun_style.load_data()
    return salun_style, images, labels, salun_style.pretrained(images, labels)


def both(salun, dtype=torch.float32, impl="auto"):
    """(model, mask) by hand and (model, mask) with the kernels."""
    module, images, labels, start = salun
    hand, kernels = copy.deepcopy(start).to(dtype), copy.deepcopy(start).to(dtype)
    mask_by_hand = module.by_hand(hand, images.to(dtype), labels)
    return hand, mask_by_hand, kernels, module.with_kernels(kernels, images.to(dtype), labels, impl)


@pytest.mark.some(1)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2.0**-23), (torch.float64, 2.0**-52)], ids=str)
def test_the_converted_loop_ends_with_the_same_weights(salun, dtype, rounding):
    hand, mask_by_hand, kernels, mask = both(salun, dtype)
    start = copy.deepcopy(salun[3]).to(dtype)
    for (name, p), q, s in zip(hand.named_parameters(), kernels.parameters(), start.parameters()):
        keep = mask.bool(name)
        assert torch.equal(keep, mask_by_hand[name].bool())
        assert torch.equal(q[~keep], s[~keep])
        assert torch.equal(q[~keep], p[~keep])
        # 150 steps that were rounded differently: a few roundings of the way a weight has gone.
        assert float((p - q).detach().norm()) <= 16 * rounding * float((p - s).detach().norm())
    assert float((kernels[0].weight - start[0].weight).detach().norm()) > 0.1


def test_the_reference_is_bit_equal(salun):
    hand, _, kernels, _ = both(salun, impl="reference")
    assert all(torch.equal(p, q) for p, q in zip(hand.parameters(), kernels.parameters()))


def test_the_example_forgets_the_class_and_prints_it(salun, capsys):
    module, images, labels, start = salun
    _, _, kernels, _ = both(salun)
    assert module.accuracy(start, images, labels)[0] > 0.95
    forgotten, others = module.accuracy(kernels, images, labels)
    assert forgotten < 0.1
    assert others > 0.8
    module.main()
    assert "pecker_kernels: forgotten class" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["weight decay", "old momentum"])
def test_what_the_document_says_differs_does_differ(state):
    """By hand, weights outside the mask move; ours stay."""

    def run(convert):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 8)
        mask = pk.SaliencyMask.random(model.named_parameters(), 0.3)
        decay = {"weight_decay": 0.1} if state == "weight decay" else {}
        optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-2, **decay)
        if state == "old momentum":
            model(torch.ones(1, 16)).square().sum().backward()
            optimizer.step()
        optimizer = pk.adopt(optimizer, mask) if convert else optimizer
        before = model.weight.detach().clone()
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 16)).square().sum().backward()
            if not convert:
                for name, p in model.named_parameters():
                    p.grad *= mask.bool(name)
            optimizer.step()
        return (model.weight.detach() != before)[~mask.bool("weight")]

    assert run(convert=False).all()
    assert not run(convert=True).any()
