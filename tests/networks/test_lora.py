"""ψ as adapters on φ: equal at the start, row by row in one pass afterwards, and no trace of it in φ."""

import copy
from functools import partial

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from pecker_fast import files
from pecker_fast.errors import ModelError
from pecker_fast.networks.denoiser import Denoiser, load_denoiser, load_weights
from pecker_fast.networks.lora import ATTENTION, AdaptedUNet, LowRank, pair_x0, target_layers, with_adapters

N, RANK = 3, 4
KINDS = ("digits", "sd1", "sdxl")


class TextLike(Denoiser):
    """Conditions are rows of a table of text embeddings, as in a text-to-image model; the last is the null condition."""

    def __init__(self, unet, schedule, null_class=None, channels_last=True):
        super().__init__(unet, schedule, null_class, channels_last)
        g = torch.Generator().manual_seed(3)
        self.embeds = torch.randn(4, 7, unet.config.cross_attention_dim, generator=g)
        self.pooled = torch.randn(4, 16, generator=g)

    def clone(self):
        return type(self)(copy.deepcopy(self.unet).requires_grad_(True), self.schedule, self.null_class)

    def _forward(self, x_t, t, c):
        added = {"text_embeds": self.pooled[c], "time_ids": torch.full((len(c), 6), 8.0)}
        embeds = self.embeds[c].to(x_t.dtype)
        return self.unet(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]


def conditional_unet(kind):
    from diffusers import UNet2DConditionModel

    keys = {
        "sd1": {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
        },
        "sdxl": {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
    }[kind]
    shared = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**shared, block_out_channels=(16, 32), cross_attention_dim=16, **keys)


def load_teacher(kind):
    digits = load_denoiser(files.resolve_model("digits"))
    if kind == "digits":
        digits.null_class = digits.num_class_embeds - 1
        return digits.freeze()
    return TextLike(conditional_unet(kind), digits.schedule, null_class=3).freeze()


def stir(score, size=0.05):
    """Move ψ off φ."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in score.named_parameters():
            if name.endswith("lora_b"):
                p.copy_(size * torch.randn(p.shape, generator=g))
    return score


@pytest.fixture(params=KINDS)
def teacher(request):
    return load_teacher(request.param)


@pytest.fixture
def inputs(teacher):
    """(x_t, t, c_p, c_g); f(x_t, c) divides by a_t, so late timesteps would show the rounding of a_t alone."""
    x = torch.randn(N, *teacher.sample_shape, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([38, 300, 500]), torch.tensor([1, 1, 2]), torch.tensor([0, 0, 2])


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().norm() / b.detach().norm()) <= tolerance


def trace(unet):
    """All that a network is besides its numbers."""
    return [(name, sorted(vars(module)), len(module._forward_hooks)) for name, module in unet.named_modules()]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_start_is_the_teacher_bit_for_bit(teacher, inputs, targets):
    x, t, c, _ = inputs
    score = with_adapters(teacher, RANK, targets)
    assert type(score) is type(teacher)
    assert score.sample_shape == teacher.sample_shape
    for w in (1.0, 3.0):
        with torch.no_grad():
            want = teacher.eps(x, t, c, w)
            assert torch.equal(score.eps(x, t, c, w), want)
            assert torch.equal(score.x0(x, t, c, w), teacher.x0(x, t, c, w))
            assert not close(stir(with_adapters(teacher, RANK, targets)).eps(x, t, c, w), want, 1e-3)


def test_parameters_are_the_adapters_alone(teacher):
    score, weights = with_adapters(teacher, RANK), [name for name, _ in teacher.named_parameters()]
    named = score.named_parameters()
    assert {name.rpartition(".")[2] for name, _ in named} == {"lora_a", "lora_b"}
    order = [weights.index(name.replace("lora_a", "weight")) for name, _ in named if name.endswith("lora_a")]
    matrices = [i for i, (n, p) in enumerate(teacher.named_parameters()) if p.dim() > 1 and "class_embedding" not in n]
    assert order == matrices
    assert all(p.dtype == torch.float32 and p.requires_grad for _, p in named)
    assert not any(p.requires_grad for _, p in teacher.named_parameters())
    assert list(score.unet.state_dict()) == [name for name, _ in named]
    few = [name for name, _ in with_adapters(teacher, RANK, "attention").named_parameters()]
    assert few == [name for name, _ in named if name.rpartition(".")[0].endswith(ATTENTION)]


def test_starts_are_a_function_of_the_seed():
    teacher = load_teacher("sd1")
    a, b, c = (with_adapters(teacher, RANK, seed=seed).unet.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if name.endswith("lora_a"))
    assert not torch.equal(
        *(a[f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{q}.lora_a"] for q in ("to_q", "to_k"))
    )


def test_the_rank_is_no_more_than_a_layer_can_use():
    teacher = load_teacher("digits")
    adapters = {name: m for name, m in with_adapters(teacher, 16).unet.named_modules() if isinstance(m, LowRank)}
    assert adapters["conv_in"].lora_a.shape == (9, 1, 3, 3)
    assert adapters["conv_out"].lora_b.shape == (1, 1, 1, 1)
    assert adapters["down_blocks.0.resnets.0.conv1"].lora_a.shape[0] == 16


def test_rows_of_the_gate_are_psi_and_the_others_phi(teacher, inputs):
    x, t, c, _ = inputs
    score = stir(with_adapters(teacher, RANK))
    with torch.no_grad():
        phi, psi = teacher.output(x, t, c), score.output(x, t, c)
        for gate in ((1, 0, 1), (0, 1, 1), (0, 0, 1), (0, 1, 0), (0, 0, 0), (1, 1, 1)):
            on = torch.tensor(gate, dtype=torch.bool)
            with score.unet.rows(on.float()):
                mixed = teacher.output(x, t, c)
            assert torch.equal(mixed[~on], phi[~on])  # the same batch of the same base: not even rounding differs
            assert close(mixed[on], psi[on]) if on.any() else True
        with score.unet.rows(slice(1, N)):
            mixed = teacher.output(x, t, c)
        assert torch.equal(mixed[:1], phi[:1])
        assert close(mixed[1:], psi[1:])


@pytest.mark.some(4)
@pytest.mark.parametrize("guidance", [(1.0, 1.0), (4.5, 1.0), (1.0, 2.0), (4.5, 2.0)])
def test_a_pair_is_one_pass_and_equals_two(teacher, inputs, guidance):
    x, t, c_p, c_g = inputs
    score, rows = stir(with_adapters(teacher, RANK)), []
    w_p, w_g = guidance

    def gradient(pair):
        z = x.clone().requires_grad_(True)
        f_p, f_g = pair(z)
        g = torch.Generator().manual_seed(4)
        loss = sum((f * torch.randn(f.shape, generator=g)).sum() for f in (f_p, f_g))
        return f_p, f_g, *torch.autograd.grad(loss, z)

    want = gradient(lambda z: (teacher.x0(z, t, c_p, w_p), score.x0(z, t, c_g, w_g)))
    assert not close(want[0], teacher.x0(x, t, c_g, w_g), 1e-3)
    hook = teacher.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with score.frozen():
        got = gradient(lambda z: pair_x0(teacher, score, z, t, c_p, c_g, w_p, w_g))
    hook.remove()
    assert rows == [N * (2 + (w_p != 1) + (w_g != 1))]
    assert all(close(a, b) for a, b in zip(got, want))


def test_a_gate_that_is_ignored_shows(teacher, inputs, monkeypatch):
    """The gates above, on an adapter that takes no notice of the rows it is given."""
    x, t, c_p, c_g = inputs
    score = stir(with_adapters(teacher, RANK))
    whole = AdaptedUNet._adapted

    def ignorant(self, *args):
        rows, self._rows = self._rows, None
        try:
            return whole(self, *args)
        finally:
            self._rows = rows

    with torch.no_grad():
        want = teacher.x0(x, t, c_p)
        assert close(pair_x0(teacher, score, x, t, c_p, c_g)[0], want)
        monkeypatch.setattr(AdaptedUNet, "_adapted", ignorant)
        score = stir(with_adapters(teacher, RANK))
        assert not close(pair_x0(teacher, score, x, t, c_p, c_g)[0], want, 1e-3)


def test_any_other_pair_goes_separately(inputs, teacher):
    x, t, c_p, c_g = inputs
    other = load_teacher("digits") if type(teacher) is Denoiser else teacher.clone()
    for score in (teacher.clone(), stir(with_adapters(other, RANK))):
        f_p, f_g = pair_x0(teacher, score, x, t, c_p, c_g, 2.0, 1.0)
        assert torch.equal(f_p, teacher.x0(x, t, c_p, 2.0))
        assert torch.equal(f_g, score.x0(x, t, c_g))
    teacher.null_class = None
    with pytest.raises(ModelError, match="null class"):
        pair_x0(teacher, with_adapters(teacher, RANK), x, t, c_p, c_g, 2.0, 1.0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merged_weights_are_the_gated_network(teacher, inputs, scale):
    x, t, c, _ = inputs
    score = stir(with_adapters(teacher, RANK, scale=scale))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    merged = copy.copy(teacher)
    merged.unet = score.unet.merged()
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in teacher.named_parameters()]
    with torch.no_grad():
        assert close(merged.output(x, t, c), score.output(x, t, c))
        assert not close(merged.output(x, t, c), teacher.output(x, t, c), 1e-3)
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_the_base_keeps_no_trace(teacher, inputs):
    x, t, c, _ = inputs
    before, state = trace(teacher.unet), copy.deepcopy(teacher.unet.state_dict())
    with torch.no_grad():
        want = teacher.output(x, t, c)
    score = stir(with_adapters(teacher, RANK))
    assert trace(teacher.unet) == before
    score.output(x, t, c).sum().backward()
    with score.unet.rows(slice(1, N)):
        assert trace(teacher.unet) != before
        with pytest.raises(ModelError, match="rows of a batch"), score.unet.rows(torch.ones(N + 1)):
            teacher.output(x, t, c)
        assert trace(teacher.unet) != before
    assert trace(teacher.unet) == before
    assert all(torch.equal(value, state[name]) for name, value in teacher.unet.state_dict().items())
    with torch.no_grad():
        assert torch.equal(teacher.output(x, t, c), want)
    generator = teacher.clone()
    assert type(generator.unet) is type(teacher.unet)
    assert trace(generator.unet) == before


def test_gradients_are_those_of_the_formula(teacher, inputs):
    """ε of the weights W + scale · B A, differentiated by autograd in float64, to the adapters and to x_t."""
    x, t, c, _ = inputs
    teacher.unet.double()
    score, x = stir(with_adapters(teacher, RANK, scale=0.5)), x.double().requires_grad_(True)
    named = dict(score.named_parameters())
    got = torch.autograd.grad(score.output(x, t, c).square().sum(), [*named.values(), x])

    weights = dict(teacher.unet.named_parameters())
    for name in list(named):
        if name.endswith("lora_a"):
            a, b = named[name].double(), named[name.replace("lora_a", "lora_b")].double()
            w = weights[name.replace("lora_a", "weight")]
            product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).reshape(w.shape)
            weights[name.replace("lora_a", "weight")] = w + 0.5 * product
    explicit = copy.copy(teacher)
    unet = teacher.unet

    class Explicit(torch.nn.Module):
        config = unet.config

        def forward(self, *args, **keys):
            return functional_call(unet, weights, args, keys)

    explicit.unet = Explicit()
    want = torch.autograd.grad(explicit.output(x, t, c).square().sum(), [*named.values(), x])
    assert all(g.dtype == p.dtype for g, p in zip(got, [*named.values(), x]))
    assert all(close(g, w) for g, w in zip(got, want) if float(w.norm()) > 1e-9)
    assert all(float(w.norm()) > 0 for w in want)


def test_freezing_leaves_the_base_frozen(teacher):
    score = with_adapters(teacher, RANK)
    with score.frozen():
        assert not any(p.requires_grad for _, p in score.named_parameters())
    assert all(p.requires_grad for _, p in score.named_parameters())
    assert not any(p.requires_grad for _, p in score.freeze().named_parameters())
    assert all(p.requires_grad for _, p in score.clone().named_parameters())
    assert not any(p.requires_grad for _, p in teacher.named_parameters())


def test_a_clone_has_adapters_of_its_own_over_one_base(teacher, inputs):
    x, t, c, _ = inputs
    score = stir(with_adapters(teacher, RANK, "attention", scale=0.5))
    twin = score.clone()
    assert twin.unet.base is score.unet.base is teacher.unet
    with torch.no_grad():
        assert torch.equal(twin.output(x, t, c), score.output(x, t, c))
        kept = score.output(x, t, c)
        stir(twin, 0.1)
        assert torch.equal(score.output(x, t, c), kept)
        assert not close(twin.output(x, t, c), kept, 1e-3)


def test_moving_takes_base_and_adapters_along():
    teacher = load_teacher("digits")
    score = with_adapters(teacher, RANK).to("meta")
    assert score.device.type == "meta"
    assert {p.device.type for _, p in [*score.named_parameters(), *teacher.named_parameters()]} == {"meta"}
    assert isinstance(score.unet, AdaptedUNet)
    assert score.unet.base is teacher.unet


def test_adapters_are_stored_and_loaded_like_a_network(teacher, inputs, tmp_path):
    x, t, c, _ = inputs
    score, fresh = stir(with_adapters(teacher, RANK)), with_adapters(teacher, RANK, seed=5)
    files.write_tensors(tmp_path / "score.safetensors", score.unet.state_dict())
    tensors, _ = files.read_tensors(tmp_path / "score.safetensors", error=ModelError)
    load_weights(fresh.unet, tensors, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.output(x, t, c), score.output(x, t, c))
    with pytest.raises(ModelError, match=r"lora_[ab] has shape"):
        load_weights(with_adapters(teacher, RANK - 1).unet, tensors, tmp_path)
    with pytest.raises(ModelError, match=r"lora_[ab] (is missing|is unknown)"):
        load_weights(with_adapters(teacher, RANK, "attention").unet, tensors, tmp_path)


@pytest.mark.some(3)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointed_passes_repeat_the_same_rows(teacher, inputs, reentrant):
    x, t, c_p, c_g = inputs
    score, x = stir(with_adapters(teacher, RANK)), x.requires_grad_(True)
    named, calls = [p for _, p in score.named_parameters()], []

    def gradients():
        f_p, f_g = pair_x0(teacher, score, x, t, c_p, c_g, 2.0, 1.0)
        trained = score.eps(x, t, c_g).square().sum()
        loss = (f_p * f_p.detach().roll(1)).sum() + 3 * f_g.square().sum() + trained
        calls.clear()
        loss.backward()
        found = [p.grad.clone() for p in [x, *named]]
        for p in [x, *named]:
            p.grad = None
        return found

    layer = teacher.unet.get_submodule(target_layers(teacher.unet, "attention")[0][0])
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    want = gradients()
    assert not calls
    own = (partial(checkpoint, use_reentrant=reentrant),) if reentrant is not None else ()
    score.unet.enable_gradient_checkpointing(*own)
    before = trace(teacher.unet)
    got = gradients()
    # digits' attention stands in the middle block, which passes it outside its checkpoints
    assert calls or type(teacher) is Denoiser
    assert all(close(g, w, 1e-4) for g, w in zip(got, want) if float(w.norm()) > 1e-6)
    assert trace(teacher.unet) == before
    hook.remove()


def test_a_compiled_block_is_one_piece_and_is_compiled_once():
    teacher = load_teacher("digits")
    score, x = stir(with_adapters(teacher, RANK)), torch.randn(N, *teacher.sample_shape)
    t, c = torch.tensor([38, 300, 500]), torch.tensor([0, 1, 2])
    pieces = []

    def backend(graph, _):
        pieces.append(graph)
        return graph.forward

    with torch.no_grad():
        want = [*pair_x0(teacher, score, x, t, c, c), score.x0(x, t, c), teacher.x0(x, t, c)]
        torch._dynamo.reset()
        teacher.unet.down_blocks[0].resnets[0].compile(backend=backend, fullgraph=True, dynamic=False)
        for _ in range(3):
            got = [*pair_x0(teacher, score, x, t, c, c), score.x0(x, t, c), teacher.x0(x, t, c)]
            assert all(close(a, b) for a, b in zip(got, want))
            assert len(pieces) == 3  # rows of both, ψ alone, φ alone


def test_autocast_computes_the_adapters_in_its_own_dtype(teacher, inputs):
    x, t, c_p, c_g = inputs
    score = stir(with_adapters(teacher, RANK))
    want = score.eps(x, t, c_g).detach()
    seen = set()
    apply = torch.nn.functional.linear
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eps = score.eps(x, t, c_g)
        f_p, f_g = pair_x0(teacher, score, x, t, c_p, c_g)
        layer = torch.nn.Linear(8, 8)
        adapted = AdaptedUNet(torch.nn.ModuleDict({"one": layer}), RANK)
        with adapted.rows(None):
            seen.add(layer(torch.randn(2, 8)).dtype)
        seen.add(apply(torch.randn(2, 8), layer.weight).dtype)
    assert seen == {torch.bfloat16}
    assert close(eps, want, 0.05)
    assert close(f_p, teacher.x0(x, t, c_p), 0.05)
    assert close(f_g, score.x0(x, t, c_g), 0.05)
    eps.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for _, p in score.named_parameters())


def test_a_base_in_half_precision_has_adapters_in_float32(inputs, teacher):
    x, t, c, _ = inputs
    want = teacher.output(x, t, c)
    teacher.unet.bfloat16()
    score = with_adapters(teacher, RANK)
    assert {p.dtype for _, p in score.named_parameters()} == {torch.float32}
    out = score.output(x.bfloat16(), t, c)
    assert out.dtype == torch.bfloat16
    assert close(out.float(), want, 0.1)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (torch.nn.Bilinear(4, 4, 4), "adapters on unsupported layers: to_q is a Bilinear of ModuleDict"),
        (torch.nn.ConvTranspose2d(4, 4, 3), "to_q is a ConvTranspose2d"),
        (torch.nn.Conv2d(4, 4, 3, groups=2), "to_q is a Conv2d"),
        (torch.nn.Conv1d(4, 4, 3), "to_q is a Conv1d"),
        (torch.nn.GroupNorm(2, 4), "has no layers for targets 'all'"),
    ],
)
def test_layers_it_cannot_adapt_are_named(layer, match):
    with pytest.raises(ModelError, match=match):
        AdaptedUNet(torch.nn.ModuleDict({"to_q": layer}))


def test_layers_whose_weights_others_take_are_refused():
    from diffusers.models.downsampling import FirDownsample2D

    with pytest.raises(ModelError, match=r"down.Conv2d_0 is a Conv2d of FirDownsample2D"):
        AdaptedUNet(torch.nn.ModuleDict({"down": FirDownsample2D(8, 8, use_conv=True)}))
    fused = conditional_unet("sd1")
    fused.fuse_qkv_projections()
    with pytest.raises(ModelError, match="unsupported layers"):
        AdaptedUNet(fused, targets="attention")


def test_options_and_batches_are_checked(inputs, teacher):
    x, t, c, _ = inputs
    with pytest.raises(ModelError, match="rank of at least 1, got 0"):
        with_adapters(teacher, 0)
    with pytest.raises(ModelError, match="targets 'attn' is not one of attention, all"):
        with_adapters(teacher, RANK, "attn")
    with (
        pytest.raises(ModelError, match=f"is fed {N} rows of a batch of {N + 1}"),
        with_adapters(teacher, RANK).unet.rows(torch.ones(N + 1)),
    ):
        teacher.output(x, t, c)
